"""CrossKD: Cross-Head Knowledge Distillation for Object Detection, arXiv 2306.11369.

The student's features at a cut of its towers go on through the rest of the teacher's head; these cross-head
predictions, not the student's own, imitate the teacher's (equations 4 and 5). So the student's head behind the cut is
free to follow the ground truth.

Published settings (cut 3 where not said otherwise):

=========  ===============================================================================================
RetinaNet  the defaults
GFL        box_weight 4
ATSS       the defaults, with the centerness loss
FCOS       cut 2, cls_weight 0.4, box_weight 0.75, box_loss "iou_log", normalizer "centerness",
           centerness_weight 0, mask_padding False
=========  ===============================================================================================

Deviations from the authors' code, all off the path of a usual batch:

- Normalisers are averaged over workers; theirs partly are each worker's own.
- Without ground truth the normaliser "centerness" is 1 instead of 1e-6, which made losses of 1e8; where all the
  teacher's scores are 0, the loss of box distributions is 0 instead of NaN.
- A level with a single value per channel (N*H*W = 1) has no unbiased deviation: theirs gives NaN, here it counts as 0.
- RetinaNet's anchors are labelled before those in padding are masked; theirs masks first.
"""

from typing import Dict, List, Sequence, Tuple

import torch
import torch.nn.functional as F
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from torch import Tensor, nn

from ..dense import TOWERS, Cut, DenseOutputs, Targets, cross_head, level_channels, mean_over_workers, split_tower
from ..errors import D2kdError, nearest
from ..losses import giou_loss, iou_log_loss, kd_quality_focal_loss, kl_divergence_loss
from .base import METHOD_REGISTRY, Method, channel_statistics

BOX_LOSSES = {"giou": giou_loss, "iou_log": iou_log_loss}
NORMALIZERS = ("positives", "centerness")


@METHOD_REGISTRY.register()
class CrossKD(Method):
    """Cross-head distillation of classes, boxes and centerness.

    A teacher with box distributions (GFL) teaches its distributions, others their decoded boxes.

    Args:
        cut: convolutions of the student's towers before its features change over to the teacher's head; 0 crosses
            at the FPN feature. The published setting for heads of 4 convolutions is 3.
        cls_weight: weight of the class loss.
        box_weight: weight of the box loss.
        centerness_weight: weight of the centerness loss, for teachers that predict it; 0 leaves it out.
        beta: focusing exponent of the class loss, >= 0.
        box_loss: of decoded boxes, "giou" or "iou_log" (-log IoU).
        normalizer: what class and box losses are divided by: "positives" (N+), or "centerness", the sum of the
            positives' centerness targets.
        mask_padding: leave out anchors in padding and ignored ones.
        pre_activation: take the feature before the activation that follows the cut (the paper's wording) instead of
            after it (the authors' in-place activations make it so, and so were the published numbers measured).
        sync: align with the statistics of all workers' images instead of each worker's own, so that a run does not
            depend on the number of workers.
    """

    def __init__(
        self,
        cut: int = 3,
        cls_weight: float = 1.0,
        box_weight: float = 1.0,
        centerness_weight: float = 1.0,
        beta: float = 1.0,
        box_loss: str = "giou",
        normalizer: str = "positives",
        mask_padding: bool = True,
        pre_activation: bool = False,
        sync: bool = False,
    ) -> None:
        super().__init__()
        check_choice("box_loss", box_loss, list(BOX_LOSSES))
        check_choice("normalizer", normalizer, NORMALIZERS)
        self.cut = Cut(cut, pre_activation)
        self.cls_weight = cls_weight
        self.box_weight = box_weight
        self.centerness_weight = centerness_weight
        self.beta = beta
        self.box_loss = BOX_LOSSES[box_loss]
        self.normalizer = normalizer
        self.mask_padding = mask_padding
        self.sync = sync

    @property
    def cuts(self) -> Sequence[Cut]:
        return (self.cut,)

    def setup(self, student: DenseDetector, teacher: DenseDetector) -> None:
        given, wanted = (tower_channels(detector, self.cut) for detector in (student, teacher))
        if given != wanted:
            raise D2kdError(
                f"CrossKD at cut {self.cut.convs}: the student's towers have {given} channels (class, box) there and "
                f"the teacher's {wanted}; use a student with equal FPN.OUT_CHANNELS and head width"
            )

    def forward(self, student: DenseOutputs, teacher: DenseOutputs, targets: Targets) -> Dict[str, Tensor]:
        crossed = self.cross(student, teacher)
        weights = targets.weights if self.mask_padding else torch.ones_like(targets.weights)
        normalizer = targets.num_pos if self.normalizer == "positives" else centerness_sum(student, targets)
        cls_loss = kd_quality_focal_loss(crossed.logits, teacher.logits, self.beta).sum(-1)
        confidence = teacher.logits.amax(-1).sigmoid() * weights
        losses = {
            "loss_crosskd_cls": self.cls_weight * (cls_loss * weights).sum() / normalizer,
            "loss_crosskd_box": self.box_weight * self._box_loss(crossed, teacher, confidence, normalizer),
        }
        if self.centerness_weight and teacher.centerness is not None:
            losses["loss_crosskd_centerness"] = self.centerness_weight * centerness_loss(crossed, teacher, targets)
        return losses

    def _box_loss(self, crossed: DenseOutputs, teacher: DenseOutputs, confidence: Tensor, normalizer: Tensor) -> Tensor:
        if teacher.num_bins is None:
            return (self.box_loss(crossed.boxes, teacher.boxes) * confidence).sum() / normalizer
        sides = [o.box_predictions.unflatten(-1, (4, o.num_bins)) for o in (crossed, teacher)]
        total = mean_over_workers(confidence.sum()).clamp(min=torch.finfo(torch.float32).tiny)
        return (kl_divergence_loss(*sides).mean(-1) * confidence).sum() / total

    def cross(self, student: DenseOutputs, teacher: DenseOutputs) -> DenseOutputs:
        """Returns the teacher head's outputs on the student's aligned tower features."""
        aligned = [self.align(own, theirs) for own, theirs in zip(student.towers(self.cut), teacher.towers(self.cut))]
        predictions = cross_head(teacher.detector.head, self.cut, *aligned)
        return DenseOutputs(teacher.detector, teacher.features, predictions)

    def align(self, student: List[Tensor], teacher: List[Tensor]) -> List[Tensor]:
        """Aligns each level, and activates the result unless it is an FPN feature."""
        aligned = [align_scale(s, t, self.sync) for s, t in zip(student, teacher)]
        return [level.relu() for level in aligned] if self.cut.convs > 0 else aligned


