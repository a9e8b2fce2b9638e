"""Series of training runs for comparison: each through train_net.py, resumable, with progress and one table."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, Callable, Dict, List, Optional, Sequence

import torch
from tabulate import tabulate

from ..data import dataset_root, write_blood_cells
from ..errors import D2kdError, exit_status
from .pictures import read_metrics

ROOT = Path(__file__).resolve().parent.parent
DIGITS = {"s/step": 3, "training s": 0}


@dataclass
class Run:
    """One training run.

    Attributes:
        label: the row of the table that it belongs to; runs of several seeds share it.
        config: path of the config, relative to the project.
        folder: where it writes.
        seed: random seed.
        iterations: its length.
        data: data set; trained on <data>_train, evaluated on <data>_val.
        overrides: further config keys and values.
        threads: CPU threads it may use; 0 for all cores.
    """

    label: str
    config: str
    folder: Path
    seed: int
    iterations: int
    data: str
    overrides: Dict[str, Any] = field(default_factory=dict)
    threads: int = 0

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.label} (seed {self.seed})"

    @property
    def checkpoint(self) -> Path:
        """The trained weights."""
        return self.folder / "model_final.pth"

    @property
    def done(self) -> bool:
        """Whether it has been trained and evaluated."""
        return self.checkpoint.exists() and "bbox/AP" in (self.records or [{}])[-1]

    @property
    def records(self) -> List[dict]:
        """What it logged, in order."""
        return read_metrics(self.folder)

    def command(self) -> List[str]:
        """The command that starts or continues it."""
        overrides = {
            "OUTPUT_DIR": self.folder,
            "SEED": self.seed,
            "SOLVER.MAX_ITER": self.iterations,
            "TEST.EVAL_PERIOD": max(self.iterations // 4, 1),
            "DATASETS.TRAIN": f"('{self.data}_train',)",
            "DATASETS.TEST": f"('{self.data}_val',)",
            **self.overrides,
        }
        command = [sys.executable, "train_net.py", "--config-file", self.config, "--resume"]
        return command + [str(word) for pair in overrides.items() for word in pair]

    def settings(self) -> Dict[str, Any]:
        """What makes it this run and no other; written into its folder."""
        options = {key: str(value) for key, value in self.overrides.items()}
        return {"iterations": self.iterations, "seed": self.seed, "data": self.data, "config": self.config, **options}

    def check_folder(self) -> None:
        """Raises D2kdError if its folder holds the remains of another run; otherwise marks it as this run's."""
        file = self.folder / "settings.json"
        if file.exists() and json.loads(file.read_text()) != self.settings():
            raise D2kdError(f"{self.folder} holds a run with other settings; remove it, or write elsewhere (--output)")
        self.folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(self.settings()))

    def launch(self) -> "subprocess.Popen[bytes]":
        """Starts it in a process of its own, whose output goes to train.log."""
        with (self.folder / "train.log").open("a") as out:
            return subprocess.Popen(
                self.command(), cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=environment(self.threads)
            )

    def check_ended(self, returncode: int) -> None:
        """Raises D2kdError with the end of its log if it failed."""
        if returncode:
            log = self.folder / "train.log"
            tail = "\n".join(log.read_text().splitlines()[-15:])
            raise D2kdError(f"{self.name} failed; the end of {log}:\n{tail}")

    def progress(self) -> str:
        """Where it is, with an estimate of the time left."""
        records = [r for r in self.records if "total_loss" in r]
        if not records:
            return "starting"
        last = records[-1]
        done = last["iteration"] + 1
        if done >= self.iterations:
            return "evaluating"
        eta = int((self.iterations - done) * last.get("time", 0))
        return f"{done}/{self.iterations} loss {last['total_loss']:.2f} ETA {eta // 60}:{eta % 60:02d}"

    def step_seconds(self) -> float:
        """Median time of a training step, which neither evaluation nor a resumption distorts."""
        return median(r["time"] for r in self.records if "time" in r)

    def parameters(self) -> int:
        """Number of trained parameters of the deployed detector."""
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)["model"]
        skipped = ("running_mean", "running_var", "num_batches_tracked")
        return sum(v.numel() for k, v in state.items() if not k.endswith(skipped) and not k.startswith("distill."))

    def row(self) -> Dict[str, float]:
        """The numbers of the table."""
        last = self.records[-1]
        per_class = {k[len("bbox/") :]: v for k, v in sorted(last.items()) if k.startswith("bbox/AP-")}
        return {
            "AP": last["bbox/AP"],
            "AP50": last["bbox/AP50"],
            **per_class,
            "s/step": self.step_seconds(),
            "training s": self.step_seconds() * self.iterations,
        }


