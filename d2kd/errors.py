"""The exceptions that end a run with one sentence, and what their messages are made of."""

import re
import sys
import traceback
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Callable, Iterable, Iterator

import torch

#: Exit status of a command after a user's mistake.
EXIT_MISTAKE = 2

# How torch's DataLoader and torch.multiprocessing begin such texts.
_FROM_ANOTHER_PROCESS = re.compile(r"\s*(Caught \w+ in |-- Process \d+ )")


class D2kdError(ValueError):
    """A mistake in a config, file or argument.

    The message is one sentence that names the file, key or value and how to mend it; ``train_net.py`` prints it
    without a traceback and exits with status 2.
    """

    def __init__(self, message: object) -> None:
        super().__init__(without_traceback(str(message)))


def without_traceback(text: str) -> str:
    """The last line of what another process raised, which torch hands on with its whole traceback; else the text."""
    if not _FROM_ANOTHER_PROCESS.match(text):
        return text
    return text.strip().splitlines()[-1].rpartition("D2kdError: ")[-1]


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns ``"; did you mean X?"`` for the known name nearest to ``name``, or ``""`` if none is near."""
    matches = get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""


def check_choice(what: str, value: str, known: Iterable[str]) -> None:
    """Raises D2kdError unless a value is one of the known ones; the message says what it is the value of."""
    choices = list(known)
    if value not in choices:
        raise D2kdError(f"{what} is {value!r}; use one of {', '.join(choices)}{nearest(value, choices)}")


def exit_status(run: Callable[[], object]) -> int:
    """Runs what a command does; returns its exit status: 0, or 2 after a mistake, which is told in one sentence."""
    try:
        run()
    except D2kdError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_MISTAKE
    return 0


@contextmanager
def told_in_one_sentence(doing: Callable[[], str], log: Path) -> Iterator[None]:
    """Turns errors of other libraries into a D2kdError; the traceback goes to a file.

    Args:
        doing: says what was tried.
        log: the file; it is overwritten.
    """
    try:
        yield
    except D2kdError:
        raise
    except torch.OutOfMemoryError as error:
        raise D2kdError(
            f"{doing()}: the GPU's memory is full; lower SOLVER.IMS_PER_BATCH (and SOLVER.BASE_LR alike) or "
            "INPUT.MIN_SIZE_TRAIN and INPUT.MAX_SIZE_TRAIN, or set SOLVER.AMP.ENABLED True"
        ) from error
    except Exception as error:
        where = f"the traceback is in {log}" if _write_traceback(error, log) else "no traceback could be written"
        raise D2kdError(f"{doing()}: {kind_and_message(error)}; {where}") from error


def kind_and_message(error: BaseException) -> str:
    """An error in one line."""
    text = without_traceback(str(error))
    return text if text != str(error) else f"{type(error).__name__}: {' '.join(text.split()) or 'without a message'}"


def _write_traceback(error: BaseException, log: Path) -> bool:
    try:
        log.write_text("".join(traceback.format_exception(type(error), error, error.__traceback__)), encoding="utf-8")
    except OSError:
        return False
    return True
