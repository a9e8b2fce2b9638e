"""LD: Localization Distillation for Dense Object Detection, arXiv 2102.12252 and 2204.05957.

For heads that predict each side of a box as a distribution over distances (GFL). The student's distributions imitate
the teacher's where an anchor is positive (the main region, equation 6 of 2102.12252) and, optionally, in the valuable
localization region around the boxes (section 3.3). Another option distills the classes of positive anchors.

The defaults are mmdetection's LD; ``vlr_weight=0.25, cls_weight=10.0`` is the full version of the authors. Their code
also names a class loss outside of the main region, but its value is always 0.

As in both, the main loss is a sum, weighted by the student's own highest class score and not divided by the number of
positives, so it grows with the number of boxes and with the number of images per worker: see ``per_image``. Deviations
from the authors' code: images without ground truth give 0, where theirs raises an error; the number of positives that
the class loss is divided by is averaged over workers; and ``true_diou`` defines the region as the paper does.
"""

from typing import ClassVar, Dict, List, Sequence

import torch
from detectron2.structures import Boxes, pairwise_ioa, pairwise_iou
from torch import Tensor

from ..contract import Dense
from ..dense import DenseOutputs, Targets
from ..errors import D2kdError
from ..losses import kl_divergence_loss
from ..modeling.atss_assign import iou_thresholds, nearest_anchors
from ..workers import at_least_one, mean_over_workers
from .base import METHOD_REGISTRY, Channels, Method

# The authors divide the sum over an anchor's sides by 4 in the main region and by 16 in the valuable one.
VLR_DIVISOR = 4.0


