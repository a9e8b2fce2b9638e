"""A copy of a frozen detector that is made to run: norms folded into convolutions, channels last, in fewer bits."""

import copy
from collections import Counter
from contextlib import contextmanager
from typing import Any, Iterator, List, Optional, Sequence, Tuple

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d, NaiveSyncBatchNorm
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .errors import check_choice
from .keys import key

AUTO = "auto"
DTYPES = ("float32", "bfloat16", "float16", AUTO)
# What of a detector is copied. Pixel statistics, anchors and box coder stay exact, and are shared.
PARTS = ("backbone", "head")
# Exactly these types: subclasses may do more, such as an activation.
NORMS = (FrozenBatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm, NaiveSyncBatchNorm)


class Engine:
    """Chooses what of a frozen detector runs: the detector itself, or an inference copy, which it keeps up to date.

    The copy is made when it is first wanted, and again if the detector's tensors have been moved, loaded or written.

    Args:
        dtype: "float32"; "bfloat16" or "float16" (bfloat16 on the CPU); or "auto", which is the type of autocast where
            it is enabled, otherwise float32.
        fold_norms: also in float32, run a copy with folded norms and channels last. It is exact to the rounding of
            float32. Copies of other types always are of this kind.

    Raises:
        D2kdError: the type is none of these.
    """

    def __init__(self, dtype: str = "float32", fold_norms: bool = False) -> None:
        check_choice(key("MODEL.DISTILL.TEACHER.DTYPE"), dtype, DTYPES)
        self.dtype = dtype
        self.fold_norms = fold_norms
        self._is_exact = False
        self._stamp: Any = None
        self._copy: Optional[nn.Module] = None

    @property
    def makes_copies(self) -> bool:
        """Whether anything but the detector itself may run."""
        return self.dtype != "float32" or self.fold_norms

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Within it, the detector itself runs."""
        before, self._is_exact = self._is_exact, True
        try:
            yield
        finally:
            self._is_exact = before

    def type_on(self, device: torch.device) -> torch.dtype:
        """The type in which the detector runs on a device, before autocast."""
        if self.dtype == AUTO:
            enabled = torch.is_autocast_enabled(device.type)
            dtype = torch.get_autocast_dtype(device.type) if enabled else torch.float32
        else:
            dtype = getattr(torch, self.dtype)
        return torch.bfloat16 if dtype == torch.float16 and device.type == "cpu" else dtype

    @contextmanager
    def running(self, detector: nn.Module, images: Any, paths: Sequence[str]) -> Iterator[Tuple[Any, Any]]:
        """What to run.

        Args:
            detector: in evaluation mode.
            images: a preprocessed ``ImageList``.
            paths: modules whose outputs are wanted.

        Yields:
            The detector or its copy, and the images in its type. A copy of another type than float32 does not run under
            autocast.
        """
        dtype = self.type_on(images.tensor.device)
        if self._is_exact or (dtype == torch.float32 and not self.fold_norms):
            yield detector, images
            return
        stamp = (dtype, tuple(paths), [(t.data_ptr(), t._version) for t in _tensors(detector)])
        if stamp != self._stamp:
            self._copy = None  # frees it first
            self._copy, self._stamp = inference_copy(detector, dtype, paths), stamp
        images = copy.copy(images)
        images.tensor = images.tensor.to(dtype=dtype, memory_format=torch.channels_last)
        enabled = torch.is_autocast_enabled(images.tensor.device.type) and dtype == torch.float32
        with torch.autocast(images.tensor.device.type, enabled=enabled):
            yield self._copy, images

    def drop(self) -> None:
        """Frees the copy."""
        self._copy = self._stamp = None


def _tensors(network: nn.Module) -> Iterator[torch.Tensor]:
    for module in network.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                yield tensor


@torch.no_grad()
def inference_copy(detector: nn.Module, dtype: torch.dtype, keep: Sequence[str] = ()) -> nn.Module:
    """Copies backbone and head of a detector for inference; everything else is shared.

    Args:
        detector: in evaluation mode; it stays as it is.
        dtype: type of the copy's weights, images and features.
        keep: paths of convolutions whose own outputs are wanted, so that no norm is folded into them.
    """
    copied = copy.copy(detector)
    copied._modules = dict(detector._modules)
    for part in PARTS:
        module = detector._modules.get(part)
        if module is not None:
            module = copy.deepcopy(module)
            fold_norms(module, [path.partition(".")[2] for path in keep if path.startswith(f"{part}.")])
            copied._modules[part] = module.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return copied


@torch.no_grad()
def fold_norms(network: nn.Module, keep: Sequence[str] = ()) -> int:
    """Folds batch norms in evaluation mode into the convolutions before them, in place; identities take their places.

    It knows two patterns: detectron2's ``Conv2d`` with a norm, and a convolution before a norm in an ``nn.Sequential``.
    All others stay as they are.

    Args:
        network: in evaluation mode.
        keep: paths of convolutions to leave alone.

    Returns:
        The number of norms that were folded.
    """
    modules = list(network.named_modules(remove_duplicate=False))
    uses = Counter(id(module) for _, module in modules)
    kept = {id(module) for path, module in modules if path in keep}
    count = 0
    for _, module in network.named_modules():
        for owner, name, conv, norm in _pairs(module):
            if type(norm) in NORMS and norm.running_var is not None and id(conv) not in kept and uses[id(conv)] == 1:
                statistics = norm.running_mean, norm.running_var, norm.eps
                conv.weight, conv.bias = fuse_conv_bn_weights(
                    conv.weight, conv.bias, *statistics, norm.weight, norm.bias
                )
                setattr(owner, name, nn.Identity())
                count += 1
    return count


def _pairs(module: nn.Module) -> List[Tuple[nn.Module, str, Any, Any]]:
    """Convolutions of a module with what follows at once: (owner of the norm, its name there, convolution, norm)."""
    if type(module) is Conv2d:
        return [(module, "norm", module, module.norm)]
    if not isinstance(module, nn.Sequential):
        return []
    following = zip(module, list(module.named_children())[1:])
    return [(module, name, conv, norm) for conv, (name, norm) in following if _is_bare(conv)]


def _is_bare(layer: nn.Module) -> bool:
    """Whether a layer is a convolution and nothing else."""
    if type(layer) is Conv2d:
        return layer.norm is None and layer.activation is None
    return type(layer) is nn.Conv2d
