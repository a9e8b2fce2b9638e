"""CrossKD: Cross-Head Knowledge Distillation for Object Detection, arXiv 2306.11369.

The student's tower features at the cut are passed through the rest of the teacher's head. These cross-head predictions,
not the student's own, imitate the teacher's (equations 4 and 5), so the student's head after the cut is free to follow
the ground truth.

Published settings (cut 3 unless stated otherwise):

=========  ===============================================================================================
RetinaNet  the defaults
GFL        box_weight 4
ATSS       the defaults, with the centerness loss
FCOS       cut 2, cls_weight 0.4, box_weight 0.75, box_loss "iou_log", normalizer "centerness",
           centerness_weight 0, mask_padding False
=========  ===============================================================================================

Deviations from the authors' code, none of which affects a typical batch:

- Normalizers are averaged over workers; some of theirs are per worker.
- Without ground truth the normalizer "centerness" is 1 instead of 1e-6, which produced losses of 1e8. Where all of the
  teacher's scores are 0, the loss of box distributions is 0 instead of NaN.
- A level with a single value per channel (N*H*W = 1) has no unbiased standard deviation: theirs is NaN, here it is 0.
- RetinaNet's anchors are labeled before those in padding are masked; theirs masks first.
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

    A teacher with box distributions (GFL) is imitated in its distributions, other teachers in their decoded boxes.

    Args:
        cut: number of the student's tower convolutions to run before its features enter the teacher's head; 0 crosses
            at the FPN feature. The published setting for heads with 4 convolutions is 3.
        pre_activation: use the feature before the activation that follows the cut, as the paper says, instead of after
            it. The authors' in-place activations have the effect of the latter, and the published numbers were
            measured that way.
        sync: align with statistics over the images of all workers instead of each worker's own, so that a run does not
            depend on the number of workers.
        **losses: weights and types of the losses, see :class:`ResponseKD`.
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
                f"the teacher's have {wanted}; use a student with the same FPN.OUT_CHANNELS and head width"
            )

    def imitating_outputs(self, student: DenseOutputs, teacher: DenseOutputs) -> DenseOutputs:
        return self.cross(student, teacher)

    def cross(self, student: DenseOutputs, teacher: DenseOutputs) -> DenseOutputs:
        """Returns the teacher head's outputs on the student's aligned tower features."""
        aligned = [self.align(own, theirs) for own, theirs in zip(student.towers(self.cut), teacher.towers(self.cut))]
        predictions = cross_head(teacher.detector.head, self.cut, *aligned)
        return DenseOutputs(teacher.detector, teacher.features, predictions, classes=teacher.classes)

    def align(self, student: List[Tensor], teacher: List[Tensor]) -> List[Tensor]:
        """Aligns each level and applies the activation, unless the cut is at the FPN features."""
        aligned = [align_scale(s, t, self.sync) for s, t in zip(student, teacher)]
        return [level.relu() for level in aligned] if self.cut.convs > 0 else aligned


def align_scale(student: Tensor, teacher: Tensor, sync: bool = False) -> Tensor:
    """Shifts and scales each channel of the student's feature to the teacher's mean and standard deviation.

    Args:
        student: (N, C, H, W); gradients also flow through its statistics.
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
