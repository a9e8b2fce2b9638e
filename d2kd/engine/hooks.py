"""Hooks that both config styles add to detectron2's: exact repetition, saving, SIGTERM, EMA, non-finite losses."""

import logging
import os
import signal
import sys
from contextlib import ExitStack
from typing import Any, Dict, List, Optional, Sequence

import torch
from detectron2.engine import HookBase, SimpleTrainer, hooks
from detectron2.utils import comm
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..checkpoint import files
from ..checkpoint.run_checkpoints import RunCheckpointer, told_on_failure
from ..data.bad_images import BadImages
from ..data.loader import start_at
from ..data.randomness import ITERATIONS, seed_all
from ..diagnose.finite import levels_after_error
from ..errors import D2kdError

#: Exit status after SIGTERM: sysexits.h's EX_TEMPFAIL, "try again later".
EXIT_PREEMPTED = 75


class Preempted(SystemExit):
    """The run was asked to stop and has saved itself."""

    def __init__(self) -> None:
        super().__init__(EXIT_PREEMPTED)


class Reproducible(HookBase):
    """Makes each iteration a function of the state it starts from, whenever the process was started.

    The loader goes on with the batch of the first iteration, and random numbers are seeded in each iteration. On the
    CPU the scripted losses run unoptimised: the optimiser, which starts at their second call, changes last bits.

    Args:
        loader: the training loader.
        seed: of the run, not negative.
    """

    def __init__(self, loader: Any, seed: int) -> None:
        self.loader = loader
        self.seed = seed
        self._training = ExitStack()

    def before_train(self) -> None:
        start_at(self.loader, self.trainer.start_iter)
        if not torch.cuda.is_available():
            self._training.enter_context(torch.jit.optimized_execution(False))

    def before_step(self) -> None:
        seed_all(self.seed, ITERATIONS, self.trainer.iter, comm.get_rank())

    def after_train(self) -> None:
        self._training.close()


class EMA(HookBase):
    """An exponential moving average of the student's weights: ``average``, saved as model_ema_final.pth at the end.

    It starts as a copy of the weights after the first iteration. Buffers (statistics of BatchNorm) are copied. The
    running state is part of every checkpoint of the run.

    Args:
        model: the student, not wrapped.
        decay: how much of the average stays in each iteration, above 0 and below 1.
        folder: of the run.

    Raises:
        D2kdError: the decay is out of range.
    """

    def __init__(self, model: nn.Module, decay: float, folder: str) -> None:
        if not 0.0 < decay < 1.0:
            raise D2kdError(
                f"SOLVER.EMA_DECAY (LazyConfig: train.ema_decay) is {decay}; set it between 0 and 1, or to 0 for none"
            )
        self.model = model
        self.path = os.path.join(folder, "model_ema_final.pth")
        self._averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)).eval().requires_grad_(False)

    @property
    def average(self) -> nn.Module:
        """The averaged student, in eval mode."""
        return self._averaged.module

    def after_step(self) -> None:
        self._averaged.update_parameters(self.model)
        if comm.is_main_process() and self.trainer.iter + 1 >= self.trainer.max_iter:
            with told_on_failure(self.path):
                files.write(self.path, {"model": self.average.state_dict()})

    def state_dict(self) -> Dict[str, Tensor]:
        return self._averaged.state_dict()

    def load_state_dict(self, state_dict: Dict[str, Tensor]) -> None:
        self._averaged.load_state_dict(state_dict)


