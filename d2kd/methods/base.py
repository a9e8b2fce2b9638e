"""The base class of distillation methods, their registry, and channel statistics that several methods share."""

from typing import Any, ClassVar, Dict, List, Sequence, Tuple

import torch
import torch.distributed.nn
from detectron2.utils import comm
from fvcore.common.registry import Registry
from torch import Tensor, nn

from ..contract import Dense
from ..dense import DenseOutputs, Targets
from ..errors import D2kdError, nearest
from ..heads import Cut
from ..keys import key
from ..signatures import defaults

METHOD_REGISTRY: Registry = Registry("D2KD_METHOD")
METHOD_REGISTRY.__doc__ = "Distillation methods by name, as in MODEL.DISTILL.METHODS."


Channels = Sequence[Tuple[int, int]]


class Method(nn.Module):
    """One distillation method: keyword arguments with defaults, and losses from both detectors' outputs.

    Subclasses define ``forward(student, teacher, targets)``, which returns the same keys
    ``loss_<method>_<term>`` on every call and worker, already weighted, as float32 scalars.
    """

    #: Whether the teacher's head must run, and have the student's classes and anchors.
    reads_head: ClassVar[bool] = True
    #: Whether the losses read feature maps of the teacher, or tapped ones. If no method does, they are freed before.
    reads_maps: ClassVar[bool] = True
    #: Whether the maps of student and teacher may differ in size.
    resizes: ClassVar[bool] = False

    @property
    def cuts(self) -> Sequence[Cut]:
        """Where to tap the towers of the student's head."""
        return ()

    @property
    def teacher_cuts(self) -> Sequence[Cut]:
        """Where to tap the towers of the teacher's head; by default as in the student's."""
        return self.cuts

    def setup(self, student: Dense, teacher: Dense, channels: Channels) -> None:
        """Checks that student and teacher fit, and makes the method's adapters. Called once, when the model is built.

        Args:
            student: the student.
            teacher: the teacher's detector; its weights may not be loaded yet.
            channels: channels of student and teacher for each of ``DenseOutputs.maps``.

        Raises:
            D2kdError: the method cannot work on this pair.
        """

    def note(self, teacher: DenseOutputs) -> None:
        """Puts what a method without ``reads_maps`` needs of the teacher's maps into ``teacher.notes``."""

    def forward(self, student: DenseOutputs, teacher: DenseOutputs, targets: Targets) -> Dict[str, Tensor]:
        """Computes the losses; see the class."""
        raise NotImplementedError


class FeatureMethod(Method):
    """A method that compares feature maps: the FPN levels, or those in MODEL.DISTILL.FEATURES.

    If the number of channels differs, the student's map first passes a trainable 1x1 convolution.
    """

    reads_head: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleList()

    def setup(self, student: Dense, teacher: Dense, channels: Channels) -> None:
        self.adapters = nn.ModuleList(
            nn.Identity() if own == theirs else nn.Conv2d(own, theirs, kernel_size=1) for own, theirs in channels
        )

    def pairs(self, student: DenseOutputs, teacher: DenseOutputs) -> List[Tuple[Tensor, Tensor]]:
        """Pairs of the student's adapted map and the teacher's map, both (N, C, H, W) float32."""
        adapted = [adapter(level) for adapter, level in zip(self.adapters, student.maps)]
        return [(own.float(), theirs.float()) for own, theirs in zip(adapted, teacher.maps)]


def method_defaults(name: str) -> Dict[str, Any]:
    """Returns the keyword arguments of a registered method with their defaults, from its signature."""
    return defaults(METHOD_REGISTRY.get(name), Method)


def method_names() -> Sequence[str]:
    """Names of all registered methods."""
    return [name for name, _ in METHOD_REGISTRY]


def check_method_names(names: Sequence[str]) -> None:
    """Raises D2kdError if a name of MODEL.DISTILL.METHODS is unknown or appears twice; suggests the nearest."""
    known = method_names()
    for name in names:
        if name not in known:
            raise D2kdError(
                f"{key('MODEL.DISTILL.METHODS')} names {name!r}, which is none of {', '.join(known)}"
                f"{nearest(str(name), known)}"
            )
    check_unique(names)


def check_unique(names: Sequence[str]) -> None:
    """Raises D2kdError if a method appears twice."""
    twice = [name for name in names if list(names).count(name) > 1]
    if twice:
        where = key("MODEL.DISTILL.METHODS")
        raise D2kdError(f"the method {twice[0]} is named twice in {where}; keep one and set its weight")


def build_method(name: str, **options: Any) -> Method:
    """Builds a method by name.

    Raises:
        D2kdError: the name or an option is unknown (suggests the nearest), or a weight is negative.
    """
    if name not in METHOD_REGISTRY:
        known = method_names()
        raise D2kdError(f"no distillation method {name!r} among {', '.join(known)}{nearest(name, known)}")
    for option in options:
        known = list(method_defaults(name))
        if option not in known:
            raise D2kdError(f"{name} has no option {option!r}; it has {', '.join(known)}{nearest(option, known)}")
    return METHOD_REGISTRY.get(name)(**options)


def check_weights(method: Method) -> None:
    """Raises D2kdError if one of a method's weights is negative or not a number."""
    name = type(method).__name__
    for option in defaults(type(method), Method):
        value = getattr(method, option, 0.0)
        is_weight = option == "weight" or option.endswith("_weight")
        if is_weight and not (isinstance(value, (int, float)) and value >= 0):
            raise D2kdError(f"{name}'s {option} is {value}; set it to 0 or more")


def channel_statistics(feature: Tensor, sync: bool = False) -> Tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of each channel over N, H and W.

    If N*H*W is 1, the unbiased deviation is undefined (NaN) and counts as 0.

    Args:
        feature: (N, C, H, W).
        sync: whether to use the images of all workers instead of this worker's own; gradients flow across workers.

    Returns:
        Mean and deviation, each (1, C, 1, 1), float32, with gradient.
    """
    feature = feature.float()
    if sync and comm.get_world_size() > 1:
        return _synced_statistics(feature)
    correction = int(feature.numel() > feature.shape[1])
    std, mean = torch.std_mean(feature, dim=(0, 2, 3), correction=correction, keepdim=True)
    return mean, std


def _synced_statistics(feature: Tensor) -> Tuple[Tensor, Tensor]:
    all_reduce = torch.distributed.nn.functional.all_reduce
    channels = feature.shape[1]
    count = all_reduce(feature.new_tensor(feature.numel() / channels))
    mean = all_reduce(feature.sum((0, 2, 3), keepdim=True)) / count
    var = all_reduce((feature - mean).square().sum((0, 2, 3), keepdim=True)) / (count - 1).clamp(min=1)
    # The slope of sqrt at 0 is infinite; clamping makes the gradient 0 there, as in std_mean.
    return mean, var.clamp(min=torch.finfo(var.dtype).tiny).sqrt()
