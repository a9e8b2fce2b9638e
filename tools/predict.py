#!/usr/bin/env python3
r"""Detects objects in images, folders and videos, or draws several detectors side by side.

Writes a picture or video for each input, and all detections in COCO's format.

A checkpoint in the folder of its run, whose config and class names are found there:
    $ python tools/predict.py photos/ clip.mp4 --weights output/crosskd/model_final.pth

Any checkpoint with its config, YAML or LazyConfig, or of detectron2's zoo:
    $ python tools/predict.py photos/ --config-file configs/retinanet_R18.yaml --weights model.pth --names cat dog

A file of tools/export.py, with the export.json beside it:
    $ python tools/predict.py photos/ --weights export/model.onnx

Teacher, plain and distilled student beside the ground truth, images first on which they differ most:
    $ python tools/predict.py --val-data val.json:images --compare teacher=teacher.yaml:teacher.pth \
        plain=output/student/model_final.pth distilled=output/crosskd/model_final.pth int8=export/model_int8.onnx
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# The functions import d2kd, which takes seconds: --help does not need it.


def show_comparison(args: argparse.Namespace) -> None:
    """Compares detectors and prints their scores."""
    from tabulate import tabulate

    from d2kd.errors import D2kdError
    from d2kd.predict import compare, find_data, open_predictor, split_label

    if args.inputs or args.weights or args.config_file:
        raise D2kdError("--compare names all detectors itself, and --val-data the images; leave out the rest")
    if not args.val_data:
        raise D2kdError("--compare needs images with ground truth: add --val-data val.json:images")
    name, data = find_data(args.val_data, args.output / "data")
    predictors = {}
    for text in args.compare:
        label, config, weights = split_label(text)
        predictors[label] = open_predictor(weights, config, [], args.device, data)
    found = compare(predictors, name, args.output, args.images, args.by, args.min_score)
    images = [(image.entry["file_name"], image.scores) for image in found.images[: args.images]]
    labels = list(predictors)
    rows = [
        [name, *(f"{scores[label].ap:.1f} / {scores[label].recall:.1f}" for label in labels)]
        for name, scores in [("all images", found.whole), *images]
    ]
    print(tabulate(rows, headers=["AP / recall", *labels], tablefmt="github", disable_numparse=True), end="\n\n")
    print(f"wrote {args.output}")


def predict(args: argparse.Namespace) -> None:
    """Detects objects in the inputs."""
    from d2kd.errors import D2kdError
    from d2kd.predict import find_data, find_inputs, open_predictor, write_predictions

    if not args.inputs:
        raise D2kdError("name images, folders or videos to detect objects in, or detectors to --compare")
    if not args.weights:
        raise D2kdError("name a checkpoint or an exported file: --weights output/model_final.pth")
    inputs = find_inputs(args.inputs)
    name, data = find_data(args.val_data, args.output / "data")
    predictor = open_predictor(args.weights, args.config_file, args.opts, args.device, data)
    predictor = predictor.with_names(args.names, name)
    written = write_predictions(predictor, inputs, args.output, args.min_score)
    skipped = f"; {len(written.skipped)} images cannot be read" if written.skipped else ""
    print(f"wrote {args.output}: {written.detections} detections in {written.images} images and frames{skipped}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="images, folders of images and videos, videos")
    parser.add_argument("--weights", default="", help="any checkpoint, or an exported file (.onnx, .ts)")
    parser.add_argument("--config-file", default="", help="config of the checkpoint; a teacher in it is not needed")
    parser.add_argument("--output", type=Path, default=Path("predictions"), help="folder (default predictions)")
    parser.add_argument("--min-score", type=float, default=0.4, help="lowest score to draw (default 0.4)")
    parser.add_argument("--names", nargs="+", default=[], metavar="NAME", help="names of all classes, in their order")
    parser.add_argument(
        "--val-data",
        "--train-data",
        default="",
        metavar="DATA",
        help="a data set with the detector's classes: own data as for train_net.py, or the name of a registered one; "
        "for --compare its images and ground truth",
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        metavar="LABEL=DETECTOR",
        help="detectors to draw side by side: label=config:weights, or label=weights for a checkpoint in the folder of "
        "its run or an exported file",
    )
    parser.add_argument("--images", type=int, default=20, help="number of images that --compare draws (default 20)")
    parser.add_argument("--by", choices=["ap", "recall"], default="ap", help="what they differ in most (default ap)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="", help="default: cuda if there is a GPU")
    parser.add_argument("--opts", nargs="*", default=[], help="overrides of the config in its own style")
    args = parser.parse_args()

    import torch

    from d2kd.errors import exit_status
    from d2kd.quiet import quiet_known_warnings

    quiet_known_warnings()
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return exit_status(lambda: (show_comparison if args.compare else predict)(args))


if __name__ == "__main__":
    sys.exit(main())
