"""Imitation regions: the locations on the FPN levels where a student should imitate the teacher's features.

They are the ones that LD's authors compare (arXiv 2102.12252). A region is a mask over anchors. A location belongs to
it if any of its anchors does, which matters for RetinaNet with its 9 anchors per location.
"""

from typing import List

import torch
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor
from torchvision.ops import nms

from ..dense import DenseOutputs, Targets
from ..modeling.atss_assign import MIN_INSIDE

# Anchors are near a box if their IoU exceeds this fraction of the best IoU with it (arXiv 1906.03609).
NEAR = 0.5
# The maximum number of general instances, and the IoU above which two of them are the same (arXiv 2103.02340).
MAX_INSTANCES, SAME_INSTANCE = 10, 0.3
# The memory of NMS grows with the square of the number of boxes. Candidates beyond this rank are rarely in the top ten.
MAX_CANDIDATES = 3000


def box_region(student: DenseOutputs, targets: Targets) -> Tensor:
    """Finds anchors whose center lies inside a ground-truth box: the region of LD's "fitnet" and "decouple".

    Returns:
        (N, R) bool.
    """
    return torch.stack([centers_inside(student.anchors, image.gt_boxes) for image in targets.instances])


def centers_inside(anchors: Tensor, boxes: Boxes) -> Tensor:
    """Returns whether the center of each anchor (R, 4) lies inside any of the boxes, (R,) bool."""
    x, y = Boxes(anchors).get_centers().unbind(1)
    left, top, right, bottom = boxes.tensor[:, :, None].unbind(1)  # each (M, 1)
    sides = (x - left, y - top, right - x, bottom - y)
    return torch.stack([side > MIN_INSIDE for side in sides]).all(0).any(0)


def near_region(student: DenseOutputs, targets: Targets) -> Tensor:
    """Finds anchors near a ground-truth box: "finegrained", arXiv 1906.03609, section 3.2.

    An anchor is near a box if their IoU is more than half of the largest IoU of any anchor of the image with that box.
    Anchors in padding are left out.

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
    """Finds general instances: anchors that teacher and student score most differently ("gibox", arXiv 2103.02340).

    Args:
        student: the student's outputs, including predictions.
        teacher: the teacher's outputs, including predictions.
        targets: mark the anchors that lie in padding, which are left out.
        whole_batch: select from each level of the whole batch, as LD's authors do, instead of each level of each image.
            Boxes of different images then suppress each other, and predictions in padding are included, with boxes
            around the corner of the image.

    Returns:
        (N, R) bool; all False if student and teacher share no class.
    """
    # Not under no_grad: the student's decoded boxes are cached, and other methods need their gradient.
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
    """Selects from ``images`` images of one level at a time; inputs are (N, Ri, ...), the result is (N, Ri) bool."""
    groups = zip(*(x.split(images) for x in level))
    return torch.cat([general_instances(*(x.flatten(0, 1) for x in group)).view_as(group[-1]) for group in groups])


def general_instances(own_scores: Tensor, scores: Tensor, own_boxes: Tensor, boxes: Tensor, excluded: Tensor) -> Tensor:
    """Selects general instances, arXiv 2103.02340, section 3.1.

    Anchors are ranked by the largest difference between the teacher's and the student's score over the classes. The box
    of an anchor is the one of whichever model scores that class higher. NMS keeps the best of overlapping boxes.

    Args:
        own_scores: the student's scores, (M, S), 0 to 1.
        scores: the teacher's scores, (M, S), 0 to 1.
        own_boxes: the student's boxes, (M, 4) XYXY.
        boxes: the teacher's boxes, (M, 4) XYXY.
        excluded: (M,) bool; these anchors are never selected.

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
    """Returns which anchors lie in padding, (N, R) bool: those with weight 0 that are not labeled as ignored."""
    return (targets.weights == 0) & (targets.labels >= 0)


def to_locations(region: Tensor, student: DenseOutputs) -> List[Tensor]:
    """Converts a mask over anchors (N, R) to masks over locations, per level (N, Hi, Wi) bool."""
    parts = region.split([len(level) for level in student.anchors_per_level], dim=1)
    return [part.reshape(len(part), *level.shape[-2:], -1).any(-1) for part, level in zip(parts, student.features)]
