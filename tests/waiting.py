"""Operators for which the CPU waits for a GPU, recorded on any machine."""

import traceback
from typing import Any, List, Sequence, Tuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: Their results, or the sizes of these, depend on values.
WAITING = ("nonzero", "_local_scalar_dense", "is_nonzero", "masked_select", "_unique2", "equal", "repeat_interleave")
PACKAGES = ("d2kd", "detectron2", "fvcore")
#: These only run what others ask for.
WRAPPERS = ("detectron2/layers/wrappers.py",)
#: These compute with image sizes, on the CPU on any machine.
ON_THE_CPU = ("detectron2/structures/image_list.py",)


class Waits(TorchDispatchMode):
    """Records such operators as "<operator> in <file>"; in a backward pass there is no file."""

    def __init__(self) -> None:
        super().__init__()
        self.found: List[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Tuple = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITING or (name.startswith("index") and selects(args)):
            file = innermost_file()
            self.found += [f"{name} in {file}"] if file not in ON_THE_CPU else []
        return func(*args, **(kwargs or {}))


def selects(args: Sequence[Any]) -> bool:
    """Whether an indexing operator has a mask as index, other than to write a single value."""
    indices = args[1] if isinstance(args[1], (list, tuple)) else []
    has_mask = any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)
    return has_mask and not (len(args) > 2 and args[2].numel() == 1)


def innermost_file() -> str:
    """The innermost file of these packages on the stack, such as "d2kd/losses.py"."""
    for frame in reversed(traceback.extract_stack()):
        parts = frame.filename.split("/")
        for package in PACKAGES:
            file = "/".join(parts[parts.index(package) :]) if package in parts else ""
            if file.endswith(".py") and "tests" not in parts and file not in WRAPPERS:
                return file
    return ""