class Saving(hooks.PeriodicCheckpointer):
    """Saves periodically, at the end, and on SIGTERM after the iteration in progress, then leaves with Preempted.

    Register it on all ranks: they agree on SIGTERM, and each has a loss normaliser of its own (detectron2's RetinaNet
    and FCOS keep that running mean in no state dict) which rank 0 saves.

    Args:
        checkpointer: of the run.
        period: iterations between checkpoints.
        max_to_keep: how many of these stay; by default all.
    """

    def __init__(self, checkpointer: RunCheckpointer, period: int, max_to_keep: Optional[int] = None) -> None:
        super().__init__(checkpointer, period, max_to_keep=max_to_keep)
        self._normalizers: List[Optional[float]] = []
        self._asked_to_stop = False
        self._previous_handler: Any = signal.SIG_DFL

    def before_train(self) -> None:
        super().before_train()
        self._previous_handler = signal.signal(signal.SIGTERM, self._ask_to_stop)

    def after_train(self) -> None:
        signal.signal(signal.SIGTERM, self._previous_handler)

    def after_step(self) -> None:
        iteration = self.trainer.iter
        is_last = iteration + 1 >= self.trainer.max_iter
        is_due = is_last or (iteration + 1) % self.period == 0
        stop = any(comm.all_gather(self._asked_to_stop)) and not is_last
        if is_due or stop:
            self._normalizers = comm.all_gather(getattr(self.checkpointer.model, "loss_normalizer", None))
        if comm.is_main_process():
            super().after_step()
            if stop and not is_due:
                self.save(f"{self.file_prefix}_{iteration:07d}", iteration=iteration)
        if stop:
            comm.synchronize()  # no rank leaves, and so ends the others, before the checkpoint is written
            logging.getLogger(__name__).warning("SIGTERM: stopped and saved after iteration %d", iteration)
            raise Preempted

    def state_dict(self) -> Dict[str, Any]:
        return {"loss_normalizers": self._normalizers}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        saved = state_dict["loss_normalizers"]
        own = saved[comm.get_rank() % len(saved)]  # the number of processes may have changed
        if own is not None:
            self.checkpointer.model.loss_normalizer = own

    def _ask_to_stop(self, *_: Any) -> None:
        self._asked_to_stop = True


class FiniteLosses(HookBase):
    """Ends training before the weights are touched when a loss is not finite; names loss, levels and images.

    Args:
        trainer: the one that runs the steps; the hook registers itself.
    """

    def __init__(self, trainer: SimpleTrainer) -> None:
        self._batch: List[Dict[str, Any]] = []
        self._losses: Dict[str, Tensor] = {}
        trainer.model.register_forward_pre_hook(self._keep_batch)
        trainer.model.register_forward_hook(self._keep_losses)
        trainer.register_hooks([self])

    def _keep_batch(self, model: nn.Module, inputs: Sequence[Any]) -> None:
        if model.training:
            self._batch = inputs[0]

    def _keep_losses(self, model: nn.Module, inputs: Sequence[Any], losses: Any) -> None:
        if model.training:
            self._losses = {key: loss.detach().float() for key, loss in losses.items()}

    def after_backward(self) -> None:
        found = [report for report in comm.all_gather(self._report()) if report]
        if found:
            raise D2kdError(
                f"iteration {self.trainer.iter}: {'; '.join(found)}; lower the learning rate or the weight of that "
                "loss, or mend these images (the checkpoints of before are kept)"
            )

    def _report(self) -> str:
        if torch.stack(list(self._losses.values())).isfinite().all():
            return ""
        wrong = [f"{key} is {loss.item()}" for key, loss in self._losses.items() if not loss.isfinite()]
        return f"{', '.join(wrong)}{self._levels()} on images {self._images()}"

    def iteration(self) -> str:
        """The iteration, for an error in it: some losses raise one when they are given numbers that are not finite."""
        levels = self._levels(sys.exc_info()[1])
        return f"iteration {self.trainer.iter}{levels and f'{levels} on images {self._images()}'}"

    def _levels(self, error: Optional[BaseException] = None) -> str:
        model = self.trainer.model
        while hasattr(model, "module"):  # DDP, Autocast
            model = model.module
        levels = levels_after_error(error, model, self._batch)
        return f" (not finite already: {', '.join(levels)})" if levels else ""

    def _images(self) -> str:
        return ", ".join(f"{image.get('image_id')} ({image.get('file_name')})" for image in self._batch)


def run_hooks(
    checkpointer: RunCheckpointer, loader: Any, seed: int, ema: Optional[EMA], **saving: Any
) -> List[HookBase]:
    """The hooks of a run between those that change the model and those that evaluate it.

    Args:
        checkpointer: of the run.
        loader: the training loader.
        seed: of the run.
        ema: the average, if there is one.
        **saving: options of :class:`Saving`.
    """
    skips = getattr(getattr(loader, "dataset", None), "skip_bad_images", False)
    optional = [*([ema] if ema else []), *([BadImages()] if skips else [])]
    return [Reproducible(loader, seed), *optional, Saving(checkpointer, **saving)]
