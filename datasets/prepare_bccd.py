#!/usr/bin/env python3
"""Prepares BCCD (blood cells: RBC, WBC, platelets) in COCO format.

SOURCE is either a checkout of https://github.com/Shenggan/BCCD_Dataset, whose Pascal VOC files are converted, or a
folder that is already in COCO format: images/ and instances_{train,val,test}.json, which are used unchanged.
"""

import argparse
import sys
from pathlib import Path
from typing import List, Optional


def main(arguments: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder in VOC or COCO layout, see above")
    parser.add_argument("--output", type=Path, help="output folder (default: bccd in $DETECTRON2_DATASETS or datasets)")
    parser.add_argument("--link", action="store_true", help="link the images instead of copying them")
    options = parser.parse_args(arguments)

    # Imported here because it takes seconds, which --help and mistyped arguments should not.
    from d2kd.data import dataset_root
    from d2kd.data.bccd import prepare, summary
    from d2kd.errors import exit_status

    output = options.output or dataset_root() / "bccd"

    def run() -> None:
        print(summary(*prepare(options.source, output, options.link)))
        print(f"\nwritten to {output}; next: make demo DATA=bccd")

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
