"""Numbers that belong to all workers together."""

import torch
from detectron2.utils import comm
from torch import Tensor


def mean_over_workers(value: Tensor) -> Tensor:
    """Averages a number without gradient over all workers."""
    if comm.get_world_size() > 1:
        value = value.clone()
        torch.distributed.all_reduce(value)
        value /= comm.get_world_size()
    return value


def at_least_one(mean: Tensor) -> Tensor:
    """Clamps a number that was averaged over workers so that its sum over them is at least 1, as for one worker."""
    return mean.clamp(min=1 / comm.get_world_size())
