"""Progress bars on a terminal. Elsewhere, as in a file, there are none, and the lines of the log stay as they are."""

import logging
import os
import sys
from contextlib import contextmanager
from typing import Any, Iterator, Sequence

from detectron2.utils import comm
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

FORMAT = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [ETA {remaining}{postfix}]"
#: What detectron2 logs every few iterations while it trains, and every few seconds while it evaluates.
METRICS, EVALUATION = "detectron2.utils.events", "Inference done"


def on_terminal() -> bool:
    """Whether this process shows bars: the first one, if what it prints goes to a terminal with a width."""
    return comm.is_main_process() and sys.stdout.isatty() and os.get_terminal_size(sys.stdout.fileno()).columns > 0


def progress_bar(iterable: Any = None, bar_format: str = FORMAT, **options: Any) -> "tqdm[Any]":
    """Makes a bar that leaves nothing behind; on a terminal only, see :func:`on_terminal`.

    Args:
        iterable: to go through, if the bar is not updated by hand.
        bar_format: of tqdm.
        options: of tqdm.
    """
    shown = {"file": sys.stdout, "leave": False, "dynamic_ncols": True, "disable": not on_terminal()}
    return tqdm(iterable, bar_format=bar_format, **shown, **options)


@contextmanager
def log_above_bars(names: Sequence[str]) -> Iterator[None]:
    """On a terminal, lines of the log stay above the bar, and those that say the same as it go to log.txt alone.

    Args:
        names: of the loggers, which have their handlers.
    """
    if not on_terminal():
        yield
        return
    loggers = [logging.getLogger(name) for name in names]
    handlers = [x for logger in loggers for x in logger.handlers if getattr(x, "stream", None) is sys.stdout]
    for handler in handlers:
        handler.addFilter(_is_news)
    try:
        with logging_redirect_tqdm(loggers):
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return record.name != METRICS and not record.getMessage().startswith(EVALUATION)
