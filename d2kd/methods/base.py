"""The contract of a distillation method, its registry, and the channel statistics several methods share."""

from typing import Any, ClassVar, Dict, List, Sequence, Tuple

import torch
import torch.distributed.nn
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils import comm
from fvcore.common.registry import Registry
from torch import Tensor, nn

from ..dense import DenseOutputs, Targets
from ..errors import D2kdError, nearest
from ..heads import Cut
from ..signatures import defaults

METHOD_REGISTRY: Registry = Registry("D2KD_METHOD")
METHOD_REGISTRY.__doc__ = "Distillation methods by name, as in MODEL.DISTILL.METHODS."


Channels = Sequence[Tuple[int, int]]


class Method(nn.Module):
    """One distillation method: keyword arguments with defaults, and losses from both detectors' outputs.

    Subclasses define ``forward(student, teacher, targets)``, which returns the same keys
    ``loss_<method>_<term>`` on every call and worker, already weighted, as float32 scalars.
    """

    #: Whether the teacher's head must run and agree with the student's in classes and anchors.
    reads_head: ClassVar[bool] = True
    #: Whether maps of student and teacher may differ in size.
    resizes: ClassVar[bool] = False

    @property
    def cuts(self) -> Sequence[Cut]:
        """Where the towers of both heads are tapped."""
        return ()

    def setup(self, student: DenseDetector, teacher: DenseDetector, channels: Channels) -> None:
        """Checks that the pair fits and makes the method's own adapters. Called once, when the model is built.

        Args:
            student: the student.
            teacher: the teacher's detector.
            channels: of student and teacher for each of ``DenseOutputs.maps``.

        Raises:
            D2kdError: the method cannot work on this pair.
        """

    def forward(self, student: DenseOutputs, teacher: DenseOutputs, targets: Targets) -> Dict[str, Tensor]:
        """Computes the losses; see the class."""
        raise NotImplementedError


class FeatureMethod(Method):
    """A method that compares feature maps: FPN levels, or what MODEL.DISTILL.FEATURES names.

    Where the student has other channels than the teacher, its map first passes a trainable 1x1 convolution.
    """

    reads_head: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleList()

    def setup(self, student: DenseDetector, teacher: DenseDetector, channels: Channels) -> None:
        self.adapters = nn.ModuleList(
            nn.Identity() if own == theirs else nn.Conv2d(own, theirs, kernel_size=1) for own, theirs in channels
        )

    def pairs(self, student: DenseOutputs, teacher: DenseOutputs) -> List[Tuple[Tensor, Tensor]]:
        """Each map of the student, adapted, and of the teacher: (N, C, H, W) float32, of the teacher's channels."""
        adapted = [adapter(level) for adapter, level in zip(self.adapters, student.maps)]
        return [(own.float(), theirs.float()) for own, theirs in zip(adapted, teacher.maps)]


def method_defaults(name: str) -> Dict[str, Any]:
    """Returns the keyword arguments of a registered method with their defaults: the one place where they stand."""
    return defaults(METHOD_REGISTRY.get(name), Method)


def method_names() -> Sequence[str]:
    """Names of all registered methods."""
    return [name for name, _ in METHOD_REGISTRY]


def build_method(name: str, **options: Any) -> Method:
    """Builds a method by name.

    Raises:
        D2kdError: unknown name or option; names the nearest.
    """
    if name not in METHOD_REGISTRY:
        known = method_names()
        raise D2kdError(f"no distillation method {name!r} among {', '.join(known)}{nearest(name, known)}")
    for option in options:
        known = list(method_defaults(name))
        if option not in known:
            raise D2kdError(f"{name} has no option {option!r}; it has {', '.join(known)}{nearest(option, known)}")
    return METHOD_REGISTRY.get(name)(**options)


def channel_statistics(feature: Tensor, sync: bool = False) -> Tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of each channel over N, H and W.

    Where N*H*W is 1, the unbiased deviation is undefined (NaN); it is taken as 0.

    Args:
        feature: (N, C, H, W).
        sync: over the images of all workers instead of this worker's own; gradients flow across workers.

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
    # sqrt has an infinite slope at 0; clamped there, its gradient is 0 as in std_mean.
    return mean, var.clamp(min=torch.finfo(var.dtype).tiny).sqrt()
