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

Narrower and shallower heads, which the paper does not cover: see :class:`CrossKD`.
"""

from typing import Any, Hashable, List, Sequence, Tuple

from torch import Tensor, nn

from ..contract import Dense, level_channels
from ..dense import DenseOutputs
from ..errors import D2kdError
from ..heads import TOWERS, Cut, cross_head, num_convs, split_tower
from .base import METHOD_REGISTRY, Channels, channel_statistics
from .response import ResponseKD

Statistics = Tuple[Tensor, Tensor]  # mean and deviation of each channel


@METHOD_REGISTRY.register()
class CrossKD(ResponseKD):
    """Cross-head distillation of classes, boxes and centerness.

    A teacher with box distributions (GFL) is imitated in its distributions, other teachers in their decoded boxes.

    Where the towers of student and teacher differ in width at their cuts, the student's feature first passes a
    trainable 1x1 convolution, one per tower and shared by the levels as the towers are; see :func:`make_adapter`.

    Args:
        cut: number of the student's tower convolutions to run before its features enter the teacher's head; 0 crosses
            at the FPN feature. The published setting for heads with 4 convolutions is 3.
        teacher_cut: number of the teacher's tower convolutions that these features skip; -1 for the same distance from
            the predictors as the student's cut, which is the same number if the towers are equally deep.
        pre_activation: use the feature before the activation that follows the cut, as the paper says, instead of after
            it. The authors' in-place activations have the effect of the latter, and the published numbers were
            measured that way.
        sync: align with statistics over the images of all workers instead of each worker's own, so that a run does not
            depend on the number of workers.
        **losses: weights and types of the losses, see :class:`ResponseKD`.
    """

    def __init__(
        self, cut: int = 3, teacher_cut: int = -1, pre_activation: bool = False, sync: bool = False, **losses: Any
    ) -> None:
        super().__init__(**losses)
        self.cut = Cut(cut, pre_activation)
        self.teacher_cut = Cut(teacher_cut, pre_activation)
        self.sync = sync
        self.adapters = nn.ModuleDict()

    @property
    def cuts(self) -> Sequence[Cut]:
        return (self.cut,)

    @property
    def teacher_cuts(self) -> Sequence[Cut]:
        return (self.teacher_cut,)

    def setup(self, student: Dense, teacher: Dense, channels: Channels) -> None:
        check_cut(student, "student", self.cut)
        if self.teacher_cut.convs < 0:
            self.teacher_cut = cut_like(student, teacher, self.cut)
        check_cut(teacher, "teacher", self.teacher_cut)
        widths = zip(TOWERS, tower_channels(student, self.cut), tower_channels(teacher, self.teacher_cut))
        self.adapters = nn.ModuleDict({tower: make_adapter(own, theirs) for tower, own, theirs in widths})

    def imitating_outputs(self, student: DenseOutputs, teacher: DenseOutputs) -> DenseOutputs:
        return self.cross(student, teacher)

    def cross(self, student: DenseOutputs, teacher: DenseOutputs) -> DenseOutputs:
        """Returns the teacher head's outputs on the student's adapted and aligned tower features."""
        self.note(teacher)
        towers = zip(self.adapters.values(), student.towers(self.cut), teacher.notes[self._statistics])
        aligned = [self.align([adapter(level) for level in own], theirs) for adapter, own, theirs in towers]
        predictions = cross_head(teacher.detector.head, self.teacher_cut, *aligned)
        crossed = DenseOutputs(teacher.detector, teacher.features, predictions, classes=teacher.classes)
        crossed.anchors_per_level = teacher.anchors_per_level  # its maps may be freed
        return crossed

    def note(self, teacher: DenseOutputs) -> None:
        """Notes the statistics of the teacher's channels for each tower and level, all that the alignment reads."""
        if self._statistics not in teacher.notes:
            towers = teacher.towers(self.teacher_cut)
            teacher.notes[self._statistics] = [[channel_statistics(x, self.sync) for x in tower] for tower in towers]

    @property
    def _statistics(self) -> Hashable:
        return "channel statistics", self.teacher_cut, self.sync

    def align(self, student: List[Tensor], teacher: List[Statistics]) -> List[Tensor]:
        """Aligns each level and applies the activation, unless the teacher's head is entered at its FPN features."""
        aligned = [align_to(s, t, self.sync) for s, t in zip(student, teacher)]
        return [level.relu() for level in aligned] if self.teacher_cut.convs > 0 else aligned


