"""Command line: converts an mmdetection RetinaNet or a torchvision ResNet to a detectron2 checkpoint."""

import argparse
import os
import sys
from typing import List, Optional

from ..errors import D2kdError
from . import files
from .mmdet import convert_mmdet, is_mmdet
from .torchvision_weights import convert_torchvision

_EXAMPLE = "example: python -m d2kd.checkpoint.convert retinanet_r50_fpn_1x_coco.pth teacher.pth"
_REMINDER = """Set in the config that loads it (mmdetection's 'pytorch' style and torchvision):
  INPUT.FORMAT RGB
  MODEL.PIXEL_MEAN [123.675, 116.28, 103.53]
  MODEL.PIXEL_STD [58.395, 57.12, 57.375]
  MODEL.RESNETS.STRIDE_IN_1X1 False"""
_TOP = """Mind that mmdetection's RetinaNet has no ReLU between P6 and P7 (detectron2's LastLevelP6P7 has one), and
makes P6 from C5 (add_extra_convs on_input) or P5 (on_output)."""


def convert_file(source: str, target: str, num_ratios: int = 3, num_octaves: int = 3, force: bool = False) -> str:
    """Converts a file; its kind is recognised by its keys.

    Args:
        source: an mmdetection RetinaNet or a torchvision ResNet.
        target: the file to write.
        num_ratios: mmdetection only: aspect ratios per place.
        num_octaves: mmdetection only: sizes per place.
        force: overwrite the target.

    Returns:
        What was recognised and how many tensors were mapped, for the user to read.

    Raises:
        D2kdError: the source cannot be converted or the target not written.
    """
    if os.path.exists(target) and not force:
        raise D2kdError(f"{target} exists; choose another name or pass --force")
    loaded = files.read(source)
    try:
        mmdet = is_mmdet(loaded)
        state = convert_mmdet(loaded, num_ratios, num_octaves) if mmdet else convert_torchvision(loaded)
    except D2kdError as error:
        raise D2kdError(f"{source}: {error}") from error
    try:
        files.write(target, {"model": state, "__author__": "d2kd.checkpoint.convert"})
    except OSError as error:
        raise D2kdError(f"{target} cannot be written ({error.strerror}); choose another place") from error
    if not mmdet:
        return f"torchvision ResNet: {len(state)} tensors mapped.\n{_REMINDER}"
    classes = len(state["head.cls_score.weight"]) // (num_ratios * num_octaves)
    return f"mmdetection RetinaNet: {len(state)} tensors mapped, {classes} classes.\n{_REMINDER}\n{_TOP}"


def main(argv: Optional[List[str]] = None) -> int:
    """Runs the command line; returns the exit status: 0, or 2 after a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m d2kd.checkpoint.convert", description=__doc__, epilog=_EXAMPLE)
    parser.add_argument("source", metavar="IN", help="mmdetection RetinaNet or torchvision ResNet (.pth)")
    parser.add_argument("target", metavar="OUT", help="detectron2 checkpoint to write (.pth)")
    parser.add_argument("--ratios", type=int, default=3, help="aspect ratios of the anchors (mmdetection; default 3)")
    parser.add_argument("--octaves", type=int, default=3, help="anchor sizes per level (mmdetection; default 3)")
    parser.add_argument("--force", action="store_true", help="overwrite OUT")
    args = parser.parse_args(argv)
    try:
        print(convert_file(args.source, args.target, args.ratios, args.octaves, args.force))
    except D2kdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
