#!/usr/bin/env python3
"""Trains a teacher, a plain student and distilled students on small images, and compares them.

Everything runs through train_net.py, as a user would. What is finished is not run again, and an interrupted run goes
on from its last checkpoint: after Ctrl-C, type the same command.
"""

import argparse
import sys
from pathlib import Path
from statistics import mean
from typing import List

from d2kd.data import dataset_root
from d2kd.experiments.pictures import draw_curves, draw_grid
from d2kd.experiments.series import Run, prepare_data, resumable, run_all, table

LABELS = {
    "teacher": "teacher",
    "student": "student",
    "crosskd": "student + CrossKD",
    "ld": "student + LD",
    "longer": "student, same time",
}
DISTILLED = {"retinanet": ("crosskd",), "gfl": ("crosskd", "ld"), "atss": ("crosskd",), "fcos": ("crosskd",)}


def make_run(kind: str, seed: int, iterations: int, args: argparse.Namespace, output: Path) -> Run:
    """One run of the demo; RetinaNet's configs do not mention it."""
    prefix = "demo" if args.detector == "retinanet" else f"demo_{args.detector}"
    config = f"configs/{prefix}_{'student' if kind == 'longer' else kind}.yaml"
    folder = output / (kind if kind == "teacher" else f"{kind}_seed{seed}")
    run = Run(LABELS[kind], config, folder, seed, iterations, args.data)
    if kind in DISTILLED[args.detector]:
        run.overrides["MODEL.DISTILL.TEACHER.WEIGHTS"] = output / "teacher" / "model_final.pth"
    return run


def report(runs: List[Run], output: Path, data: str) -> None:
    """Writes the table and the pictures, and says where and how to go on."""
    text = table(runs)
    print(f"\n{text}\n")
    (output / "table.md").write_text(text + "\n")
    first = {run.label: run for run in reversed(runs)}  # the first seed of each
    first = {label: first[label] for label in LABELS.values() if label in first}
    draw_curves({label: run.folder for label, run in first.items()}, output / "curves.png")
    folder = dataset_root() / data
    results = Path("inference") / f"{data}_val" / "coco_instances_results.json"
    detections = {label: run.folder / results for label, run in first.items() if label != LABELS["longer"]}
    draw_grid(folder / "instances_val.json", folder / "images", detections, output / "detections.png")
    for name in ("table.md", "curves.png", "detections.png"):
        print(f"wrote {output / name}")
    checkpoint = first[LABELS["crosskd"]].checkpoint
    print(f"the distilled student, a plain detector: {checkpoint}\n\nnext, your own data: docs/custom_data.md, or try")
    evaluation = f"python train_net.py --config-file {first[LABELS['student']].config} --eval-only"
    print(f"  {evaluation} DATASETS.TEST \"('{data}_val',)\" MODEL.WEIGHTS {checkpoint}")


def demo(args: argparse.Namespace) -> None:
    """Prepares the data, runs what is not done yet, and reports."""
    suffix = "" if args.detector == "retinanet" else f"_{args.detector}"
    output = Path(args.output or f"output/demo_{args.data}{suffix}").absolute()
    prepare_data(args.data, args.bccd)
    seeds = range(1, args.seeds + 1)
    runs = [make_run("teacher", 1, args.iterations, args, output)]
    for kind in ("student", *DISTILLED[args.detector]):
        runs += [make_run(kind, seed, args.iterations, args, output) for seed in seeds]
    total = len(runs) + (args.seeds if args.same_time else 0)
    run_all(runs, total=total)
    if args.same_time:
        seconds = {
            kind: mean(r.step_seconds() for r in runs if r.label == LABELS[kind])
            for kind in LABELS
            if kind in ("student", "crosskd")
        }
        iterations = round(args.iterations * seconds["crosskd"] / seconds["student"])
        longer = [make_run("longer", seed, iterations, args, output) for seed in seeds]
        run_all(longer, total=total, before=len(runs))
        runs += longer
    report(runs, output, args.data)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="blood_cells", choices=["blood_cells", "bccd"], help="default: drawn images")
    parser.add_argument("--detector", default="retinanet", choices=list(DISTILLED), help="default: retinanet")
    parser.add_argument("--bccd", default="", help="folder of the BCCD data set, for --data bccd")
    parser.add_argument("--seeds", type=int, default=1, help="repeat the students with so many seeds (default 1)")
    parser.add_argument("--iterations", type=int, default=200, help="of every run (default 200)")
    parser.add_argument("--same-time", action="store_true", help="also a plain student with CrossKD's wall time")
    parser.add_argument("--output", help="folder of the results (default output/demo_<data>)")
    args = parser.parse_args()
    return resumable(lambda: demo(args))


if __name__ == "__main__":
    sys.exit(main())
