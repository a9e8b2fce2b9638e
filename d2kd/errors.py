"""The one exception a user's mistake raises, and what its messages are made of."""

from difflib import get_close_matches
from typing import Iterable


class D2kdError(ValueError):
    """A mistake in a config, file or argument.

    The message is one sentence that names the file, key or value and how to mend it; ``train_net.py`` prints it
    without a traceback and exits with status 2.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns ``"; did you mean X?"`` for the known name nearest to ``name``, or ``""`` if none is near."""
    matches = get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""


def check_choice(what: str, value: str, known: Iterable[str]) -> None:
    """Raises D2kdError unless a value is one of the known ones; the message says what it is the value of."""
    choices = list(known)
    if value not in choices:
        raise D2kdError(f"{what} is {value!r}; use one of {', '.join(choices)}{nearest(value, choices)}")
