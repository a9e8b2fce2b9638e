"""Decoding of boxes as the published methods do it."""

from typing import Any, Tuple

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from torch import Tensor


def decode_boxes(transform: Any, deltas: Tensor, anchors: Tensor) -> Tensor:
    """Applies box deltas to anchors.

    Log-scale deltas are clamped on both sides, where detectron2 clamps from above only: so the published methods'
    box coder does it, and a box that shrinks below 1/62 of its anchor would otherwise lose its area in float32.

    Args:
        transform: detectron2's box coder of the detector.
        deltas: (M*R, D), M images one after the other.
        anchors: (R, 4).

    Returns:
        (M*R, 4) XYXY boxes in pixels.
    """
    if isinstance(transform, Box2BoxTransform):
        deltas = clamp_log_sizes(deltas, transform.weights, transform.scale_clamp)
    return transform.apply_deltas(deltas, anchors.repeat(len(deltas) // max(len(anchors), 1), 1))


def clamp_log_sizes(deltas: Tensor, weights: Tuple[float, float, float, float], scale_clamp: float) -> Tensor:
    """Clamps the log-scale deltas of a ``Box2BoxTransform`` from below as it does from above, (..., 4)."""
    widths = deltas[..., 2:3].clamp(min=-weights[2] * scale_clamp)
    heights = deltas[..., 3:].clamp(min=-weights[3] * scale_clamp)
    return torch.cat([deltas[..., :2], widths, heights], dim=-1)
