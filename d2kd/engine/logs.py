"""Logs of a run: detectron2's handlers while it lasts."""

import logging
import sys
import traceback
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Iterator, List, Sequence

from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..data.coco import Remark
from ..progress import log_above_bars

LOGGERS = ("detectron2", "fvcore", "d2kd")


@contextmanager
def run_logs(folder: str) -> Iterator[None]:
    """Logs to the terminal and to ``log.txt`` in a folder; puts the loggers back to what they were afterwards.

    Tracebacks of exceptions that end the run are left to who catches them: detectron2's training loop logs none.
    """
    before = {name: (x.level, x.propagate, list(x.handlers)) for name in LOGGERS for x in [logging.getLogger(name)]}
    loop = logging.getLogger("detectron2.engine.train_loop")
    loop.addFilter(_has_no_traceback)
    for name in LOGGERS:
        # As default_setup calls it, whose own call then adds no second handler to a logger that is set up.
        setup_logger(folder, distributed_rank=comm.get_rank(), **({} if name == "detectron2" else {"name": name}))
    _tell_write_errors_once(folder)
    try:
        with log_above_bars(LOGGERS):
            yield
    except Exception:
        _write_to_files(traceback.format_exc())
        raise
    finally:
        loop.removeFilter(_has_no_traceback)
        for name, (level, propagate, handlers) in before.items():
            logger = logging.getLogger(name)
            logger.handlers[:] = handlers
            logger.setLevel(level)
            logger.propagate = propagate
        setup_logger.cache_clear()  # it adds no handlers a second time to a logger that it remembers


def _tell_write_errors_once(folder: str) -> None:
    """A full disk ends a run when it writes what is needed later; without a log it goes on, with one line about it."""
    handlers = {handler for name in LOGGERS for handler in logging.getLogger(name).handlers}
    told: List[OSError] = []

    def handle_error(failed: Any, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            logging.Handler().handleError(record)
            return
        if _writes_to_a_file(failed):
            for handler in (x for x in handlers if getattr(x, "stream", None) is failed.stream):
                handler.setLevel(logging.CRITICAL + 1)
            with suppress(OSError):  # closed now, since the end of the process would write what is left, and fail
                failed.stream.close()
        if not told:
            told.append(error)
            print(f"the log in {folder} could not be written ({error.strerror}); going on without it", file=sys.stderr)

    for handler in handlers:
        handler.handleError = partial(handle_error, handler)  # type: ignore[method-assign]


def _has_no_traceback(record: logging.LogRecord) -> bool:
    return not record.exc_info


def _write_to_files(text: str) -> None:
    """Writes to the log files alone: on the terminal the command itself says how it ended."""
    logger = logging.getLogger("d2kd")
    record = logger.makeRecord(logger.name, logging.ERROR, __file__, 0, text, (), None)
    for handler in logger.handlers:
        if _writes_to_a_file(handler) and record.levelno >= handler.level:
            handler.handle(record)


def _writes_to_a_file(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and handler.stream not in (sys.stdout, sys.stderr)


def log_remarks(remarks: Sequence[Remark]) -> None:
    """Logs what the checks of the data have found."""
    for level, text in remarks:
        logging.getLogger(__name__).log(level, text)
