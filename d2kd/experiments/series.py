"""Series of training runs to compare: each started through train_net.py, resumable, with progress and a table."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median, stdev
from types import MappingProxyType
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from tabulate import tabulate

from ..data import dataset_root, write_blood_cells
from ..data.bccd import prepare, summary
from ..engine.estimate import duration
from ..errors import EXIT_INTERRUPTED, D2kdError, exit_status
from ..progress import progress_bar
from .pictures import read_metrics
from .statistics import paired_difference

ROOT = Path(__file__).resolve().parents[2]
DIGITS = {"s/step": 3, "training s": 0}
BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
# Seconds between lines where there is no terminal.
LINE_SECONDS = 120
# The label of the teacher's run.
TEACHER = "teacher"
# AP of small, medium and large objects.
SIZES = ("APs", "APm", "APl")


@dataclass
class Run:
    """One training run.

    Attributes:
        label: the table row that the run belongs to; runs with different seeds share it.
        config: path of the config, relative to the project.
        folder: output folder.
        seed: random seed.
        iterations: number of training iterations.
        data: data set; <data>_train is used for training and <data>_val for evaluation. "" for ``own_data``.
        overrides: additional config keys and values.
        threads: number of CPU threads; 0 for all cores.
        own_data: what --train-data and --val-data of train_net.py are.
        evaluations: how often the run is evaluated.
    """

    label: str
    config: str
    folder: Path
    seed: int
    iterations: int
    data: str
    overrides: Dict[str, Any] = field(default_factory=dict)
    threads: int = 0
    own_data: Tuple[str, str] = ("", "")
    evaluations: int = 4

    @property
    def name(self) -> str:
        """The name of the run in messages."""
        return f"{self.label} (seed {self.seed})"

    @property
    def checkpoint(self) -> Path:
        """Path of the trained weights."""
        return self.folder / "model_final.pth"

    @property
    def done(self) -> bool:
        """Whether the run has been trained and evaluated."""
        return self.checkpoint.exists() and "bbox/AP" in (self.records or [{}])[-1]

    @property
    def records(self) -> List[dict]:
        """The metrics that the run has logged, in order."""
        return read_metrics(self.folder)

    def command(self) -> List[str]:
        """Returns the command that starts or resumes the run."""
        overrides = {
            "OUTPUT_DIR": self.folder,
            "SEED": self.seed,
            "SOLVER.MAX_ITER": self.iterations,
            "TEST.EVAL_PERIOD": max(self.iterations // self.evaluations, 1),
            **self._data_sets,
            **self.overrides,
        }
        command = [sys.executable, "train_net.py", "--config-file", self.config, "--resume"]
        if not self.data:
            command += ["--train-data", self.own_data[0], "--val-data", self.own_data[1]]
        return command + [str(word) for pair in overrides.items() for word in pair]

    @property
    def _data_sets(self) -> Dict[str, Any]:
        if not self.data:
            return {}
        return {"DATASETS.TRAIN": f"('{self.data}_train',)", "DATASETS.TEST": f"('{self.data}_val',)"}

    def settings(self) -> Dict[str, Any]:
        """Returns the settings that identify the run; they are saved in its folder."""
        options = {key: str(value) for key, value in self.overrides.items()}
        data = self.data or list(self.own_data)
        return {"iterations": self.iterations, "seed": self.seed, "data": data, "config": self.config, **options}

    def check_folder(self) -> None:
        """Raises D2kdError if the folder belongs to a different run; otherwise saves the settings of this one there."""
        file = self.folder / "settings.json"
        if file.exists() and json.loads(file.read_text()) != self.settings():
            raise D2kdError(f"{self.folder} has a run with different settings; remove it or choose another --output")
        self.folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(self.settings()))

    def launch(self) -> "subprocess.Popen[bytes]":
        """Starts the run in its own process, whose output goes to train.log."""
        with (self.folder / "train.log").open("a") as out:
            return subprocess.Popen(
                self.command(), cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=environment(self.threads)
            )

    def check_ended(self, returncode: int) -> None:
        """Raises D2kdError with the end of the log if the run failed."""
        _check_ended(self.name, returncode, self.folder)

    def progress(self) -> Tuple[int, str]:
        """Returns how many iterations are done, and in words loss, last AP and estimated remaining time."""
        records = self.records
        trained = [r for r in records if "total_loss" in r]
        if not trained:
            return 0, "starting"
        last = trained[-1]
        done = min(last["iteration"] + 1, self.iterations)
        aps = [f"AP {r['bbox/AP']:.1f}" for r in records if "bbox/AP" in r][-1:]
        if done == self.iterations:
            return done, ", ".join([*aps, "evaluating"])
        left = f"ETA {duration((self.iterations - done) * last.get('time', 0))}"
        return done, ", ".join([f"loss {last['total_loss']:.2f}", *aps, left])

    def step_seconds(self) -> float:
        """Returns the median time of a training step, which evaluation and resuming do not distort."""
        return median(r["time"] for r in self.records if "time" in r)

    def row(self) -> Dict[str, float]:
        """Returns the numbers for the table."""
        last = self.records[-1]
        per_class = {k[len("bbox/") :]: v for k, v in sorted(last.items()) if k.startswith("bbox/AP-")}
        return {
            "AP": last["bbox/AP"],
            "AP50": last["bbox/AP50"],
            **{name: last[f"bbox/{name}"] for name in SIZES if f"bbox/{name}" in last},
            **per_class,
            "s/step": self.step_seconds(),
            "training s": self.step_seconds() * self.iterations,
        }


def evaluate(config: str, data: str, folder: Path, overrides: Mapping[str, Any]) -> Path:
    """Evaluates a detector through train_net.py.

    Args:
        config: of the detector.
        data: what --val-data is.
        folder: output folder.
        overrides: config keys and values, MODEL.WEIGHTS among them.

    Returns:
        The file of its detections, ``coco_instances_results.json``.

    Raises:
        D2kdError: it failed; has the end of the log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "train_net.py", "--config-file", config, "--eval-only", "--val-data", data]
    options = {**overrides, "OUTPUT_DIR": folder}
    command += [str(word) for pair in options.items() for word in pair]
    with (folder / "train.log").open("w") as out:
        done = subprocess.run(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=environment())
    _check_ended(f"the evaluation of {config}", done.returncode, folder)
    return next((folder / "inference").glob("*/coco_instances_results.json"))


