"""Numbers shared by all workers: the processes, or with gradient accumulation the micro-batches of all processes."""

from contextlib import contextmanager
from typing import Iterator, List, Optional

import torch
from detectron2.utils import comm
from torch import Tensor


class CollectedAll(Exception):
    """Ends a forward pass that runs only for what it averages, when there is no more."""


class Averages:
    """Averages over workers where each of a process's micro-batches counts as one.

    What a forward pass averages must be known of all micro-batches before the loss of the first is complete. So each
    micro-batch runs without gradients first, which collects it.

    Args:
        count: micro-batches of each process.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        #: How many averages a forward pass takes; None until the first is complete.
        self.calls: Optional[int] = None
        self._collecting = False
        self._next = 0
        self._totals: List[Tensor] = []

    def clear(self) -> None:
        """Forgets the last step."""
        self._totals = []

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Within it, a forward pass only adds what it averages; it may end with what is left out."""
        self._collecting, self._next = True, 0
        try:
            yield
        except CollectedAll:
            pass
        else:
            self.calls = self._next
        finally:
            self._collecting = False

    def reduce(self) -> None:
        """Averages what was collected, over the processes too."""
        for total in self._totals:
            if comm.get_world_size() > 1:
                torch.distributed.all_reduce(total)
            total /= num_workers()

    def start(self) -> None:
        """Begins the forward pass of a micro-batch, which takes the averages in the order of collecting."""
        self._next = 0

    def mean(self, value: Tensor) -> Tensor:
        """The average of a value over all workers, or the value itself while collecting."""
        index, self._next = self._next, self._next + 1
        if not self._collecting:
            return self._totals[index].clone()
        if index == len(self._totals):
            self._totals.append(torch.zeros_like(value))
        self._totals[index] += value.detach()
        if self._next == self.calls:
            raise CollectedAll
        return value


_averages: Optional[Averages] = None


@contextmanager
def averaging(averages: Averages) -> Iterator[None]:
    """Within it, micro-batches are workers."""
    global _averages
    _averages = averages
    try:
        yield
    finally:
        _averages = None


def num_workers() -> int:
    """Number of workers whose losses are averaged."""
    return comm.get_world_size() * (_averages.count if _averages is not None else 1)


def mean_over_workers(value: Tensor) -> Tensor:
    """Averages a tensor over all workers; no gradient flows through it."""
    if _averages is not None:
        return _averages.mean(value)
    if comm.get_world_size() > 1:
        value = value.clone()
        torch.distributed.all_reduce(value)
        value /= comm.get_world_size()
    return value


def at_least_one(mean: Tensor) -> Tensor:
    """Clamps an average over workers so that the sum over workers is at least 1."""
    return mean.clamp(min=1 / num_workers())
