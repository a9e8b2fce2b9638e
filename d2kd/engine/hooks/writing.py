"""Metrics of a run, on the terminal and in its folder."""

import threading
from contextlib import contextmanager, suppress
from typing import Iterator, List

from detectron2.engine import hooks
from detectron2.utils.events import EventWriter

from ...checkpoint.run_checkpoints import report_write_errors
from ...errors import D2kdError


class Writing(hooks.PeriodicWriter):
    """Writes metrics periodically and at the end. Where the disk is full, it ends the run, whose checkpoints stay.

    Args:
        writers: detectron2's.
        period: iterations between writes.
        folder: of the run.
    """

    _writers: List[EventWriter]

    def __init__(self, writers: List[EventWriter], period: int, folder: str) -> None:
        super().__init__(writers, period)
        self._folder = folder
        self._excepthook = threading.excepthook

    def before_train(self) -> None:
        """Keeps tensorboard's thread from printing a traceback; the next write raises the same error."""
        self._excepthook = threading.excepthook
        threading.excepthook = self._on_error_in_thread

    def after_step(self) -> None:
        """Writes if it is time.

        Raises:
            D2kdError: the files cannot be written.
        """
        with self._reporting():
            super().after_step()

    def after_train(self) -> None:
        """Writes what is left and closes the files.

        Raises:
            D2kdError: the files cannot be written.
        """
        try:
            with self._reporting():
                super().after_train()
        finally:
            threading.excepthook = self._excepthook

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            with report_write_errors(f"the metrics in {self._folder}"):
                yield
        except D2kdError:
            self._give_up()
            raise

    def _give_up(self) -> None:
        """Closes the files, so that neither the end of training nor that of the process writes to them again."""
        writers, self._writers = self._writers, []
        for writer in writers:
            with suppress(OSError):
                writer.close()

    def _on_error_in_thread(self, args: threading.ExceptHookArgs) -> None:
        of_tensorboard = type(args.thread).__module__.startswith("tensorboard.")
        if not (of_tensorboard and isinstance(args.exc_value, OSError)):
            self._excepthook(args)
