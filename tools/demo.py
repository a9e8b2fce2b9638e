#!/usr/bin/env python3
"""Trains a teacher, a plain student and distilled students on small images, and compares them.

All runs go through train_net.py, as a user's would. Finished runs are not repeated, and interrupted runs resume from
their last checkpoint: after Ctrl-C, run the same command again.
"""

import argparse
import sys


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="blood_cells", choices=("blood_cells", "bccd"), help="default: blood_cells")
    parser.add_argument(
        "--detector", default="retinanet", choices=("retinanet", "gfl", "atss", "fcos"), help="default: retinanet"
    )
    parser.add_argument("--bccd", default="", help="folder of the BCCD data set, for --data bccd")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds for the students (default 1)")
    parser.add_argument("--iterations", type=int, default=200, help="length of every run (default 200)")
    parser.add_argument(
        "--same-time", action="store_true", help="also train a plain student for as long as CrossKD's training takes"
    )
    parser.add_argument("--output", default="", help="folder of the results (default output/demo_<data>)")
    args = parser.parse_args()

    # Imported here because it takes seconds, which --help and mistyped arguments should not.
    from d2kd.experiments.demo import Demo
    from d2kd.experiments.series import resumable

    return resumable(Demo(**vars(args)).run)


if __name__ == "__main__":
    sys.exit(main())
