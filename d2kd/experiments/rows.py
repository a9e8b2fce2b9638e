"""The rows of a comparison: how the command line names them, and the config keys that they set."""

import re
from typing import Any, Dict, NamedTuple

from ..errors import D2kdError
from ..methods import check_method_names

PLAIN, SAME_TIME, PSEUDO_LABELS = "plain", "plain, same time", "plain + pseudo-labels"
#: Rows without a teacher during training, by what the command line calls them.
PLAIN_ROWS = {"plain": PLAIN, "same-time": SAME_TIME, "pseudo-labels": PSEUDO_LABELS}


class Row(NamedTuple):
    """One row of the table.

    Attributes:
        label: its name.
        options: keys under MODEL.DISTILL and their values; empty for the plain detector.
    """

    label: str
    options: Dict[str, Any] = {}

    @property
    def distills(self) -> bool:
        """Whether its runs have a teacher."""
        return bool(self.options)

    @property
    def folder(self) -> str:
        """Its name in the names of folders."""
        return re.sub(r"[^A-Za-z0-9.]+", "_", self.label).strip("_").lower()


def parse_row(text: str) -> Row:
    """Reads a row from the command line.

    Args:
        text: "plain", "same-time" or "pseudo-labels"; or methods joined by "+", and after spaces KEY=VALUE of keys
            under MODEL.DISTILL, such as "CrossKD+PKD PKD.WEIGHT=0.5" or "FGD INHERIT=neck,head".

    Raises:
        D2kdError: there is no such method, or a part is not KEY=VALUE.
    """
    if text in PLAIN_ROWS:
        return Row(PLAIN_ROWS[text])
    first, *settings = text.split()
    methods = first.split("+")
    try:
        check_method_names(methods)
    except D2kdError as error:
        raise D2kdError(f"--methods {text}: {error}; without a teacher there are {', '.join(PLAIN_ROWS)}") from error
    options: Dict[str, Any] = {"METHODS": tuple(methods)}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not (key and equals and value):
            raise D2kdError(
                f"--methods {text}: {setting} is not KEY=VALUE, such as PKD.WEIGHT=0.5 or INHERIT=neck,head"
            )
        options[key] = tuple(value.split(",")) if key == "INHERIT" else value
    return Row(text, options)
