"""Where a run computes."""

import logging
import re

import torch
from detectron2.engine import create_ddp_model
from torch import nn

from ..errors import D2kdError
from ..keys import key


def usable_device(device: str) -> str:
    """Returns the device, or "cpu" with a warning where CUDA is asked for and there is none.

    Raises:
        D2kdError: it is neither a CPU nor a GPU.
    """
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise D2kdError(f"{key('MODEL.DEVICE')} is {device!r}; use cuda or cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        logging.getLogger(__name__).warning("No CUDA device was found; running on the CPU.")
        return "cpu"
    return device


def check_num_gpus(num_gpus: int) -> None:
    """Raises D2kdError if more GPUs are asked for than there are; without any, they count processes on the CPU."""
    if num_gpus < 0:
        raise D2kdError(f"--num-gpus {num_gpus}; it must be 0 or more")
    available = torch.cuda.device_count()
    if torch.cuda.is_available() and num_gpus > available:
        raise D2kdError(f"--num-gpus {num_gpus}, but this machine has {available}; use --num-gpus {available}")


def wrap_ddp(model: nn.Module, **options: object) -> nn.Module:
    """Wraps a model with detectron2's ``create_ddp_model``, on the CPU too."""
    if next(model.parameters()).device.type == "cpu":
        options["device_ids"] = None
    return create_ddp_model(model, **options)
