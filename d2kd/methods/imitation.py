"""Imitation regions: at which places of the FPN levels a student should imitate the teacher's features.

They are those that LD's authors compare (arXiv 2102.12252). A region is a mask over anchors; a place belongs to it if
any of its anchors does, which matters for RetinaNet, with 9 of them per place.
"""

from typing import List

import torch
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor
from torchvision.ops import nms

from ..dense import DenseOutputs, Targets
from ..modeling.atss_assign import MIN_INSIDE

# Anchors of more than this share of the best IoU with a box are near it (arXiv 1906.03609).
NEAR = 0.5
# How many general instances are chosen, and above which IoU two count as the same (arXiv 2103.02340).
MAX_INSTANCES, SAME_INSTANCE = 10, 0.3
# NMS takes memory with the square of its boxes; general instances beyond this rank are rarely among the best ten.
MAX_CANDIDATES = 3000


def box_region(student: DenseOutputs, targets: Targets) -> Tensor:
    """Anchors whose centres lie inside a ground-truth box: the region of LD's "fitnet" and "decouple".

    Returns:
        (N, R) bool.
    """
    return torch.stack([centres_inside(student.anchors, image.gt_boxes) for image in targets.instances])


def centres_inside(anchors: Tensor, boxes: Boxes) -> Tensor:
    """Tells which anchors (R, 4) have their centre inside one of the boxes, (R,) bool."""
    x, y = Boxes(anchors).get_centers().unbind(1)
    left, top, right, bottom = boxes.tensor[:, :, None].unbind(1)  # each (M, 1)
    sides = (x - left, y - top, right - x, bottom - y)
    return torch.stack([side > MIN_INSIDE for side in sides]).all(0).any(0)


def near_region(student: DenseOutputs, targets: Targets) -> Tensor:
    """Anchors near a ground-truth box: "finegrained", arXiv 1906.03609, section 3.2.

    Near are those whose IoU with the box is more than half of the largest that any anchor of the image has with it.
    Anchors in padding take no part.

    Returns:
        (N, R) bool.
    """
    regions = []
    for image, padding in zip(targets.instances, in_padding(targets)):
        iou = pairwise_iou(image.gt_boxes, Boxes(student.anchors)) * ~padding
        regions.append((iou > NEAR * iou.amax(1, keepdim=True)).any(0))
    return torch.stack(regions)


def instance_region(
    student: DenseOutputs, teacher: DenseOutputs, targets: Targets, whole_batch: bool = False
) -> Tensor:
    """The general instances: the anchors that teacher and student score most differently ("gibox", arXiv 2103.02340).

    Args:
        student: with predictions.
        teacher: likewise.
        targets: tell which anchors lie in padding; these take no part.
        whole_batch: choose from each level of the whole batch, as LD's authors do, instead of each level of each image.
            Boxes of different images suppress each other then, and predictions in padding take part with boxes around
            the image's corner.

    Returns:
        (N, R) bool; nothing where student and teacher share no class.
    """
    # Outside of no_grad: the student's boxes are kept, and other methods need their gradient.
    own_boxes, boxes = student.boxes.detach(), teacher.boxes
    own_scores, scores = student.shared_logits.detach().sigmoid(), teacher.shared_logits.sigmoid()
    padding = in_padding(targets)
    if whole_batch:
        corner = Boxes(student.anchors).get_centers().repeat(1, 2) * padding[..., None]
        own_boxes, boxes, padding = own_boxes - corner, boxes - corner, torch.zeros_like(padding)
    everything = (own_scores, scores, own_boxes, boxes, padding)
    levels = zip(*(x.split([len(level) for level in student.anchors_per_level], dim=1) for x in everything))
    group = 1 if not whole_batch else len(padding)
    return torch.cat([_choose_by_group(group, *level) for level in levels], dim=1)


def _choose_by_group(images: int, *level: Tensor) -> Tensor:
    """Chooses from so many images of a level at a time; fields (N, Ri, ...), result (N, Ri) bool."""
    groups = zip(*(x.split(images) for x in level))
    return torch.cat([general_instances(*(x.flatten(0, 1) for x in group)).view_as(group[-1]) for group in groups])


def general_instances(own_scores: Tensor, scores: Tensor, own_boxes: Tensor, boxes: Tensor, excluded: Tensor) -> Tensor:
    """Chooses general instances, arXiv 2103.02340, section 3.1.

    An anchor's rank is the largest difference of the teacher's and the student's score over the classes, its box that
    of whoever scores that class higher. NMS leaves the best of those that overlap.

    Args:
        own_scores: of the student, (M, S), 0 to 1.
        scores: of the teacher, likewise.
        own_boxes: of the student, (M, 4) XYXY.
        boxes: of the teacher, likewise.
        excluded: (M,) bool; not to be chosen.

    Returns:
        (M,) bool, True at most :data:`MAX_INSTANCES` times.
    """
    chosen = torch.zeros_like(excluded)
    if own_scores.shape[1] == 0:
        return chosen
    difference = scores - own_scores
    rank, label = difference.abs().max(dim=1)
    higher = torch.where(difference.gather(1, label[:, None]) > 0, boxes, own_boxes)
    rank, candidates = rank.masked_fill(excluded, -1).topk(min(len(rank), MAX_CANDIDATES))
    best = candidates[nms(higher[candidates], rank, SAME_INSTANCE)[:MAX_INSTANCES]]
    chosen[best] = ~excluded[best]
    return chosen


def in_padding(targets: Targets) -> Tensor:
    """Anchors in padding beyond their image, (N, R) bool: those that weigh nothing though they are not ignored."""
    return (targets.weights == 0) & (targets.labels >= 0)


def to_places(region: Tensor, student: DenseOutputs) -> List[Tensor]:
    """Turns a mask over anchors (N, R) into one over places per level, (N, Hi, Wi) bool."""
    parts = region.split([len(level) for level in student.anchors_per_level], dim=1)
    return [part.reshape(len(part), *level.shape[-2:], -1).any(-1) for part, level in zip(parts, student.features)]
