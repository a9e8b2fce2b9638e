"""Response distillation: the student's own predictions imitate the teacher's.

The losses are those of CrossKD (arXiv 2306.11369, section 3). CrossKD applies them to the predictions of the cross
head; here they apply to the student's own, as in Hinton et al. (arXiv 1503.02531) for classes. This is the control
experiment for CrossKD. There are no published numbers for these settings.
"""

from typing import ClassVar, Dict

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dense import DenseOutputs, Targets
from ..errors import check_choice
from ..level_losses import kd_quality_focal_sum
from ..losses import BOX_LOSSES, centerness_targets, kl_divergence_loss
from ..workers import mean_over_workers, num_workers
from .base import METHOD_REGISTRY, Method

NORMALIZERS = ("positives", "centerness")


@METHOD_REGISTRY.register()
class ResponseKD(Method):
    """Distillation of class, box and centerness predictions.

    If both models predict box distributions with the same bins (GFL), these are compared, otherwise decoded boxes.

    Args:
        cls_weight: weight of the class loss.
        box_weight: weight of the box loss.
        centerness_weight: weight of the centerness loss, used if both models predict it; 0 disables it.
        beta: focusing exponent of the class loss, >= 0.
        box_loss: loss of decoded boxes, "giou" or "iou_log" (-log IoU).
        normalizer: what class and box losses are divided by: "positives" (N+), or "centerness", the sum of the
            centerness targets of the positives.
        mask_padding: leave out anchors that lie in padding or are ignored.
    """

    reads_maps: ClassVar[bool] = False

    def __init__(
        self,
        cls_weight: float = 1.0,
        box_weight: float = 1.0,
        centerness_weight: float = 1.0,
        beta: float = 1.0,
        box_loss: str = "giou",
        normalizer: str = "positives",
        mask_padding: bool = True,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_choice(f"{name}'s box_loss", box_loss, BOX_LOSSES)
        check_choice(f"{name}'s normalizer", normalizer, NORMALIZERS)
        self.prefix = f"loss_{name.lower()}"
        self.cls_weight = cls_weight
        self.box_weight = box_weight
        self.centerness_weight = centerness_weight
        self.beta = beta
        self.box_loss = BOX_LOSSES[box_loss]
        self.normalizer = normalizer
        self.mask_padding = mask_padding

    def imitating_outputs(self, student: DenseOutputs, teacher: DenseOutputs) -> DenseOutputs:
        """Returns the outputs that imitate the teacher's."""
        return student

    def forward(self, student: DenseOutputs, teacher: DenseOutputs, targets: Targets) -> Dict[str, Tensor]:
        ours = self.imitating_outputs(student, teacher)
        weights = targets.weights if self.mask_padding else torch.ones_like(targets.weights)
        normalizer = targets.num_pos if self.normalizer == "positives" else centerness_sum(student, targets)
        confidence = teacher.best_scores * weights
        losses = {
            f"{self.prefix}_cls": self.cls_weight * self._cls_loss(ours, teacher, weights) / normalizer,
            f"{self.prefix}_box": self.box_weight * self._box_loss(ours, teacher, confidence, normalizer),
        }
        if self.centerness_weight and ours.centerness is not None and teacher.centerness is not None:
            loss = centerness_loss(ours.centerness, teacher.centerness, targets)
            losses[f"{self.prefix}_centerness"] = self.centerness_weight * loss
        return losses

    def _cls_loss(self, ours: DenseOutputs, teacher: DenseOutputs, weights: Tensor) -> Tensor:
        levels = zip(ours.shared_logit_maps, teacher.shared_logit_maps, teacher.to_maps(weights))
        return torch.stack([kd_quality_focal_sum(*level, self.beta) for level in levels]).sum()

    def _box_loss(self, ours: DenseOutputs, teacher: DenseOutputs, confidence: Tensor, normalizer: Tensor) -> Tensor:
        if ours.num_bins is None or ours.num_bins != teacher.num_bins:
            return (self.box_loss(ours.boxes, teacher.boxes) * confidence).sum() / normalizer
        sides = [o.box_predictions.unflatten(-1, (4, o.num_bins)) for o in (ours, teacher)]
        total = mean_over_workers(confidence.sum()).clamp(min=torch.finfo(torch.float32).tiny)
        return (kl_divergence_loss(*sides).mean(-1) * confidence).sum() / total


def centerness_loss(logits: Tensor, teacher_logits: Tensor, targets: Targets) -> Tensor:
    """Computes the binary cross entropy of centerness (N, R) with the teacher's, summed over positives, over N+; ()."""
    loss = F.binary_cross_entropy_with_logits(logits, teacher_logits.sigmoid(), reduction="none")
    return (loss * targets.positive).sum() / targets.num_pos


def centerness_sum(student: DenseOutputs, targets: Targets) -> Tensor:
    """Sums the centerness targets of the positives (FCOS, arXiv 1904.01355).

    Returns:
        (), averaged over workers; if it is 0, one over the number of workers.
    """
    centerness = centerness_targets(student.anchors, targets.boxes)
    total = mean_over_workers((centerness * targets.positive).sum())
    return torch.where(total > 0, total, 1 / num_workers())
