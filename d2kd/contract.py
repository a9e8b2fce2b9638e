"""What a dense detector must have to be a student or a teacher."""

from typing import List

from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from torch import nn

from .errors import D2kdError
from .heads import TOWERS


def level_strides(detector: DenseDetector) -> List[int]:
    """Strides in pixels of the levels that the head reads, high to low resolution."""
    shapes = detector.backbone.output_shape()
    return [shapes[name].stride for name in detector.head_in_features]


def level_channels(detector: DenseDetector) -> List[int]:
    """Channels of the levels that the head reads, high to low resolution."""
    shapes = detector.backbone.output_shape()
    return [shapes[name].channels for name in detector.head_in_features]


def check_contract(detector: nn.Module, with_head: bool = True, with_losses: bool = True) -> None:
    """Checks that a detector has the parts that this package reads; detectron2's RetinaNet and FCOS have them.

    Args:
        detector: student or teacher.
        with_head: methods compare predictions or tower features.
        with_losses: it trains, as a student does.

    Raises:
        D2kdError: names what is missing.
    """
    kind = type(detector).__name__
    needed = ["backbone", "head", "head_in_features", "num_classes", "anchor_generator", "box2box_transform"]
    needed += ["label_anchors", "losses"] if with_losses else []
    missing = [name for name in needed if not hasattr(detector, name)]
    if missing:
        raise D2kdError(f"{kind} has no {', '.join(missing)}; give it these as detectron2's RetinaNet has them")
    missing = [name for name in TOWERS if not isinstance(getattr(detector.head, name, None), nn.Sequential)]
    if with_head and missing:
        raise D2kdError(
            f"{kind}'s head, {type(detector.head).__name__}, has no nn.Sequential {' and '.join(missing)}; keep its "
            "towers in cls_subnet and bbox_subnet as detectron2's RetinaNetHead does, or use methods that read "
            "features only"
        )
