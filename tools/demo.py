#!/usr/bin/env python3
"""Trains a teacher, a plain student and distilled students on small images, and compares them.

Everything runs through train_net.py, as a user would. What is finished is not run again, and an interrupted run goes
on from its last checkpoint: after Ctrl-C, type the same command.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Dict, List

import torch
from tabulate import tabulate

from d2kd.data import dataset_root, write_blood_cells
from d2kd.errors import D2kdError
from d2kd.pictures import draw_curves, draw_grid, read_metrics

ROOT = Path(__file__).resolve().parent.parent
LABELS = {
    "teacher": "teacher",
    "student": "student",
    "crosskd": "student + CrossKD",
    "ld": "student + LD",
    "longer": "student, same time",
}
DISTILLED = {"retinanet": ("crosskd",), "gfl": ("crosskd", "ld"), "atss": ("crosskd",), "fcos": ("crosskd",)}

DIGITS = {"s/step": 3, "training s": 0}


@dataclass
class Run:
    """One training run of the demo: which config, which seed, how long, where."""

    kind: str
    seed: int
    iterations: int
    output: Path
    data: str
    detector: str

    @property
    def config(self) -> str:
        """The config's path; RetinaNet's names do not mention it."""
        prefix = "demo" if self.detector == "retinanet" else f"demo_{self.detector}"
        return f"configs/{prefix}_{'student' if self.kind == 'longer' else self.kind}.yaml"

    @property
    def folder(self) -> Path:
        return self.output / (self.kind if self.kind == "teacher" else f"{self.kind}_seed{self.seed}")

    @property
    def name(self) -> str:
        return f"{LABELS[self.kind]} (seed {self.seed})"

    @property
    def done(self) -> bool:
        return (self.folder / "model_final.pth").exists() and "bbox/AP" in (self.records or [{}])[-1]

    @property
    def records(self) -> List[dict]:
        return read_metrics(self.folder)

    def command(self) -> List[str]:
        overrides = {
            "OUTPUT_DIR": self.folder,
            "SEED": self.seed,
            "SOLVER.MAX_ITER": self.iterations,
            "TEST.EVAL_PERIOD": max(self.iterations // 4, 1),
            "DATASETS.TRAIN": f"('{self.data}_train',)",
            "DATASETS.TEST": f"('{self.data}_val',)",
        }
        if self.kind in DISTILLED[self.detector]:
            overrides["MODEL.DISTILL.TEACHER.WEIGHTS"] = self.output / "teacher" / "model_final.pth"
        command = [sys.executable, "train_net.py", "--config-file", self.config, "--resume"]
        return command + [str(word) for pair in overrides.items() for word in pair]

    def start(self, position: str) -> None:
        """Runs it to its end, with progress on one line."""
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / "train.log"
        began = time.time()
        with log.open("a") as out:
            process = subprocess.Popen(
                self.command(), cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=environment()
            )
            try:
                while process.poll() is None:
                    time.sleep(0.5)
                    show(f"{position} {self.name}: {self.progress()}")
            except KeyboardInterrupt:
                process.terminate()
                process.wait()
                raise
        if process.returncode:
            tail = "\n".join(log.read_text().splitlines()[-15:])
            raise D2kdError(f"{self.name} failed; the end of {log}:\n{tail}")
        show(
            f"{position} {self.name}: AP {self.records[-1]['bbox/AP']:.1f} after {time.time() - began:.0f} s", end="\n"
        )

    def progress(self) -> str:
        """Where the run is, with an estimate of the time left."""
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
        state = torch.load(self.folder / "model_final.pth", map_location="cpu", weights_only=True)["model"]
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


def environment() -> Dict[str, str]:
    """The environment of a run: as many threads as this process may use cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(cores), **os.environ, "PYTHONUNBUFFERED": "1"}


def show(text: str, end: str = "") -> None:
    """Rewrites the line on a terminal; elsewhere prints only what stays."""
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end=end, flush=True)
    elif end:
        print(text, flush=True)


def prepare_data(data: str, bccd: str) -> None:
    """Makes the data set if it is not there."""
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


def spread(values: List[float], digits: int = 1) -> str:
    """Mean, and with several values their sample standard deviation."""
    text = f"{mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {stdev(values):.{digits}f}"


