"""Checkpoints of a run, and its end on SIGTERM."""

import logging
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional

from detectron2.engine import hooks
from detectron2.utils import comm

from ...checkpoint.run_checkpoints import RunCheckpointer
from ..accumulate import normalizers_of, set_normalizers
from .watch import Preempted, Watch


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
        #: Whether the evaluation that was due at the iteration of the loaded checkpoint was broken off.
        self.evaluation_is_missing = False

    def after_step(self) -> None:
        iteration = self.trainer.iter
        is_last = iteration + 1 >= self.trainer.max_iter
        is_due = is_last or (iteration + 1) % self.period == 0
        stop = self._watch.stop and not is_last
        self.evaluation_is_missing = False
        if is_due or stop:
            self._gather_normalizers()
        if comm.is_main_process():
            super().after_step()
            if stop and not is_due:
                self._save_now()
        if stop:
            comm.synchronize()  # no rank leaves, and so ends the others, before the checkpoint is written
            logging.getLogger(__name__).warning("SIGTERM: stopped and saved after iteration %d", iteration)
            raise Preempted

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within it SIGTERM ends the run at once; the iteration that has ended is saved, if it was not the last.

        Raises:
            Preempted: on SIGTERM.
        """
        self._gather_normalizers()  # the processes cannot meet again after SIGTERM
        try:
            with self._watch.evaluating():
                yield
        except Preempted:
            if comm.is_main_process() and self.trainer.iter + 1 < self.trainer.max_iter:
                self.evaluation_is_missing = True
                self._save_now()
            logging.getLogger(__name__).warning("SIGTERM: stopped in an evaluation, which --resume does again")
            raise

    def _gather_normalizers(self) -> None:
        of_processes = comm.all_gather([x and float(x) for x in normalizers_of(self.trainer.model)])
        self._normalizers = [one for micro_batch in zip(*of_processes) for one in micro_batch]

    def _save_now(self) -> None:
        self.save(f"{self.file_prefix}_{self.trainer.iter:07d}", iteration=self.trainer.iter)

    def state_dict(self) -> Dict[str, Any]:
        return {"loss_normalizers": self._normalizers, "evaluation_is_missing": self.evaluation_is_missing}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        self.evaluation_is_missing = state_dict.get("evaluation_is_missing", False)
        saved = state_dict["loss_normalizers"]
        workers, rank, model = comm.get_world_size(), comm.get_rank(), self.trainer.model
        own = range(rank, workers * len(normalizers_of(model)), workers)
        set_normalizers(model, [saved[worker % len(saved)] for worker in own])  # their number may have changed
