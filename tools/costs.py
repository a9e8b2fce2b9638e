#!/usr/bin/env python3
"""Prints a Markdown table of what detectors cost to run: MACs, parameters and CPU time of one image.

By default of all recipes in configs: the table in docs/methods.md. The CPU time is of a whole detection in PyTorch,
decoding and NMS included, on one thread: the least of some repetitions, with random weights.
"""

import argparse
import sys


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", metavar="CONFIG", help="YAML configs (default: all recipes)")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each; 0 for none (default 3)")
    parser.add_argument(
        "--size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="of the image in pixels (default 800 1344)"
    )
    args = parser.parse_args()

    # Imported here because it takes seconds, which --help and mistyped arguments should not.
    from pathlib import Path

    from d2kd.complexity import COCO_SIZE
    from d2kd.errors import exit_status
    from d2kd.experiments.recipes import costs_table, recipes
    from d2kd.quiet import quiet_known_warnings

    quiet_known_warnings()
    configs = [Path(name) for name in args.configs] or recipes()
    return exit_status(lambda: print(costs_table(configs, args.repeats, tuple(args.size or COCO_SIZE))))


if __name__ == "__main__":
    sys.exit(main())
