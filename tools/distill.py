#!/usr/bin/env python3
"""Trains a teacher, a plain student and a distilled student on your own data, compares them, and exports the student.

Image size, anchors, iterations and learning rate are chosen from the data and reported, with an estimate of time and
memory, before training starts. All runs go through train_net.py. Finished steps are not repeated, and interrupted runs
resume from their last checkpoint: after Ctrl-C, run the same command again.

    $ python tools/distill.py --train-data train.json:images --val-data val.json:images
    $ python tools/distill.py --train-data train.json:images --val-split 0.2
    $ python tools/distill.py --train-data cells/data.yaml
"""

import argparse
import sys


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = "ann.json:images (COCO), a YOLO data.yaml, or a folder in Pascal VOC's layout"
    parser.add_argument("--train-data", required=True, metavar="DATA", help=data)
    parser.add_argument("--val-data", default="", metavar="DATA", help="to evaluate on, named likewise")
    parser.add_argument(
        "--val-split",
        type=float,
        default=0.2,
        help="part of the images to evaluate on where there are no others (default 0.2)",
    )
    parser.add_argument("--detector", default="retinanet", help="retinanet (default), gfl, atss or fcos")
    parser.add_argument(
        "--models",
        default="",
        help="small: from scratch, for a CPU; standard: ResNet-50 teaches ResNet-18 (default: standard with a GPU)",
    )
    parser.add_argument("--teacher-config", default="", help="of a teacher that is trained on these classes already")
    parser.add_argument("--teacher-weights", default="", help="its weights")
    parser.add_argument("--teacher-start", default="", help="weights that the teacher starts from (default: config's)")
    parser.add_argument("--student-start", default="", help="weights that the student starts from (default: config's)")
    parser.add_argument("--epochs", type=int, default=0, help="default: enough for 300 (small) or 5000 iterations")
    parser.add_argument("--batch-size", type=int, default=0, help="images per iteration (default: the config's)")
    parser.add_argument("--image-size", type=int, default=0, help="shorter side (default: from the images)")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds for the students (default 1)")
    parser.add_argument("--output", default="output/own", help="folder of the results (default output/own)")
    parser.add_argument("--dry-run", action="store_true", help="only plan, and measure time and memory")
    args = vars(parser.parse_args())

    # Imported here because it takes seconds, which --help and mistyped arguments should not.
    from d2kd.experiments.own import OwnDistillation
    from d2kd.experiments.series import resumable
    from d2kd.quiet import quiet_known_warnings

    quiet_known_warnings()
    starts = {kind: args.pop(f"{kind}_start") for kind in ("teacher", "student")}
    settings = {
        **args,
        "start": {kind: file for kind, file in starts.items() if file},
        "plan_only": args["dry_run"],
    }
    del settings["dry_run"]
    return resumable(lambda: OwnDistillation(**settings).run())


if __name__ == "__main__":
    sys.exit(main())
