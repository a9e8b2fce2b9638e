"""Box coders that detectron2 does not have, with the interface of ``Box2BoxTransform`` and TorchScript support."""

from typing import Tuple

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from torch import Tensor

from .boxes import clamp_log_sizes


class LinearBoxTransform:
    """Encodes boxes as the distances of their sides from an anchor's center, arXiv 1904.01355 (FCOS).

    Equivalent to detectron2's ``Box2BoxTransformLinear``, which TorchScript cannot compile.

    Args:
        normalize_by_size: measure distances in the anchor's width and height instead of in pixels.
    """

    def __init__(self, normalize_by_size: bool = True) -> None:
        self.normalize_by_size = normalize_by_size

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Decodes left, top, right, bottom distances (M, 4) of anchors (M, 4) to XYXY boxes; negative ones become 0."""
        distances = deltas.relu() * self._units(boxes).to(deltas.dtype)
        centers = self._centers(boxes).to(deltas.dtype)
        return torch.cat([centers - distances[:, :2], centers + distances[:, 2:]], dim=1)

    def get_deltas(self, src_boxes: Tensor, target_boxes: Tensor) -> Tensor:
        """Returns the distances (M, 4) from anchor centers to the sides of boxes (M, 4); negative if outside."""
        centers = self._centers(src_boxes)
        distances = torch.cat([centers - target_boxes[:, :2], target_boxes[:, 2:] - centers], dim=1)
        return distances / self._units(src_boxes)

    def _centers(self, boxes: Tensor) -> Tensor:
        return 0.5 * (boxes[:, :2] + boxes[:, 2:])

    def _units(self, boxes: Tensor) -> Tensor:
        sizes = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
        return sizes if self.normalize_by_size else torch.ones_like(sizes)


class IntegralBoxTransform:
    """Encodes boxes as four distributions of distances, arXiv 2006.04388 (GFL), section 3.2.

    The distance of a side from the anchor's center is the expectation of a softmax over 0, 1, ..., reg_max strides.

    Args:
        reg_max: the largest distance, in strides. Methods recognize by this attribute that boxes are predicted as
            distributions with reg_max + 1 bins.
        anchor_scale: width of an anchor in strides.
    """

    def __init__(self, reg_max: int = 16, anchor_scale: float = 8.0) -> None:
        self.reg_max = reg_max
        self.anchor_scale = anchor_scale
        self._distances = LinearBoxTransform(True)

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Decodes distributions.

        Args:
            deltas: logits, (M, 4*(reg_max+1)): left, top, right, bottom.
            boxes: anchors, (M, 4).

        Returns:
            (M, 4) XYXY boxes in pixels, float32.
        """
        probs = deltas.float().unflatten(1, [4, self.reg_max + 1]).softmax(-1)
        bins = torch.arange(self.reg_max + 1, dtype=probs.dtype, device=probs.device)
        # sum(2), not sum(-1): with zero boxes, onnxruntime (1.31) gives the latter a wrong shape.
        return self._distances.apply_deltas((probs * bins).sum(2) / self.anchor_scale, boxes)

    def get_deltas(self, src_boxes: Tensor, target_boxes: Tensor) -> Tensor:
        """Computes the distances from anchor centers to the sides of boxes.

        Args:
            src_boxes: anchors, (M, 4).
            target_boxes: boxes, (M, 4).

        Returns:
            (M, 4) left, top, right, bottom in strides, clamped to 0 and reg_max - 0.1 so that both neighboring bins
            exist.
        """
        distances = self._distances.get_deltas(src_boxes, target_boxes) * self.anchor_scale
        return distances.clamp(min=0, max=self.reg_max - 0.1)


class ClampedBoxTransform:
    """detectron2's ``Box2BoxTransform`` with log-scale deltas clamped from both sides, see :func:`decode_boxes`.

    Args:
        weights: factors of the deltas, 1 / standard deviation.
    """

    def __init__(self, weights: Tuple[float, float, float, float]) -> None:
        self.weights = weights
        self._transform = Box2BoxTransform(weights)

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Decodes deltas (M, 4) of anchors (M, 4) to XYXY boxes (M, 4) in pixels, float32."""
        transform = self._transform
        return transform.apply_deltas(clamp_log_sizes(deltas.float(), transform.weights, transform.scale_clamp), boxes)

    def get_deltas(self, src_boxes: Tensor, target_boxes: Tensor) -> Tensor:
        """Returns the deltas (M, 4) that transform anchors (M, 4) to boxes (M, 4)."""
        return self._transform.get_deltas(src_boxes, target_boxes)
