"""Box decoding as in the published methods."""

from typing import Any, Tuple

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from torch import Tensor


def decode_boxes(transform: Any, deltas: Tensor, anchors: Tensor) -> Tensor:
    """Applies box deltas to anchors.

    Log-scale deltas are clamped from both sides, as in the published methods; detectron2 clamps from above only. A box
    that shrinks below 1/62 of its anchor would otherwise have no area in float32.

    Args:
        transform: the detector's box coder.
        deltas: (M*R, D), image after image.
        anchors: (R, 4).

    Returns:
        Boxes (M*R, 4), XYXY in pixels.
    """
    if isinstance(transform, Box2BoxTransform):
        deltas = clamp_log_sizes(deltas, transform.weights, transform.scale_clamp)
    return transform.apply_deltas(deltas, anchors.repeat(len(deltas) // max(len(anchors), 1), 1))


def clamp_log_sizes(deltas: Tensor, weights: Tuple[float, float, float, float], scale_clamp: float) -> Tensor:
    """Clamps the log-scale deltas (..., 4) of a ``Box2BoxTransform`` from below too."""
    widths = deltas[..., 2:3].clamp(min=-weights[2] * scale_clamp)
    heights = deltas[..., 3:].clamp(min=-weights[3] * scale_clamp)
    return torch.cat([deltas[..., :2], widths, heights], dim=-1)
