"""Checkpoints of a run, and its end on SIGTERM."""

import logging
from typing import Any, Dict, List, Optional

from detectron2.engine import hooks
from detectron2.utils import comm

from ...checkpoint.run_checkpoints import RunCheckpointer
from ..accumulate import normalizers_of, set_normalizers
from .watch import Watch

#: Exit status after SIGTERM: sysexits.h's EX_TEMPFAIL, "try again later".
EXIT_PREEMPTED = 75


class Preempted(SystemExit):
    """The run was asked to stop and has saved itself."""

    def __init__(self) -> None:
        super().__init__(EXIT_PREEMPTED)


class Saving(hooks.PeriodicCheckpointer):
    """Saves periodically, at the end, and on SIGTERM after the iteration in progress, then ends with Preempted.

    Register it on all ranks: they agree on SIGTERM, and each has a loss normalizer of its own (detectron2's RetinaNet
    and FCOS keep that running mean in no state dict), or one for each micro-batch, which rank 0 saves.

    Args:
        checkpointer: of the run.
        watch: notices SIGTERM.
        period: iterations between checkpoints.
        max_to_keep: how many of these stay; by default all.
    """

    def __init__(
        self, checkpointer: RunCheckpointer, watch: Watch, period: int, max_to_keep: Optional[int] = None
    ) -> None:
        super().__init__(checkpointer, period, max_to_keep=max_to_keep)
        self._watch = watch
        self._normalizers: List[Optional[float]] = []

    def after_step(self) -> None:
        iteration = self.trainer.iter
        is_last = iteration + 1 >= self.trainer.max_iter
        is_due = is_last or (iteration + 1) % self.period == 0
        stop = self._watch.stop and not is_last
        if is_due or stop:
            of_processes = comm.all_gather(normalizers_of(self.trainer.model))
            self._normalizers = [one for micro_batch in zip(*of_processes) for one in micro_batch]
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
        workers, rank, model = comm.get_world_size(), comm.get_rank(), self.trainer.model
        own = range(rank, workers * len(normalizers_of(model)), workers)
        set_normalizers(model, [saved[worker % len(saved)] for worker in own])  # their number may have changed
