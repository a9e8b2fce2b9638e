#!/usr/bin/env python3
"""Writes one HTML file about a training run, or about several to compare.

Shows AP and losses over iterations and seconds, AP per class and size, how strongly each loss pulls, detections beside
the ground truth, features and scores of student and teacher, size and speed, settings and commands. The file needs no
other file and no network.

    $ python tools/report.py output/demo_blood_cells
    $ python tools/report.py plain=output/student distilled=output/crosskd --output report.html
"""

import argparse
import sys


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folder of a run, or one that holds runs, or LABEL=FOLDER; runs with the same label, by default the name "
        "of the folder without _seed1, are repetitions",
    )
    parser.add_argument("--output", default="report.html", help="the file to write (default report.html)")
    parser.add_argument("--title", default="Distillation report", help="heading of the page")
    parser.add_argument("--images", type=int, default=4, help="number of images to show (default 4)")
    parser.add_argument(
        "--latency", type=float, default=1.0, help="seconds to measure each latency; 0 for none (default 1)"
    )
    parser.add_argument(
        "--val-data",
        action="append",
        default=[],
        metavar="DATA",
        help="own data that the runs evaluated on, as for train_net.py: needed for pictures",
    )
    args = parser.parse_args()

    # Imported here because it takes seconds, which --help and mistyped arguments should not.
    from pathlib import Path

    from d2kd.data.own import prepare_own_data
    from d2kd.errors import exit_status
    from d2kd.quiet import quiet_known_warnings
    from d2kd.report import find_runs, write_report

    quiet_known_warnings()

    def write() -> None:
        output = Path(args.output)
        if args.val_data:
            prepare_own_data((), args.val_data, 0.0, output.parent / "data").register()
        print(f"wrote {write_report(find_runs(args.runs), output, args.title, args.images, args.latency)}")

    return exit_status(write)


if __name__ == "__main__":
    sys.exit(main())