def make_adapter(channels: int, teacher_channels: int) -> nn.Module:
    """Makes what maps the student's tower features to the teacher's width, before they are aligned.

    The authors suggest a 1x1 convolution for narrower students (issue 8 of their repository). It stands before the
    alignment, since the statistics that :func:`align_scale` takes over are those of the teacher's channels, and so also
    before the activation. The alignment cancels a bias and the scale of each output channel, so there is no bias.

    It starts orthogonal: all inner products of a narrower student's feature are kept, so that no part of it is faint in
    the teacher's head at the start, and so in its first gradients. Since scales cancel, draws of independent weights of
    other sizes differ from each other only in how fast they turn. An identity would leave channels without a deviation
    to align, and student and teacher have no common order of channels that it could keep.

    Args:
        channels: the student's.
        teacher_channels: the teacher's.

    Returns:
        The identity, without parameters, if both are equal.
    """
    if channels == teacher_channels:
        return nn.Identity()
    adapter = nn.Conv2d(channels, teacher_channels, kernel_size=1, bias=False)
    nn.init.orthogonal_(adapter.weight)
    return adapter


def align_scale(student: Tensor, teacher: Tensor, sync: bool = False) -> Tensor:
    """Shifts and scales each channel of the student's feature to the teacher's mean and standard deviation.

    Args:
        student: (N, C, H, W); gradients also flow through its statistics.
        teacher: (N, C, H, W).
        sync: see :func:`channel_statistics`.

    Returns:
        (N, C, H, W), float32.
    """
    return align_to(student, channel_statistics(teacher, sync), sync)


def align_to(student: Tensor, teacher: Statistics, sync: bool = False) -> Tensor:
    """The same as :func:`align_scale`, with the teacher's :func:`channel_statistics`."""
    mean, std = channel_statistics(student, sync)
    teacher_mean, teacher_std = teacher
    return (student.float() - mean) / (std + 1e-6) * teacher_std + teacher_mean


def check_cut(detector: Dense, who: str, cut: Cut) -> None:
    """Raises D2kdError if a cut lies outside one of a head's towers.

    Args:
        detector: whose head.
        who: "student" or "teacher".
        cut: its cut.
    """
    depth = min(num_convs(getattr(detector.head, name)) for name in TOWERS)
    if not 0 <= cut.convs <= depth:
        option = "cut" if who == "student" else "teacher_cut"
        raise D2kdError(
            f"CrossKD: the {who}'s cut {cut.convs} lies outside a tower of {depth} convolutions; set CrossKD's "
            f"{option} to 0 to {depth}"
        )


def cut_like(student: Dense, teacher: Dense, cut: Cut) -> Cut:
    """The teacher's cut at the same distance from the predictors as the student's, which may lie outside its towers.

    Raises:
        D2kdError: it is not the same for both towers.
    """
    heads = student.head, teacher.head
    own, theirs = ([num_convs(getattr(head, name)) for name in TOWERS] for head in heads)
    convs = {cut.convs - depth + teacher_depth for depth, teacher_depth in zip(own, theirs)}
    if len(convs) > 1:
        raise D2kdError(
            f"CrossKD: class and box tower have {own} convolutions in the student and {theirs} in the teacher, so the "
            "teacher's cut does not follow from the student's; set CrossKD's teacher_cut"
        )
    return cut._replace(convs=convs.pop())


def tower_channels(detector: Dense, cut: Cut) -> Tuple[int, ...]:
    """Channels of the class and the box tower of a detector's head at a cut."""
    channels = []
    for name in TOWERS:
        tower = getattr(detector.head, name)
        convs = [layer for layer in tower[: split_tower(tower, cut)[1]] if isinstance(layer, nn.Conv2d)]
        channels.append(convs[-1].out_channels if convs else level_channels(detector)[0])
    return tuple(channels)
