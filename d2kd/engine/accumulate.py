"""Gradient accumulation: the micro-batches of a process train a model as so many processes would."""

from contextlib import ExitStack
from typing import Any, Callable, Dict, List, Optional

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..data.randomness import ITERATIONS, seed_all
from ..errors import D2kdError
from ..keys import key
from ..workers import Averages, averaging

Batch = List[Dict[str, Any]]


def accumulate(trainer: SimpleTrainer, count: int, seed: int) -> None:
    """Makes a trainer accumulate the gradients of several micro-batches before each step of the optimizer.

    Args:
        trainer: detectron2's, with a loader whose batches hold the images of all micro-batches.
        count: micro-batches of a step.
        seed: of the run, not negative.

    Raises:
        D2kdError: a method has an option that cannot be the same as in several processes.
    """
    scaler = getattr(trainer, "grad_scaler", None)
    trainer.model = Accumulated(trainer.model, count, seed, scaler.scale if scaler else None)
    trainer.zero_grad_before_forward = True


class Accumulated(nn.Module):
    """A model that divides each batch into micro-batches while it trains, and is as it is otherwise.

    To the model each micro-batch is what its batch is to one of several processes: the same images, random numbers,
    running normalizer and averages over all workers. The forward pass ends with the last one, whose backward pass the
    trainer runs as that of any model; the gradients of the others are there already. Where losses use averages over all
    workers, each micro-batch runs without gradients first, as far as the last of these; see :class:`Averages`.

    Args:
        module: the model, possibly in DDP and for mixed precision.
        count: micro-batches of a step.
        seed: of the run, not negative.
        scale: scales the loss before the backward pass.
    """

    def __init__(
        self, module: nn.Module, count: int, seed: int, scale: Optional[Callable[[Tensor], Tensor]] = None
    ) -> None:
        super().__init__()
        self.module = module
        self.count = count
        self.seed = seed
        self.scale = scale
        self.averages = Averages(count)
        #: Running loss normalizers of RetinaNet and FCOS, one for each micro-batch; None before the first step.
        self.normalizers: List[Optional[float]] = [None] * count
        self.student = unwrapped(module)
        _check_methods(self.student)

    def forward(self, *inputs: Any) -> Any:
        """What the model gives; in training the losses, averaged over the micro-batches."""
        if not (self.training and torch.is_grad_enabled()):
            return self.module(*inputs)
        batches = micro_batches(inputs[0], self.count)
        with averaging(self.averages):
            self._collect(batches)
            return self._losses(batches)

    def _collect(self, batches: List[Batch]) -> None:
        """Collects what the losses average, if anything; nothing else changes."""
        self.averages.clear()
        if self.averages.calls == 0:
            return
        buffers = [(buffer, buffer.clone()) for buffer in self.student.buffers()]  # statistics of BatchNorm
        with torch.no_grad(), EventStorage(get_event_storage().iter):
            for index, batch in enumerate(batches):
                self._start(index)
                with self.averages.collecting():
                    self.module(batch)
                if self.averages.calls == 0:
                    break
            for buffer, before in buffers:
                buffer.copy_(before)
        self.averages.reduce()

    def _losses(self, batches: List[Batch]) -> Dict[str, Tensor]:
        total: Dict[str, Tensor] = {}
        for index, batch in enumerate(batches):
            is_last = index == self.count - 1
            self._start(index)
            with ExitStack() as context:
                if index > 0:  # the first process writes the metrics
                    context.enter_context(EventStorage(get_event_storage().iter))
                if not is_last:
                    self._without_sync(context)
                losses = {name: loss / self.count for name, loss in self.module(batch).items()}
                if not is_last:
                    self._backward(sum(losses.values()))
                    losses = {name: loss.detach() for name, loss in losses.items()}
            self.normalizers[index] = getattr(self.student, "loss_normalizer", None)
            total = {name: total[name] + loss if total else loss for name, loss in losses.items()}
        return total

    def _start(self, index: int) -> None:
        """Makes the model that of a worker."""
        worker = index * comm.get_world_size() + comm.get_rank()
        seed_all(self.seed, ITERATIONS, get_event_storage().iter, worker)
        set_normalizer(self.student, self.normalizers[index])
        self.averages.start()
        torch.clear_autocast_cache()  # weights that were cast without gradients

    def _without_sync(self, context: ExitStack) -> None:
        for part in self.modules():
            if isinstance(part, DistributedDataParallel):
                context.enter_context(part.no_sync())

    def _backward(self, loss: Any) -> None:
        with torch.autocast(loss.device.type, enabled=False):
            (self.scale(loss) if self.scale else loss).backward()


def micro_batches(batch: Batch, count: int) -> List[Batch]:
    """Divides a batch into consecutive micro-batches of equal size.

    Raises:
        D2kdError: that is not possible.
    """
    if not isinstance(batch, list) or len(batch) % count or not batch:
        what = f"{len(batch)} images" if isinstance(batch, list) else f"the type {type(batch).__name__}"
        raise D2kdError(
            f"a batch of {what} cannot be divided into {count} micro-batches ({key('SOLVER.ACCUMULATE')}); make the "
            "loader return lists of as many images as a multiple"
        )
    size = len(batch) // count
    return [batch[start : start + size] for start in range(0, len(batch), size)]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of wrappers: DDP, Autocast, Accumulated."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module  # type: ignore[assignment]
    return model


def normalizers_of(model: nn.Module) -> List[Optional[float]]:
    """The running loss normalizer of each worker in this process; None for those of a model without one."""
    if isinstance(model, Accumulated):
        return list(model.normalizers)
    return [getattr(unwrapped(model), "loss_normalizer", None)]


def set_normalizers(model: nn.Module, values: List[Optional[float]]) -> None:
    """Sets what :func:`normalizers_of` gives."""
    if isinstance(model, Accumulated):
        model.normalizers = list(values)
    set_normalizer(unwrapped(model), values[0])


def set_normalizer(model: nn.Module, value: Optional[float]) -> None:
    """Sets a model's running loss normalizer, which detectron2 creates in the first step."""
    if value is not None:
        model.loss_normalizer = value  # type: ignore[assignment]
    elif hasattr(model, "loss_normalizer"):
        del model.loss_normalizer


def _check_methods(student: nn.Module) -> None:
    for method in getattr(student, "methods", ()):
        if getattr(method, "sync", False):
            setting = key("SOLVER.ACCUMULATE")
            raise D2kdError(
                f"{type(method).__name__}'s sync aligns with statistics over the images of all workers, which "
                f"micro-batches do not see together; set sync to False, or {setting} to 1"
            )
