#!/usr/bin/env python3
"""Compares distillation methods on small images: same teacher, student, seeds and iterations for all.

Every finished run adds a row to runs.csv and renews table.md; what is finished is not run again, and an interrupted run
goes on from its last checkpoint: after Ctrl-C, type the same command. Runs that go on at the same time (--jobs) share
the cores, so compare their seconds per step with one another only.
"""

import argparse
import csv
import sys
from pathlib import Path
from typing import Any, Dict, List

from d2kd.errors import check_choice
from d2kd.experiments.series import Run, prepare_data, resumable, run_all, table

DISTILL = "MODEL.DISTILL."
# What stands in the table, and its config keys under MODEL.DISTILL. Weights are those published for the detector, where
# there are any. The demo's necks differ (their backbones do), so only the head can be inherited.
METHODS: Dict[str, Dict[str, Any]] = {
    "plain": {},
    "ResponseKD": {"METHODS": "('ResponseKD',)"},
    "CrossKD": {"METHODS": "('CrossKD',)"},
    "PKD": {"METHODS": "('PKD',)"},
    "FGD": {"METHODS": "('FGD',)"},
    "FGD, inherited head": {"METHODS": "('FGD',)", "INHERIT": "('head',)"},
    "MGD": {"METHODS": "('MGD',)"},
    "CWD": {"METHODS": "('CWD',)"},
    "FitNet": {"METHODS": "('FitNet',)"},
    # LD is a sum over a worker's images: 0.25 is published for 2 of them, the demo has 8.
    "LD": {"METHODS": "('LD',)", "LD.WEIGHT": 0.0625},
    "CrossKD + PKD": {"METHODS": "('CrossKD', 'PKD')"},
}
PKD_WEIGHTS = {"retinanet": 2.0, "gfl": 6.0, "atss": 1.0, "fcos": 2.0}
ONLY = {"LD": ("gfl",)}


def make_runs(args: argparse.Namespace, output: Path) -> List[Run]:
    """The teacher's run and those of all methods and seeds, seed by seed, so that a stop leaves whole comparisons."""
    prefix = "demo" if args.detector == "retinanet" else f"demo_{args.detector}"
    teacher = Run("teacher", f"configs/{prefix}_teacher.yaml", output / "teacher", 1, args.iterations, args.data)
    runs = [teacher]
    for seed in range(1, args.seeds + 1):
        for label in args.methods:
            folder = output / f"{label.lower().replace(', ', '_').replace(' + ', '_').replace(' ', '_')}_seed{seed}"
            config = f"configs/{prefix}_{'crosskd' if METHODS[label] else 'student'}.yaml"
            run = Run(label, config, folder, seed, args.iterations, args.data)
            if METHODS[label]:
                run.overrides = {DISTILL + key: value for key, value in METHODS[label].items()}
                run.overrides[DISTILL + "TEACHER.WEIGHTS"] = teacher.checkpoint
                run.overrides[DISTILL + "PKD.WEIGHT"] = PKD_WEIGHTS[args.detector]
            runs.append(run)
    return runs


def write_results(runs: List[Run], output: Path) -> str:
    """Writes the rows of all finished runs and their table; returns the table."""
    finished = [run for run in runs if run.done]
    rows = [{"method": run.label, "seed": run.seed, **run.row()} for run in finished]
    with (output / "runs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    text = table(finished)
    (output / "table.md").write_text(text + "\n")
    return text


def compare(args: argparse.Namespace) -> None:
    """Runs what is not done yet and prints the table."""
    args.methods = args.methods or [m for m in METHODS if args.detector in ONLY.get(m, PKD_WEIGHTS)]
    for method in args.methods:
        check_choice("--methods", method, METHODS)
    output = Path(args.output or f"output/compare_{args.data}_{args.detector}").absolute()
    prepare_data(args.data, args.bccd)
    runs = make_runs(args, output)
    run_all(runs[:1], total=len(runs))
    run_all(runs[1:], args.jobs, total=len(runs), before=1, after_each=lambda: write_results(runs, output))
    print(f"\n{write_results(runs, output)}\n\nwrote {output / 'table.md'}\nwrote {output / 'runs.csv'}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detector", default="retinanet", choices=list(PKD_WEIGHTS), help="default: retinanet")
    parser.add_argument("--methods", nargs="*", metavar="METHOD", help=f"default: all of {', '.join(METHODS)}")
    parser.add_argument("--data", default="blood_cells", choices=["blood_cells", "bccd"], help="default: drawn images")
    parser.add_argument("--bccd", default="", help="folder of the BCCD data set, for --data bccd")
    parser.add_argument("--seeds", type=int, default=3, help="default 3")
    parser.add_argument("--iterations", type=int, default=200, help="of every run (default 200)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    parser.add_argument("--output", help="folder of the results (default output/compare_<data>_<detector>)")
    args = parser.parse_args()
    return resumable(lambda: compare(args))


if __name__ == "__main__":
    sys.exit(main())
