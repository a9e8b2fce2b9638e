"""Whether the parts of a built detector fit together, before it runs."""

from typing import Any, List

from detectron2.layers import ShapeSpec
from torch import nn

from .contract import channel_order, levels
from .errors import D2kdError
from .modeling.timm_models import check_pixels


def check_wiring(detector: nn.Module, prefix: str = "") -> None:
    """Checks that backbone, anchors and head of a LazyConfig's detector agree on levels, channels and anchors.

    There each is configured by itself, and a mismatch would show in the first iteration as shapes that do not fit.
    Detectors without a RetinaNet's parts are left alone.

    Args:
        detector: a detector.
        prefix: what to say before the message, such as whose it is.

    Raises:
        D2kdError: names the part.
    """
    if hasattr(detector, "backbone") and hasattr(detector, "pixel_std"):
        any_detector: Any = detector
        mean, std = (x.flatten().tolist() for x in (any_detector.pixel_mean, any_detector.pixel_std))
        check_pixels(any_detector.backbone, mean, std, channel_order(detector), prefix)
    parts = ("backbone", "head", "head_in_features", "num_classes", "anchor_generator")
    if not all(hasattr(detector, part) for part in parts) or not hasattr(detector.head, "cls_score"):
        return
    found: Any = detector
    read = levels(found, prefix)
    for message in (_levels(found, read), _channels(found, read), _outputs(found), _extra_levels(found.backbone)):
        if message:
            raise D2kdError(prefix + message)


def _levels(detector: Any, read: List[ShapeSpec]) -> str:
    strides, own = [level.stride for level in read], list(detector.anchor_generator.strides)
    if strides != own:
        return f"the levels of the head have strides {strides}, but model.anchor_generator.strides is {own}"
    scales = getattr(detector.head, "scales", None)
    expected = len(scales) if scales is not None else getattr(detector.head, "_num_features", len(read))
    if expected != len(read):
        return f"the head reads {len(read)} levels, but model.head.input_shape has {expected}"
    return ""


def _channels(detector: Any, read: List[ShapeSpec]) -> str:
    given = {level.channels for level in read}
    convs = [layer for layer in detector.head.cls_subnet if isinstance(layer, nn.Conv2d)]
    wanted = {convs[0].in_channels} if convs else given
    if given != wanted:
        return (
            f"the head takes levels of {_some(wanted)} channels (input_shape), but the backbone's have {_some(given)}"
        )
    return ""


def _outputs(detector: Any) -> str:
    anchors = set(detector.anchor_generator.num_anchors)
    if len(anchors) > 1:
        return f"levels have different numbers of anchors, {_some(anchors)}; give each as many sizes and aspect ratios"
    outputs, wanted = detector.head.cls_score.out_channels, anchors.pop() * detector.num_classes
    if outputs != wanted:
        return (
            f"the head predicts {outputs} classes of anchors per place, but anchors (model.anchor_generator, "
            f"model.head.num_anchors) times classes (model.num_classes, model.head.num_classes) are {wanted}"
        )
    return ""


def _extra_levels(backbone: Any) -> str:
    """Whether the levels on top of an FPN take as many channels as they get, and give as many as the others."""
    top: Any = getattr(backbone, "top_block", None)
    bottom_up: Any = getattr(backbone, "bottom_up", None)
    convs = [x for x in top.modules() if isinstance(x, nn.Conv2d)] if top is not None else []
    if not convs or bottom_up is None:
        return ""
    own = backbone.output_shape()
    shapes = {**own, **bottom_up.output_shape()}
    if top.in_feature not in shapes:
        return f"model.backbone.top_block.in_feature is {top.in_feature!r}; the backbone has {', '.join(shapes)}"
    given, wanted = shapes[top.in_feature].channels, next(iter(own.values())).channels
    if convs[0].in_channels != given:
        in_channels = convs[0].in_channels
        return f"model.backbone.top_block.in_channels is {in_channels}, but {top.in_feature} has {given} channels"
    if convs[-1].out_channels != wanted:
        out_channels = convs[-1].out_channels
        return (
            f"model.backbone.top_block.out_channels is {out_channels}, but the backbone's levels have {wanted} channels"
        )
    return ""


def _some(numbers: "set[int]") -> str:
    return " or ".join(map(str, sorted(numbers)))
