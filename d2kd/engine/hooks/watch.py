"""What each process watches for in a step, and how all of them learn of it."""

import signal
from contextlib import ExitStack, contextmanager
from typing import Any, Dict, Iterator, List, NoReturn, Optional, Sequence

import torch
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.utils import comm
from torch import Tensor, nn

from ...diagnose.finite import levels_after_error
from ...errors import D2kdError

#: Exit status after SIGTERM: sysexits.h's EX_TEMPFAIL, "try again later".
EXIT_PREEMPTED = 75


class Preempted(SystemExit):
    """The run was asked to stop and has saved itself."""

    def __init__(self) -> None:
        super().__init__(EXIT_PREEMPTED)


class Watch(HookBase):
    """Watches the losses and SIGTERM. All processes learn of both by one reduction of a few bytes in each step.

    A loss that is not finite ends training before the weights are touched; the error names the loss, the levels and
    the images. SIGTERM only sets ``stop``, except in an evaluation. Use it as a context while training.

    Args:
        trainer: runs the steps; the hook registers itself.
    """

    #: Whether any process has got SIGTERM. A process alone knows at once, several after the next backward pass.
    stop: bool

    def __init__(self, trainer: SimpleTrainer) -> None:
        self.stop = False
        self._signaled = False
        self._at_once = False
        self._batch: List[Dict[str, Any]] = []
        self._losses: Dict[str, Tensor] = {}
        self._watching = ExitStack()
        trainer.register_hooks([self])

    def __enter__(self) -> "Watch":
        model = self.trainer.model
        for handle in (
            model.register_forward_pre_hook(self._keep_batch),
            model.register_forward_hook(self._keep_losses),
        ):
            self._watching.callback(handle.remove)
        self._watching.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, self._on_sigterm))
        return self

    def __exit__(self, *_: Any) -> None:
        self._watching.close()

    def after_backward(self) -> None:
        losses = torch.stack([loss.float() for loss in self._losses.values()])
        flags = torch.stack([~losses.isfinite().all(), torch.full_like(losses[0], self._signaled).bool()]).float()
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        not_finite, stop = flags.tolist()
        self.stop = self.stop or bool(stop)
        if not_finite:
            self._end()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within it SIGTERM ends each process at once: an evaluation changes no weights, and may take long.

        Raises:
            Preempted: this process got SIGTERM. An error that follows, since others have gone, is converted to it.
        """
        self._at_once = True
        try:
            if self._signaled:
                raise Preempted
            yield
        except Exception as error:
            self._at_once = False
            if self._signaled:
                raise Preempted from error
            raise
        finally:
            self._at_once = False

    def explain(self, error: Exception) -> None:
        """Raises D2kdError if an error in a step comes from features that are not finite: some losses refuse those.

        Args:
            error: what the step raised.
        """
        if isinstance(error, (AssertionError, FloatingPointError, ValueError)) and not isinstance(error, D2kdError):
            levels = self._levels(error)
            if levels:
                raise D2kdError(f"iteration {self.trainer.iter}{levels} on images {self._images()}") from error

    def _on_sigterm(self, *_: Any) -> None:
        self._signaled = True
        self.stop = self.stop or comm.get_world_size() == 1
        if self._at_once:
            self._at_once = False  # the next one must not end what is done before the process ends
            raise Preempted

    def _keep_batch(self, model: nn.Module, inputs: Sequence[Any]) -> None:
        if model.training:
            self._batch = inputs[0]

    def _keep_losses(self, model: nn.Module, inputs: Sequence[Any], losses: Any) -> None:
        if model.training:
            self._losses = {key: loss.detach() for key, loss in losses.items()}

    def _end(self) -> NoReturn:
        found = [report for report in comm.all_gather(self._report()) if report]
        raise D2kdError(
            f"iteration {self.trainer.iter}: {'; '.join(found)}; lower the learning rate or the weight of that loss, "
            "or fix these images (the checkpoints written before are kept)"
        )

    def _report(self) -> str:
        wrong = [f"{key} is {loss.item()}" for key, loss in self._losses.items() if not loss.isfinite()]
        return f"{', '.join(wrong)}{self._levels()} on images {self._images()}" if wrong else ""

    def _levels(self, error: Optional[Exception] = None) -> str:
        model = self.trainer.model
        while hasattr(model, "module"):  # DDP, Autocast
            model = model.module
        levels = levels_after_error(error, model, self._batch)
        return f" (not finite already: {', '.join(levels)})" if levels else ""

    def _images(self) -> str:
        return ", ".join(f"{image.get('image_id')} ({image.get('file_name')})" for image in self._batch)
