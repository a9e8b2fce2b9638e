"""Box coders that detectron2 lacks, with the interface of its ``Box2BoxTransform``."""

from typing import Tuple

import torch
from detectron2.modeling.box_regression import Box2BoxTransform, Box2BoxTransformLinear
from torch import Tensor

from ..dense import decode_boxes


class IntegralBoxTransform:
    """Boxes as four distributions of distances, arXiv 2006.04388 (GFL), section 3.2.

    A side's distance from the anchor's centre is the expectation of a softmax over 0, 1, ..., reg_max strides.

    Args:
        reg_max: the farthest distance, in strides. That a coder has this attribute tells methods that boxes are
            predicted as distributions of reg_max + 1 bins.
        anchor_scale: width of an anchor in strides.
    """

    def __init__(self, reg_max: int = 16, anchor_scale: float = 8.0) -> None:
        self.reg_max = reg_max
        self.anchor_scale = anchor_scale
        self._distances = Box2BoxTransformLinear(normalize_by_size=True)

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Decodes distributions.

        Args:
            deltas: logits, (M, 4*(reg_max+1)): left, top, right, bottom.
            boxes: anchors, (M, 4).

        Returns:
            (M, 4) XYXY boxes in pixels, float32.
        """
        probs = deltas.float().unflatten(-1, (4, self.reg_max + 1)).softmax(-1)
        bins = torch.arange(self.reg_max + 1, dtype=probs.dtype, device=probs.device)
        return self._distances.apply_deltas(probs @ bins / self.anchor_scale, boxes)

    def get_deltas(self, src_boxes: Tensor, target_boxes: Tensor) -> Tensor:
        """Distances of boxes' sides from anchors' centres.

        Args:
            src_boxes: anchors, (M, 4).
            target_boxes: boxes, (M, 4).

        Returns:
            (M, 4) left, top, right, bottom in strides, between 0 and reg_max - 0.1: the two bins around it exist.
        """
        distances = self._distances.get_deltas(src_boxes, target_boxes) * self.anchor_scale
        return distances.clamp(min=0, max=self.reg_max - 0.1)


class ClampedBoxTransform:
    """detectron2's ``Box2BoxTransform`` with log-scale deltas clamped on both sides, see :func:`decode_boxes`.

    Args:
        weights: the deltas' factors, 1 / standard deviation.
    """

    def __init__(self, weights: Tuple[float, float, float, float]) -> None:
        self._transform = Box2BoxTransform(weights=weights)

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Decodes deltas (M, 4) of anchors (M, 4) to XYXY boxes (M, 4) in pixels, float32."""
        if len(deltas) == 0:  # decode_boxes divides by the number of anchors
            return deltas.float()
        return decode_boxes(self._transform, deltas.float(), boxes)

    def get_deltas(self, src_boxes: Tensor, target_boxes: Tensor) -> Tensor:
        """Deltas (M, 4) that turn anchors (M, 4) into boxes (M, 4)."""
        return self._transform.get_deltas(src_boxes, target_boxes)