def check_choice(option: str, value: str, known: Sequence[str]) -> None:
    """Raises D2kdError unless an option's value is one of the known ones."""
    if value not in known:
        raise D2kdError(f"CrossKD: {option} {value!r} is none of {', '.join(known)}{nearest(value, known)}")


def align_scale(student: Tensor, teacher: Tensor, sync: bool = False) -> Tensor:
    """Shifts and scales each channel of the student's feature to the teacher's mean and deviation.

    Args:
        student: (N, C, H, W); the gradient flows through its statistics too.
        teacher: (N, C, H, W).
        sync: see :func:`channel_statistics`.

    Returns:
        (N, C, H, W), float32.
    """
    mean, std = channel_statistics(student, sync)
    teacher_mean, teacher_std = channel_statistics(teacher, sync)
    return (student.float() - mean) / (std + 1e-6) * teacher_std + teacher_mean


def centerness_loss(crossed: DenseOutputs, teacher: DenseOutputs, targets: Targets) -> Tensor:
    """Binary cross entropy of the cross head's centerness to the teacher's, on positives, over N+; ()."""
    assert crossed.centerness is not None
    assert teacher.centerness is not None
    loss = F.binary_cross_entropy_with_logits(crossed.centerness, teacher.centerness.sigmoid(), reduction="none")
    return (loss * targets.positive).sum() / targets.num_pos


def centerness_sum(student: DenseOutputs, targets: Targets) -> Tensor:
    """Sum of the positives' centerness targets (FCOS, arXiv 1904.01355), averaged over workers; 1 if there is none."""
    center = (student.anchors[:, :2] + student.anchors[:, 2:]) / 2
    boxes = targets.boxes
    distances = torch.stack([center - boxes[..., :2], boxes[..., 2:] - center], dim=-1)  # (N, R, x or y, low or high)
    ratios = distances.amin(-1) / distances.amax(-1).clamp(min=1e-6)
    centerness = ratios.clamp(min=0).prod(-1).sqrt()
    total = mean_over_workers((centerness * targets.positive).sum())
    return torch.where(total > 0, total, 1.0)


def tower_channels(detector: DenseDetector, cut: Cut) -> Tuple[int, ...]:
    """Channels of the class and the box tower of a detector's head at a cut."""
    channels = []
    for name in TOWERS:
        tower = getattr(detector.head, name)
        convs = [layer for layer in tower[: split_tower(tower, cut)[1]] if isinstance(layer, nn.Conv2d)]
        channels.append(convs[-1].out_channels if convs else level_channels(detector)[0])
    return tuple(channels)
