"""LD: Localization Distillation for Dense Object Detection, arXiv 2102.12252 and 2204.05957.

For heads that predict each side of a box as a distribution over distances (GFL): the student's distributions imitate
the teacher's, where an anchor is positive (the main region, equation 6 of 2102.12252) and, as options, in the valuable
localization region around the boxes (section 3.3), and the classes are distilled where an anchor is positive.

With its defaults the method is mmdetection's LD; ``vlr_weight=0.25, cls_weight=10.0`` is the authors' own full one. Of
the class loss in the region's rest their code has the name only: its value is always 0.

As in both, the main loss is a sum, weighed by the student's own highest class score and not divided by the number of
positives, so it grows with the number of boxes, and with the images of a worker: see ``per_image``. Deviations from the
authors' code: images without ground truth give 0, where theirs raises; the positives that the class loss is divided by
are averaged over workers; and ``true_diou`` defines the region as the paper does. Their comparison of regions for
imitation, which is :class:`FitNet` here, gives 0 on a level without positive anchors even if its region has places in
it; here these places count.
"""

from typing import Dict, List, Sequence

import torch
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, pairwise_ioa, pairwise_iou
from torch import Tensor

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
        vlr_weight: weight of the loss in the valuable localization region; 0 leaves it out, published is 0.25.
        cls_weight: weight of the class loss; 0 leaves it out, published is 10.
        cls_temperature: softens the classes' distributions, > 0.
        vlr_topk: candidates per level and box from which ATSS takes the threshold that bounds the region.
        vlr_gamma: the region's lower bound in parts of that threshold, 0 to 1.
        true_diou: bound the region by the DIoU of anchor and box, as the paper says. The authors' code puts the
            intersection over the anchor's area in place of the IoU there, and so were the published numbers measured.
        per_image: divide the losses of both regions by the worker's number of images, which makes them independent of
            the batch and of the number of workers. The published 0.25 was for sums over 2 images: 0.5 per image is the
            same there.
    """

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

    def setup(self, student: DenseDetector, teacher: DenseDetector, channels: Channels) -> None:
        own, theirs = (getattr(detector.box2box_transform, "reg_max", None) for detector in (student, teacher))
        if own is None or own != theirs:
            raise D2kdError(
                f"LD needs heads that predict distributions of distances of the same reg_max, but the student has "
                f"{own} and the teacher {theirs}; use GFL for both"
            )

    def forward(self, student: DenseOutputs, teacher: DenseOutputs, targets: Targets) -> Dict[str, Tensor]:
        confidence = student.logits.detach().sigmoid().amax(-1) * targets.positive
        losses = {"loss_ld_main": self.weight * self._box_loss(student, teacher, confidence)}
        if self.vlr_weight:
            region = self.region(student, targets)
            losses["loss_ld_vlr"] = self.vlr_weight * self._box_loss(student, teacher, region) / VLR_DIVISOR
        if self.cls_weight:
            losses["loss_ld_cls"] = self.cls_weight * self._cls_loss(student, teacher, targets.positive)
        return losses

    def region(self, student: DenseOutputs, targets: Targets) -> Tensor:
        """Weights of the valuable localization region of each image, (N, R)."""
        return torch.stack(
            [
                valuable_region(
                    student.anchors_per_level, usable, image.gt_boxes, self.vlr_topk, self.vlr_gamma, self.true_diou
                )
                for image, usable in zip(targets.instances, targets.weights > 0)
            ]
        )

    def _box_loss(self, student: DenseOutputs, teacher: DenseOutputs, weights: Tensor) -> Tensor:
        used, num_bins = weights > 0, student.detector.box2box_transform.reg_max + 1
        own, theirs = (outputs.box_predictions[used] for outputs in (student, teacher))
        loss = ld_loss(own, theirs, weights[used], num_bins, self.temperature)
        return loss / len(weights) if self.per_image else loss

    def _cls_loss(self, student: DenseOutputs, teacher: DenseOutputs, positive: Tensor) -> Tensor:
        """Mean over classes and over the positives of each level, summed over levels."""
        sizes = [len(level) for level in student.anchors_per_level]
        sums: List[Tensor] = []
        for own, theirs, used in zip(
            *(x.split(sizes, dim=1) for x in (student.shared_logits, teacher.shared_logits, positive))
        ):
            loss = kl_divergence_loss(own[used], theirs[used], self.cls_temperature) / max(own.shape[-1], 1)
            sums.append(loss.sum())
        counts = torch.stack([level.sum() for level in positive.split(sizes, dim=1)]).float()
        return (torch.stack(sums) / at_least_one(mean_over_workers(counts))).sum()


def ld_loss(
    predictions: Tensor, teacher_predictions: Tensor, weights: Tensor, num_bins: int, temperature: float
) -> Tensor:
    """Weighted sum over anchors of the KL divergence of their sides' distributions, mean over sides and bins.

    Args:
        predictions: logits of the student, (P, 4*num_bins).
        teacher_predictions: likewise; gets no gradient.
        weights: (P,).
        num_bins: distances per side.
        temperature: softens both, > 0; the loss is multiplied by its square.

    Returns:
        (), float32; 0 with gradient if P is 0.
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
    """The valuable localization region of one image: anchors near a box, but too far to be positive.

    An anchor belongs to it if its DIoU with a box lies between ``gamma`` times ATSS's IoU threshold of that box and the
    threshold itself.

    Args:
        anchors_per_level: per level (Ri, 4).
        usable: (R,) bool over all levels; other anchors are neither candidates nor in the region.
        gt_boxes: (M, 4).
        topk: ATSS's candidates per level.
        gamma: 0 to 1.
        true_diou: see :class:`LD`.

    Returns:
        (R,) weight: highest IoU with a box in whose region the anchor lies, 0 outside; float32.
    """
    anchors = Boxes.cat(list(anchors_per_level))
    if len(gt_boxes) == 0:
        return torch.zeros_like(anchors.tensor[:, 0])
    iou = pairwise_iou(gt_boxes, anchors)  # (M, R)
    candidates, taken = nearest_anchors(anchors_per_level, usable, gt_boxes, topk)
    threshold = iou_thresholds(iou.gather(1, candidates), taken)
    overlap = iou if true_diou else pairwise_ioa(gt_boxes, anchors)
    diou = overlap - centre_distances(gt_boxes, anchors)
    inside = (diou >= gamma * threshold) & (diou <= threshold) & usable
    return (iou * inside).amax(0)


def centre_distances(boxes: Boxes, others: Boxes) -> Tensor:
    """Squared distance of centres over the squared diagonal of the smallest box around both (arXiv 1911.08287).

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
