"""Numbers shared by all workers."""

import torch
from detectron2.utils import comm
from torch import Tensor


def mean_over_workers(value: Tensor) -> Tensor:
    """Averages a tensor over all workers; no gradient flows through it."""
    if comm.get_world_size() > 1:
        value = value.clone()
        torch.distributed.all_reduce(value)
        value /= comm.get_world_size()
    return value


def at_least_one(mean: Tensor) -> Tensor:
    """Clamps an average over workers so that the sum over workers is at least 1."""
    return mean.clamp(min=1 / comm.get_world_size())
