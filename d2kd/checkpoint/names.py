"""Names in state dicts: those of ResNets, which torchvision and mmdetection share, and cleanup for all converters."""

import re
from typing import Any, Dict, Iterable, Mapping, Optional

from torch import Tensor

from ..errors import D2kdError, escaped, printable

BOTTOM_UP = "backbone.bottom_up."
_MODULE = r"conv1|bn1|layer[1-4]\.\d+\.(conv[1-3]|bn[1-3]|downsample\.[01])"
_UNNEEDED = re.compile(r"data_preprocessor\..*|(.*\.)?num_batches_tracked|ema_.*")
_RESNET = re.compile(rf"({_MODULE})\.(weight|bias|running_mean|running_var)")


def resnet_name(name: str) -> Optional[str]:
    """Returns detectron2's name of a ResNet tensor inside a detector, or None if a plain ResNet has no such tensor.

    ``layer1.0.bn1.weight`` becomes ``backbone.bottom_up.res2.0.conv1.norm.weight``.
    """
    if not _RESNET.fullmatch(name):
        return None
    name = re.sub(r"^(?=conv1|bn1)", "stem.", name)
    name = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
    name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    return BOTTOM_UP + re.sub(r"\bbn(\d)", r"conv\1.norm", name)


def raw_state(loaded: Mapping[str, Any]) -> Dict[str, Any]:
    """Returns the state dict in the content of a file, without the prefix ``module.`` that DataParallel adds.

    Unwraps ``{"state_dict": ...}`` and ``{"model": ...}``.
    """
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    state = {escaped(str(name)): value for name, value in loaded.items()}
    if all(name.startswith("module.") for name in state):
        state = {name[len("module.") :]: value for name, value in state.items()}
    return state


def plain_state(loaded: Mapping[str, Any]) -> Dict[str, Tensor]:
    """Reduces the content of a file to its named tensors.

    Drops what no model needs: ``num_batches_tracked`` (FrozenBN has none), mmdetection's ``data_preprocessor``, and
    ``ema_*``, a second copy of all weights that the EMA hook of mmdetection 2.x keeps in the model.

    Args:
        loaded: the content of a checkpoint file.

    Returns:
        Name -> tensor.

    Raises:
        D2kdError: one of the values is not a tensor.
    """
    state = raw_state(loaded)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise D2kdError(f"{name} is a {type(value).__name__}, not a tensor; pass a state dict")
    return {name: value for name, value in state.items() if not _UNNEEDED.fullmatch(name)}


def some(names: Iterable[str], limit: int = 5) -> str:
    """Joins up to ``limit`` names to a string such as ``"a, b, ... (7 in all)"``."""
    names = list(names)
    more = f", ... ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(map(printable, names[:limit])) + more