def table(runs: List[Run]) -> str:
    """The comparison as a Markdown table, one row per kind of run."""
    rows = []
    for kind in dict.fromkeys(run.kind for run in runs):
        group = [run for run in runs if run.kind == kind]
        numbers = [run.row() for run in group]
        columns = {key: spread([n[key] for n in numbers], DIGITS.get(key, 1)) for key in numbers[0]}
        params = f"{group[0].parameters() / 1e6:.2f} M"
        rows.append({"": LABELS[kind], "params": params, "iterations": group[0].iterations, **columns})
        if len(group) > 1:
            rows[-1]["AP of each seed"] = " / ".join(f"{n['AP']:.1f}" for n in numbers)
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def report(runs: List[Run], output: Path, data: str) -> None:
    """Writes the table and the pictures, and says where and how to go on."""
    text = table(runs)
    print(f"\n{text}\n")
    (output / "table.md").write_text(text + "\n")
    kinds = {run.kind: run for run in reversed(runs)}
    first = {LABELS[kind]: run for kind, run in kinds.items()}  # the first seed of each kind
    first = {label: first[label] for label in LABELS.values() if label in first}
    draw_curves({label: run.folder for label, run in first.items()}, output / "curves.png")
    folder = dataset_root() / data
    results = Path("inference") / f"{data}_val" / "coco_instances_results.json"
    detections = {label: run.folder / results for label, run in first.items() if run.kind != "longer"}
    draw_grid(folder / "instances_val.json", folder / "images", detections, output / "detections.png")
    for name in ("table.md", "curves.png", "detections.png"):
        print(f"wrote {output / name}")
    checkpoint = kinds["crosskd"].folder / "model_final.pth"
    print(f"the distilled student, a plain detector: {checkpoint}\n\nnext, your own data: docs/custom_data.md, or try")
    evaluation = f"python train_net.py --config-file {kinds['student'].config} --eval-only"
    print(f"  {evaluation} DATASETS.TEST \"('{data}_val',)\" MODEL.WEIGHTS {checkpoint}")


def run_all(args: argparse.Namespace) -> None:
    """Prepares the data, runs what is not done yet, and reports."""
    suffix = "" if args.detector == "retinanet" else f"_{args.detector}"
    output = Path(args.output or f"output/demo_{args.data}{suffix}").absolute()
    prepare_data(args.data, args.bccd)
    settings = {"iterations": args.iterations, "output": output, "data": args.data, "detector": args.detector}
    runs = [Run("teacher", 1, **settings)]
    for kind in ("student", *DISTILLED[args.detector]):
        runs += [Run(kind, seed, **settings) for seed in range(1, args.seeds + 1)]
    total = len(runs) + (args.seeds if args.same_time else 0)
    for position, run in enumerate(runs, 1):
        finish(run, f"[{position}/{total}]")
    if args.same_time:
        ratio = mean(r.step_seconds() for r in runs if r.kind == "crosskd") / mean(
            r.step_seconds() for r in runs if r.kind == "student"
        )
        settings["iterations"] = round(args.iterations * ratio)
        for seed in range(1, args.seeds + 1):
            runs.append(Run("longer", seed, **settings))
            finish(runs[-1], f"[{len(runs)}/{total}]")
    report(runs, output, args.data)


def finish(run: Run, position: str) -> None:
    """Runs it unless it is done; refuses the remains of a run with other settings."""
    settings = run.folder / "settings.json"
    wanted = {"iterations": run.iterations, "seed": run.seed, "data": run.data, "detector": run.detector}
    if settings.exists() and run.kind != "longer" and json.loads(settings.read_text()) != wanted:
        raise D2kdError(
            f"{run.folder} holds a run with other settings ({settings.read_text()}); remove it, or use --output"
        )
    if run.done:
        print(f"{position} {run.name}: done before, AP {run.records[-1]['bbox/AP']:.1f}")
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    settings.write_text(json.dumps(wanted))
    run.start(position)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="blood_cells", choices=["blood_cells", "bccd"], help="default: drawn images")
    parser.add_argument("--detector", default="retinanet", choices=list(DISTILLED), help="default: retinanet")
    parser.add_argument("--bccd", default="", help="folder of the BCCD data set, for --data bccd")
    parser.add_argument("--seeds", type=int, default=1, help="repeat the students with so many seeds (default 1)")
    parser.add_argument("--iterations", type=int, default=200, help="of every run (default 200)")
    parser.add_argument("--same-time", action="store_true", help="also a plain student with CrossKD's wall time")
    parser.add_argument("--output", help="folder of the results (default output/demo_<data>)")
    try:
        run_all(parser.parse_args())
    except D2kdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
