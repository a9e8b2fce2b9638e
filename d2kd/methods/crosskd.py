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

from typing import Any, List, Sequence, Tuple

from torch import Tensor, nn

from ..contract import Dense, level_channels
from ..dense import DenseOutputs
from ..errors import D2kdError
from ..heads import TOWERS, Cut, cross_head, split_tower
from .base import METHOD_REGISTRY, Channels, channel_statistics
from .response import ResponseKD


@METHOD_REGISTRY.register()
class CrossKD(ResponseKD):
    """Cross-head distillation of classes, boxes and centerness.

    A teacher with box distributions (GFL) teaches its distributions, others their decoded boxes.

    Args:
        cut: convolutions of the student's towers before its features change over to the teacher's head; 0 crosses
            at the FPN feature. The published setting for heads of 4 convolutions is 3.
        pre_activation: take the feature before the activation that follows the cut (the paper's wording) instead of
            after it (the authors' in-place activations make it so, and so were the published numbers measured).
        sync: align with the statistics of all workers' images instead of each worker's own, so that a run does not
            depend on the number of workers.
        **losses: weights and kinds of the losses, see :class:`ResponseKD`.
    """

    def __init__(self, cut: int = 3, pre_activation: bool = False, sync: bool = False, **losses: Any) -> None:
        super().__init__(**losses)
        self.cut = Cut(cut, pre_activation)
        self.sync = sync

    @property
    def cuts(self) -> Sequence[Cut]:
        return (self.cut,)

    def setup(self, student: Dense, teacher: Dense, channels: Channels) -> None:
        given, wanted = (tower_channels(detector, self.cut) for detector in (student, teacher))
        if given != wanted:
            raise D2kdError(
                f"CrossKD at cut {self.cut.convs}: the student's towers have {given} channels (class, box) there and "
                f"the teacher's {wanted}; use a student with equal FPN.OUT_CHANNELS and head width"
            )

    def imitating(self, student: DenseOutputs, teacher: DenseOutputs) -> DenseOutputs:
        return self.cross(student, teacher)

    def cross(self, student: DenseOutputs, teacher: DenseOutputs) -> DenseOutputs:
        """Returns the teacher head's outputs on the student's aligned tower features."""
        aligned = [self.align(own, theirs) for own, theirs in zip(student.towers(self.cut), teacher.towers(self.cut))]
        predictions = cross_head(teacher.detector.head, self.cut, *aligned)
        return DenseOutputs(teacher.detector, teacher.features, predictions, classes=teacher.classes)

    def align(self, student: List[Tensor], teacher: List[Tensor]) -> List[Tensor]:
        """Aligns each level, and activates the result unless it is an FPN feature."""
        aligned = [align_scale(s, t, self.sync) for s, t in zip(student, teacher)]
        return [level.relu() for level in aligned] if self.cut.convs > 0 else aligned


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


def tower_channels(detector: Dense, cut: Cut) -> Tuple[int, ...]:
    """Channels of the class and the box tower of a detector's head at a cut."""
    channels = []
    for name in TOWERS:
        tower = getattr(detector.head, name)
        convs = [layer for layer in tower[: split_tower(tower, cut)[1]] if isinstance(layer, nn.Conv2d)]
        channels.append(convs[-1].out_channels if convs else level_channels(detector)[0])
    return tuple(channels)