@METHOD_REGISTRY.register()
class LD(Method):
    """Localization distillation.

    Args:
        weight: weight of the loss in the main region.
        temperature: softens the distances' distributions, > 0.
        vlr_weight: weight of the loss in the valuable localization region; 0 disables it, the published value is 0.25.
        cls_weight: weight of the class loss; 0 disables it, the published value is 10.
        cls_temperature: softens the classes' distributions, > 0.
        vlr_topk: number of candidates per level and box from which ATSS computes the threshold that bounds the region.
        vlr_gamma: the lower bound of the region as a fraction of that threshold, 0 to 1.
        true_diou: bound the region by the DIoU of anchor and box, as the paper says. The authors' code uses the
            intersection over the anchor's area in place of the IoU, and the published numbers were measured that way.
        per_image: divide the losses of both regions by the number of images of the worker, which makes them independent
            of the batch size and of the number of workers. The published weight of 0.25 is for sums over 2 images; the
            equivalent per image is 0.5.
    """

    reads_maps: ClassVar[bool] = False

    def __init__(
        self,
        weight: float = 0.25,
        temperature: float = 10.0,
        vlr_weight: float = 0.0,
        cls_weight: float = 0.0,
        cls_temperature: float = 2.0,
        vlr_topk: int = 9,
        vlr_gamma: float = 0.25,
        true_diou: bool = False,
        per_image: bool = False,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.temperature = temperature
        self.vlr_weight = vlr_weight
        self.cls_weight = cls_weight
        self.cls_temperature = cls_temperature
        self.vlr_topk = vlr_topk
        self.vlr_gamma = vlr_gamma
        self.true_diou = true_diou
        self.per_image = per_image

    def setup(self, student: Dense, teacher: Dense, channels: Channels) -> None:
        own, theirs = (getattr(detector.box2box_transform, "reg_max", None) for detector in (student, teacher))
        if own is None or own != theirs:
            raise D2kdError(
                f"LD needs heads that predict distributions of distances with the same reg_max, but the student has "
                f"{own} and the teacher {theirs}; use GFL for both"
            )

    def forward(self, student: DenseOutputs, teacher: DenseOutputs, targets: Targets) -> Dict[str, Tensor]:
        confidence = student.best_scores * targets.positive
        losses = {"loss_ld_main": self.weight * self._box_loss(student, teacher, confidence)}
        if self.vlr_weight:
            region = self.region(student, targets)
            losses["loss_ld_vlr"] = self.vlr_weight * self._box_loss(student, teacher, region) / VLR_DIVISOR
        if self.cls_weight:
            losses["loss_ld_cls"] = self.cls_weight * self._cls_loss(student, teacher, targets.positive)
        return losses

    def region(self, student: DenseOutputs, targets: Targets) -> Tensor:
        """Returns the weights of the valuable localization region of each image, (N, R)."""
        return torch.stack(
            [
                valuable_region(
                    student.anchors_per_level, usable, image.gt_boxes, self.vlr_topk, self.vlr_gamma, self.true_diou
                )
                for image, usable in zip(targets.instances, targets.weights > 0)
            ]
        )

    def _box_loss(self, student: DenseOutputs, teacher: DenseOutputs, weights: Tensor) -> Tensor:
        num_bins = student.num_bins
        assert num_bins is not None  # see setup
        loss = ld_loss(student.box_predictions, teacher.box_predictions, weights, num_bins, self.temperature)
        return loss / len(weights) if self.per_image else loss

    def _cls_loss(self, student: DenseOutputs, teacher: DenseOutputs, positive: Tensor) -> Tensor:
        """Returns the class loss: the mean over classes and over the positives of each level, summed over levels."""
        sizes = [len(level) for level in student.anchors_per_level]
        sums: List[Tensor] = []
        for own, theirs, used in zip(
            *(x.split(sizes, dim=1) for x in (student.shared_logits, teacher.shared_logits, positive))
        ):
            loss = kl_divergence_loss(own, theirs, self.cls_temperature) / max(own.shape[-1], 1)
            sums.append((loss * used).sum())
        counts = torch.stack([level.sum() for level in positive.split(sizes, dim=1)]).float()
        return (torch.stack(sums) / at_least_one(mean_over_workers(counts))).sum()


def ld_loss(
    predictions: Tensor, teacher_predictions: Tensor, weights: Tensor, num_bins: int, temperature: float
) -> Tensor:
    """Computes the KL divergence of the sides' distributions, averaged over sides and bins and summed over anchors.

    Args:
        predictions: logits of the student, (..., 4*num_bins).
        teacher_predictions: logits of the teacher, (..., 4*num_bins); get no gradient.
        weights: weight of each anchor, (...).
        num_bins: number of distances per side.
        temperature: softens both distributions, > 0; the loss is multiplied by its square.

    Returns:
        (), float32; without anchors of weight, a 0 that is still connected to the graph.
    """
    own, theirs = (x.unflatten(-1, (4, num_bins)) for x in (predictions, teacher_predictions))
    divergence = kl_divergence_loss(own, theirs, temperature).mean(-1) / num_bins
    return (divergence * weights).sum()


@torch.no_grad()
def valuable_region(
    anchors_per_level: Sequence[Boxes],
    usable: Tensor,
    gt_boxes: Boxes,
    topk: int = 9,
    gamma: float = 0.25,
    true_diou: bool = False,
) -> Tensor:
    """Computes the valuable localization region of one image: anchors near a box, but too far away to be positive.

    An anchor belongs to the region of a box if their DIoU lies between ``gamma`` times ATSS's IoU threshold of that box
    and the threshold itself.

    Args:
        anchors_per_level: per level (Ri, 4).
        usable: (R,) bool over all levels; other anchors are neither candidates nor in the region.
        gt_boxes: (M, 4).
        topk: number of ATSS candidates per level.
        gamma: see ``vlr_gamma`` of :class:`LD`, 0 to 1.
        true_diou: see :class:`LD`.

    Returns:
        (R,) float32 weights: the highest IoU with a box whose region contains the anchor, 0 outside of all regions.
    """
    anchors = Boxes.cat(list(anchors_per_level))
    if len(gt_boxes) == 0:
        return torch.zeros_like(anchors.tensor[:, 0])
    iou = pairwise_iou(gt_boxes, anchors)  # (M, R)
    candidates, is_candidate = nearest_anchors(anchors_per_level, usable, gt_boxes, topk)
    threshold = iou_thresholds(iou.gather(1, candidates), is_candidate)
    overlap = iou if true_diou else pairwise_ioa(gt_boxes, anchors)
    diou = overlap - center_distances(gt_boxes, anchors)
    inside = (diou >= gamma * threshold) & (diou <= threshold) & usable
    return (iou * inside).amax(0)


def center_distances(boxes: Boxes, others: Boxes) -> Tensor:
    """Computes squared center distances over the squared diagonal of the smallest enclosing box (arXiv 1911.08287).

    Args:
        boxes: (M, 4).
        others: (R, 4).

    Returns:
        (M, R), 0 to 1.
    """
    first, second = boxes.tensor[:, None], others.tensor[None]
    diagonal = torch.maximum(first[..., 2:], second[..., 2:]) - torch.minimum(first[..., :2], second[..., :2])
    distance = boxes.get_centers()[:, None] - others.get_centers()[None]
    return distance.square().sum(-1) / diagonal.square().sum(-1).clamp(min=1e-6)
