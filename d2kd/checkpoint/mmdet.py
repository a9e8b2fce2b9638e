"""Conversion of mmdetection's detectors to detectron2's names.

Names do not determine two details. Of mmdetection's detectors only FCOS has a ReLU between P6 and P7, while
detectron2's ``LastLevelP6P7`` always has one. And P6 is computed from C5 or from P5, which shows in the number of input
channels of ``backbone.top_block.p6``.
"""

import re
from typing import Any, Dict, Mapping, NamedTuple, Optional

import torch
from torch import Tensor

from ..errors import D2kdError
from .names import plain_state, resnet_name, some

# Detector -> its predictors. The first predictor identifies the detector.
_PREDICTORS: Dict[str, Dict[str, str]] = {
    "RetinaNet": {"retina_cls": "cls_score", "retina_reg": "bbox_pred"},
    "GFL": {"gfl_cls": "cls_score", "gfl_reg": "bbox_pred"},
    "ATSS": {"atss_cls": "cls_score", "atss_reg": "bbox_pred", "atss_centerness": "ctrness"},
    "FCOS": {"conv_cls": "cls_score", "conv_reg": "bbox_pred", "conv_centerness": "ctrness"},
}
_SCALE = re.compile(r"bbox_head\.scales\.\d+\.scale")
_SCALES = "head.scales"
_DERIVED = "bbox_head.integral.project"  # the numbers 0 to reg_max
_TOWERS = {"cls_convs": "cls_subnet", "reg_convs": "bbox_subnet"}
_FIRST_LEVEL = 3


class _Layout(NamedTuple):
    """The structure of a detector as seen from its keys.

    Attributes:
        predictors: its last convolutions, mmdetection's name -> detectron2's.
        laterals: number of lateral convolutions; FPN convolutions beyond it produce the extra levels.
        stride: number of modules per tower convolution: the convolution, its norm if any, and its activation.
    """

    predictors: Mapping[str, str]
    laterals: int
    stride: int


def is_mmdet(state: Mapping[str, Any]) -> bool:
    """Returns whether the content of a checkpoint file, or a state dict, comes from an mmdetection detector."""
    state = state["state_dict"] if isinstance(state.get("state_dict"), Mapping) else state
    return any(re.match(r"(module\.)?(bbox_head|neck)\.", str(name)) for name in state)


def convert_mmdet(state: Mapping[str, Any], num_ratios: int = 3, num_octaves: int = 3) -> Dict[str, Tensor]:
    """Renames the tensors of an mmdetection RetinaNet, GFL, ATSS or FCOS to detectron2's and d2kd's names.

    RetinaNet's anchors are reordered: the index of an anchor is ``ratio * num_octaves + octave`` in mmdetection and
    ``octave * num_ratios + ratio`` in detectron2. The first lateral convolution is assumed to belong to P3
    (``start_level=1``), no matter how many there are. The scales of the levels become one parameter.

    Args:
        state: the state dict, or the content of the file, ``{"state_dict": ...}``.
        num_ratios: number of aspect ratios per location, mmdetection's ``anchor_generator.ratios``.
        num_octaves: number of sizes per location, mmdetection's ``anchor_generator.scales_per_octave``.

    Returns:
        detectron2 name -> tensor.

    Raises:
        D2kdError: it is a different detector, has keys without a counterpart, or a different number of anchors.
    """
    plain = plain_state(state)
    converted, scales = {}, {}
    for name, new in mmdet_names(plain).items():
        if new == _SCALES:
            scales[int(name.split(".")[2])] = plain[name]
        elif name.startswith("bbox_head.retina_"):
            converted[new] = _reorder(name, plain[name], num_ratios, num_octaves)
        else:
            converted[new] = plain[name]
    if scales:
        converted[_SCALES] = torch.stack([scales[level] for level in sorted(scales)])
    return converted


def mmdet_names(state: Mapping[str, Tensor]) -> Dict[str, str]:
    """Returns detectron2's name of each tensor of a detector; the scales of all levels map to the same name.

    Args:
        state: a plain state dict, from :func:`plain_state`.

    Raises:
        D2kdError: it is a different detector, or has keys without a counterpart.
    """
    layout = _layout(state)
    names = {name: _detectron2_name(name, layout) for name in state if name != _DERIVED}
    if unknown := [name for name, new in names.items() if new is None]:
        raise D2kdError(f"detectron2's detectors have no counterpart of {some(unknown)}; convert a plain detector")
    return {name: new for name, new in names.items() if new is not None}


def _layout(state: Mapping[str, Tensor]) -> _Layout:
    laterals = {match[1] for match in map(re.compile(r"neck\.lateral_convs\.(\d+)\.").match, state) if match}
    has_norm = any(re.match(r"bbox_head\.(cls|reg)_convs\.\d+\.gn\.", name) for name in state)
    return _Layout(_PREDICTORS[mmdet_detector(state)], len(laterals), 3 if has_norm else 2)


def mmdet_detector(state: Mapping[str, Any]) -> str:
    """Returns the detector that an mmdetection state dict belongs to: RetinaNet, GFL, ATSS or FCOS.

    Raises:
        D2kdError: it belongs to none of them.
    """
    for detector, predictors in _PREDICTORS.items():
        if f"bbox_head.{next(iter(predictors))}.weight" in state:
            return detector
    raise D2kdError(
        f"this is none of mmdetection's {', '.join(_PREDICTORS)}: it has no "
        f"{' or '.join('bbox_head.' + next(iter(p)) for p in _PREDICTORS.values())}; convert one of these detectors"
    )


def _detectron2_name(name: str, layout: _Layout) -> Optional[str]:
    """Returns detectron2's name, or None if there is none."""
    if name.startswith("backbone."):
        return resnet_name(name[len("backbone.") :])
    if _SCALE.fullmatch(name):
        return _SCALES
    match = re.fullmatch(r"(?:neck|bbox_head)\.(\w+?)(?:\.(\d+)\.(conv|gn))?\.(weight|bias)", name)
    if match is None:
        return None
    part, index, kind, leaf = match[1], int(match[2] or 0), match[3], match[4]
    if part in layout.predictors and kind is None:
        return f"head.{layout.predictors[part]}.{leaf}"
    if part in _TOWERS and kind:
        return f"head.{_TOWERS[part]}.{layout.stride * index + (kind == 'gn')}.{leaf}"
    if part in ("lateral_convs", "fpn_convs") and kind == "conv":
        return f"backbone.{_fpn_name(part, index, layout.laterals)}.{leaf}"
    return None


def _fpn_name(part: str, index: int, laterals: int) -> str:
    level = index + _FIRST_LEVEL
    if part == "lateral_convs":
        return f"fpn_lateral{level}"
    return f"fpn_output{level}" if index < laterals else f"top_block.p{level}"


def _reorder(name: str, tensor: Tensor, num_ratios: int, num_octaves: int) -> Tensor:
    """Reorders the output channels of a predictor: (ratio, octave, rest) to (octave, ratio, rest)."""
    slots, channels = num_ratios * num_octaves, len(tensor)
    fits = min(num_ratios, num_octaves) > 0 and channels % slots == 0
    if not fits or (name.startswith("bbox_head.retina_reg.") and channels != 4 * slots):
        raise D2kdError(
            f"{name} has {channels} channels, which does not fit {num_ratios} ratios x {num_octaves} octaves; "
            "pass the numbers of the anchor generator that it was trained with"
        )
    return tensor.unflatten(0, (num_ratios, num_octaves, -1)).transpose(0, 1).flatten(0, 2)
