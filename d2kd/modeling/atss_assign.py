"""ATSS: assignment of anchors to ground-truth boxes, arXiv 1912.02424, section 3."""

from typing import List, Sequence

import torch
from detectron2.structures import Boxes
from detectron2.structures.boxes import matched_pairwise_iou
from torch import Tensor

# An anchor's center must be farther inside its box than this, in pixels.
MIN_INSIDE = 0.01


@torch.no_grad()
def assign_atss(anchors: Sequence[Boxes], usable: Tensor, boxes: Boxes, topk: int = 9) -> Tensor:
    """Assigns the anchors of one image to its boxes, without a loop over boxes and without a GPU sync.

    The candidates of a box are the ``topk`` anchors of each level that are nearest to its center. A candidate is
    positive if its IoU is at least the mean + unbiased standard deviation of the candidates' IoUs and its center lies
    inside the box. An anchor that is positive for several boxes is assigned to the one with the largest IoU.

    Args:
        anchors: per level (Ri, 4).
        usable: (R,) bool over all levels; other anchors cannot be candidates.
        boxes: ground truth, (M, 4).
        topk: number of candidates per level; levels with fewer anchors contribute all of them.

    Returns:
        (R,) int64: the index of the box, or -1 for none.
    """
    if len(boxes) == 0:
        return torch.full_like(usable, -1, dtype=torch.long)
    candidates, is_candidate = nearest_anchors(anchors, usable, boxes, topk)
    nearby = Boxes.cat(list(anchors)).tensor[candidates]  # (M, C, 4)
    repeated = boxes.tensor[:, None].expand_as(nearby)
    iou = matched_pairwise_iou(Boxes(nearby.reshape(-1, 4)), Boxes(repeated.reshape(-1, 4))).view_as(is_candidate)
    positive = is_candidate & (iou >= iou_thresholds(iou, is_candidate)) & _centers_inside(nearby, repeated)
    claims = iou.new_full((len(boxes), len(usable)), -1.0)
    claims.scatter_(1, candidates, torch.where(positive, iou, -1.0))
    best, index = claims.max(dim=0)
    return torch.where(best >= 0, index, -1)


def nearest_anchors(anchors: Sequence[Boxes], usable: Tensor, boxes: Boxes, topk: int) -> List[Tensor]:
    """Finds each box's nearest anchors: indices into all anchors (M, C), and whether they are usable (M, C) bool."""
    per_level, start = [], 0
    for level in anchors:
        distances = torch.cdist(
            boxes.get_centers().float(), level.get_centers().float(), compute_mode="donot_use_mm_for_euclid_dist"
        )
        distances = distances.masked_fill(~usable[start : start + len(level)], torch.inf)
        values, index = distances.topk(min(topk, len(level)), dim=1, largest=False)
        per_level.append((index + start, values.isfinite()))
        start += len(level)
    return [torch.cat(parts, dim=1) for parts in zip(*per_level)]


def iou_thresholds(iou: Tensor, is_candidate: Tensor) -> Tensor:
    """Computes mean + unbiased standard deviation of the candidates in each row, (M, 1).

    The standard deviation of a single value counts as 0.
    """
    count = is_candidate.sum(1, keepdim=True)
    mean = (iou * is_candidate).sum(1, keepdim=True) / count.clamp(min=1)
    squares = ((iou - mean) * is_candidate).square().sum(1, keepdim=True)
    return mean + (squares / (count - 1).clamp(min=1)).sqrt()


def _centers_inside(anchors: Tensor, boxes: Tensor) -> Tensor:
    """Returns whether the centers of anchors (..., 4) lie inside boxes (..., 4)."""
    centers = (anchors[..., :2] + anchors[..., 2:]) / 2
    sides = torch.cat([centers - boxes[..., :2], boxes[..., 2:] - centers], dim=-1)
    return sides.amin(-1) > MIN_INSIDE


def starts_in_image(anchors: Boxes, image_size: Sequence[int], divisor: int) -> Tensor:
    """Returns which anchors belong to an image, not to the padding caused by larger images in the batch.

    An image's own shape is its size rounded up to a multiple of the backbone's size divisibility. An anchor belongs to
    the image if the top left corner of its cell lies inside that shape; for anchors with offset 0 this corner is the
    anchor's center.

    Args:
        anchors: (R, 4), with offset 0.
        image_size: height and width in pixels.
        divisor: the size divisibility; 0 and 1 mean none.

    Returns:
        (R,) bool.
    """
    divisor = max(divisor, 1)
    height, width = (-(-side // divisor) * divisor for side in image_size)
    x, y = anchors.get_centers().unbind(1)
    return (x < width) & (y < height)
