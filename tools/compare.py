#!/usr/bin/env python3
"""Compares distillation methods: the same teacher, student, data, seeds and iterations for all rows of a table.

Any configs and data sets:

    $ python tools/compare.py --student configs/demo_lite0.yaml --teacher configs/demo_lite2.yaml:teacher.pth
      --data train=train.json:images val=val.json:images --methods plain CrossKD "CrossKD+PKD PKD.WEIGHT=0.5"

or, without --student, the demo's small detectors and images. A row is "plain"; "same-time", the plain student for as
long as the first row with methods takes; "pseudo-labels", the plain student with the teacher's detections on the
training images (scores from 0.5) as further labels; or methods joined by "+", and keys under MODEL.DISTILL with values.

Every finished run adds a row to runs.csv and updates table.md and curves.png. The table has MACs, parameters, the
latency of the exported detector, AP, and the paired difference from "plain" with its 95 % interval over seeds. Finished
runs are not repeated, and interrupted runs resume from their last checkpoint: after Ctrl-C, run the same command again.
Simultaneous runs (--jobs) share the cores, so compare their seconds per step only with each other.
"""

import argparse
import sys


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--student", default="", metavar="CONFIG", help="YAML config of the student, plain or distilling")
    add("--teacher", default="", metavar="CONFIG[:WEIGHTS]", help="of the teacher; without weights it is trained first")
    add(
        "--data",
        nargs="+",
        default=["blood_cells"],
        metavar="DATA",
        help="train=annotations.json:images val=annotations.json:images; for the demo blood_cells (default) or bccd",
    )
    add("--methods", nargs="*", default=(), metavar="ROW", help="rows (default: plain and all methods)")
    add("--student-opts", nargs="*", default=(), metavar="KEY VALUE", help="overrides of the student's config")
    add("--teacher-opts", nargs="*", default=(), metavar="KEY VALUE", help="overrides of the teacher's config")
    add("--distill-opts", nargs="*", default=(), metavar="KEY VALUE", help="keys under MODEL.DISTILL, for all rows")
    add(
        "--detector",
        default="retinanet",
        choices=("retinanet", "gfl", "atss", "fcos"),
        help="of the demo (default retinanet)",
    )
    add("--bccd", default="", help="folder of the BCCD data set, for --data bccd")
    add("--seeds", type=int, default=3, help="number of seeds (default 3)")
    add("--iterations", type=int, default=200, help="length of every run (default 200)")
    add("--evaluations", type=int, default=4, help="how often every run is evaluated (default 4)")
    add("--jobs", type=int, default=1, help="number of runs at a time (default 1)")
    add("--output", default="", help="folder of the results (default output/comparison; of the demo, with its names)")
    args = parser.parse_args()

    # Imported here because it takes seconds, which --help and mistyped arguments should not.
    from d2kd.experiments.comparison import from_arguments
    from d2kd.experiments.series import resumable

    return resumable(lambda: from_arguments(args).run())


if __name__ == "__main__":
    sys.exit(main())
