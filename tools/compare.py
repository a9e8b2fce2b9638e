#!/usr/bin/env python3
"""Compares distillation methods on small images, with the same teacher, student, seeds and iterations for all.

Every finished run adds a row to runs.csv and updates table.md. Finished runs are not repeated, and interrupted runs
resume from their last checkpoint: after Ctrl-C, run the same command again. Simultaneous runs (--jobs) share the cores,
so compare their seconds per step only with each other.
"""

import argparse
import sys


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--detector", default="retinanet", choices=("retinanet", "gfl", "atss", "fcos"), help="default: retinanet"
    )
    parser.add_argument(
        "--methods",
        nargs="*",
        default=(),
        metavar="METHOD",
        help='such as plain CrossKD "CrossKD + PKD", see METHODS in d2kd/experiments/comparison.py (default: all)',
    )
    parser.add_argument("--data", default="blood_cells", choices=("blood_cells", "bccd"), help="default: blood_cells")
    parser.add_argument("--bccd", default="", help="folder of the BCCD data set, for --data bccd")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default 3)")
    parser.add_argument("--iterations", type=int, default=200, help="length of every run (default 200)")
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at a time (default 1)")
    parser.add_argument("--output", default="", help="folder of the results (default output/compare_<data>_<detector>)")
    args = parser.parse_args()

    # Imported here because it takes seconds, which --help and mistyped arguments should not.
    from d2kd.experiments.comparison import Comparison
    from d2kd.experiments.series import resumable

    return resumable(Comparison(**vars(args)).run)


if __name__ == "__main__":
    sys.exit(main())