def environment(threads: int = 0) -> Dict[str, str]:
    """The environment of a run: by default as many threads as this process may use cores, and no spinning ones."""
    threads = threads or available_cores()
    return {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1", **os.environ, "OMP_NUM_THREADS": str(threads)}


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_all(
    runs: Sequence[Run], jobs: int = 1, total: int = 0, before: int = 0, after_each: Callable[[], Any] = lambda: None
) -> None:
    """Runs what is not done yet, with progress on one line.

    Args:
        runs: in this order.
        jobs: how many at once; they share the cores.
        total: number of runs that the progress counts to; by default those given.
        before: number of runs before these.
        after_each: called after each run that ends.

    Raises:
        D2kdError: a run failed, or a folder holds another run.
    """
    total = total or len(runs)
    positions = {id(run): f"[{before + i}/{total}]" for i, run in enumerate(runs, 1)}
    waiting = []
    for run in runs:
        run.check_folder()
        if run.done:
            print(f"{positions[id(run)]} {run.name}: done before, AP {run.records[-1]['bbox/AP']:.1f}", flush=True)
        else:
            waiting.append(run)
    active: Dict[int, Any] = {}
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                run = waiting.pop(0)
                if jobs > 1:
                    run.threads = max(available_cores() // jobs, 1)
                active[id(run)] = (run, run.launch(), time.time())
            time.sleep(0.5)
            show("; ".join(f"{positions[key]} {run.name}: {run.progress()}" for key, (run, _, _) in active.items()))
            for key, (run, process, began) in list(active.items()):
                if process.poll() is not None:
                    del active[key]
                    run.check_ended(process.returncode)
                    seconds = time.time() - began
                    text = f"{positions[key]} {run.name}: AP {run.records[-1]['bbox/AP']:.1f} after {seconds:.0f} s"
                    show(text, end="\n")
                    after_each()
    finally:
        for _, process, _ in active.values():
            process.terminate()
        for _, process, _ in active.values():
            process.wait()


def show(text: str, end: str = "") -> None:
    """Rewrites the line on a terminal; elsewhere prints only what stays."""
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end=end, flush=True)
    elif end:
        print(text, flush=True)


def prepare_data(data: str, bccd: str) -> None:
    """Makes a data set of the demo if it is not there.

    Args:
        data: "blood_cells", drawn, or "bccd".
        bccd: folder of the original BCCD images.
    """
    folder = dataset_root() / data
    if data == "blood_cells":
        print(f"Drawing the data set in {folder}")
        write_blood_cells(folder, "train", num_images=300, seed=1)
        write_blood_cells(folder, "val", num_images=100, seed=2)
    elif not (folder / "instances_val.json").exists():
        if not bccd:
            raise D2kdError(f"there is no data set in {folder}; name its source: make demo DATA=bccd BCCD=<folder>")
        script = ROOT / "datasets" / "prepare_bccd.py"
        if subprocess.run([sys.executable, script, bccd, "--output", folder]).returncode:
            raise D2kdError(f"{bccd} could not be prepared")


def resumable(run: Callable[[], Optional[int]]) -> int:
    """As :func:`exit_status`; after Ctrl-C it says how to go on, with status 130."""
    try:
        return exit_status(run)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues", file=sys.stderr)
        return 130


def spread(values: List[float], digits: int = 1) -> str:
    """Mean, and with several values their sample standard deviation."""
    text = f"{mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {stdev(values):.{digits}f}"


def table(runs: Sequence[Run]) -> str:
    """The comparison of finished runs as a Markdown table, one row per label."""
    rows = []
    for label in dict.fromkeys(run.label for run in runs):
        group = [run for run in runs if run.label == label]
        numbers = [run.row() for run in group]
        columns = {key: spread([n[key] for n in numbers], DIGITS.get(key, 1)) for key in numbers[0]}
        params = f"{group[0].parameters() / 1e6:.2f} M"
        rows.append({"": label, "params": params, "iterations": group[0].iterations, **columns})
        if len(group) > 1:
            rows[-1]["AP of each seed"] = " / ".join(f"{n['AP']:.1f}" for n in numbers)
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