def _check_ended(name: str, returncode: int, folder: Path) -> None:
    """Raises D2kdError with the end of the log if a command failed."""
    if returncode:
        log = folder / "train.log"
        tail = "\n".join(log.read_text().splitlines()[-15:])
        raise D2kdError(f"{name} failed; the end of {log}:\n{tail}")


def environment(threads: int = 0) -> Dict[str, str]:
    """Returns the environment of a run; waiting threads sleep.

    Args:
        threads: of the CPU; 0 for OMP_NUM_THREADS, or one for each available core.
    """
    defaults = {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(available_cores())}
    return {**defaults, **os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}


def available_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_all(
    runs: Sequence[Run], jobs: int = 1, total: int = 0, before: int = 0, after_each: Callable[[], Any] = lambda: None
) -> None:
    """Executes the runs that are not done yet, with their progress.

    Args:
        runs: the runs, in this order.
        jobs: number of runs at a time; they share the cores.
        total: total number of runs shown in the progress; by default the number of ``runs``.
        before: number of runs that were executed before these.
        after_each: called after each run that ends.

    Raises:
        D2kdError: a run failed, or a folder belongs to a different run.
    """
    total = total or len(runs)
    positions = {id(run): f"[{before + i}/{total}]" for i, run in enumerate(runs, 1)}
    waiting = []
    for run in runs:
        run.check_folder()
        if run.done:
            print(f"{positions[id(run)]} {run.name}: already done, AP {run.records[-1]['bbox/AP']:.1f}", flush=True)
        else:
            waiting.append(run)
    active: Dict[int, Active] = {}
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                run = waiting.pop(0)
                if jobs > 1:
                    run.threads = max(available_cores() // jobs, 1)
                active[id(run)] = Active(f"{positions[id(run)]} {run.name}", run)
            time.sleep(0.5)
            for key, one in list(active.items()):
                one.show()
                if one.process.poll() is not None:
                    del active[key]
                    one.end()
                    after_each()
    finally:
        for one in active.values():
            one.process.terminate()
        for one in active.values():
            one.process.wait()
            one.bar.close()


class Active:
    """A run in its process, and its progress: a bar on a terminal, elsewhere a line every few minutes.

    Args:
        name: of the run in its place among others.
        run: starts here.
    """

    def __init__(self, name: str, run: Run) -> None:
        self.name = name
        self.run = run
        self.began = self._told = time.time()
        self.bar = progress_bar(bar_format=BAR, desc=name, total=run.iterations)
        self.process = run.launch()

    def show(self) -> None:
        """Shows how far the run is."""
        if self.bar.disable and time.time() - self._told < LINE_SECONDS:
            return
        self._told = time.time()
        self.bar.n, text = self.run.progress()
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            print(f"{self.name}: {self.bar.n}/{self.run.iterations}, {text}", flush=True)

    def end(self) -> None:
        """Says how the run ended; raises D2kdError with the end of the log if it failed."""
        self.bar.close()
        self.run.check_ended(self.process.returncode)
        seconds = time.time() - self.began
        ap = self.run.records[-1]["bbox/AP"]
        self.bar.write(f"{self.name}: AP {ap:.1f} after {duration(seconds)}", file=sys.stdout)
        sys.stdout.flush()


def prepare_data(data: str, bccd: str) -> None:
    """Prepares a data set of the demo if it does not exist yet.

    Args:
        data: "blood_cells", which is generated, or "bccd".
        bccd: folder with the original BCCD data set.

    Raises:
        D2kdError: BCCD is missing and its folder is not given or not usable.
    """
    folder = dataset_root() / data
    if data == "blood_cells":
        print(f"Generating the data set in {folder}")
        write_blood_cells(folder, "train", num_images=300, seed=1)
        write_blood_cells(folder, "val", num_images=100, seed=2)
    elif not (folder / "instances_val.json").exists():
        if not bccd:
            raise D2kdError(f"there is no data set in {folder}; set its source: make demo DATA=bccd BCCD=<folder>")
        print(summary(*prepare(Path(bccd), folder)))


def resumable(run: Callable[[], Optional[int]]) -> int:
    """Runs a command like :func:`exit_status`; after Ctrl-C it says how to continue and returns 130."""
    try:
        return exit_status(run)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues", file=sys.stderr)
        return EXIT_INTERRUPTED


def spread(values: List[float], digits: int = 1) -> str:
    """Formats the mean, and the sample standard deviation if there are several values."""
    text = f"{mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {stdev(values):.{digits}f}"


def table(
    runs: Sequence[Run], costs: Mapping[str, Mapping[str, str]] = MappingProxyType({}), baseline: str = ""
) -> str:
    """Returns a Markdown table that compares finished runs, with one row per label.

    Args:
        runs: finished runs.
        costs: further columns of a label, see :func:`d2kd.experiments.costs.costs_of`.
        baseline: label of the row that others are compared with, seed by seed; "" for none.
    """
    rows = []
    for label in dict.fromkeys(run.label for run in runs):
        group = [run for run in runs if run.label == label]
        numbers = [run.row() for run in group]
        columns = {key: spread([n[key] for n in numbers], DIGITS.get(key, 1)) for key in numbers[0]}
        rows.append({"": label, **costs.get(label, {}), "iterations": group[0].iterations, **columns})
        if len(group) > 1:
            rows[-1]["AP of each seed"] = " / ".join(f"{n['AP']:.1f}" for n in numbers)
        if difference := _difference(runs, group, baseline):
            rows[-1][f"AP - {baseline}"] = difference
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def _difference(runs: Sequence[Run], group: Sequence[Run], baseline: str) -> str:
    """The paired difference in AP from the baseline of the same config, over the seeds that both have; "" for none."""
    others = {run.seed: run.row()["AP"] for run in runs if run.label == baseline and run.config == group[0].config}
    pairs = [(run.row()["AP"], others[run.seed]) for run in group if run.seed in others and run.label != baseline]
    return str(paired_difference(*zip(*pairs))) if pairs else ""
