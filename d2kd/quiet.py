"""Warnings of other packages that a user can do nothing about. Commands silence them; importing d2kd does not."""

import warnings

KNOWN = (
    r"pkg_resources is deprecated",
    r".*torch\.jit\..* is (deprecated|not supported)",
    r"torch\.meshgrid: in an upcoming release",
)


def quiet_known_warnings() -> None:
    """Silences these warnings in this process, or until the end of a ``warnings.catch_warnings`` block."""
    for message in KNOWN:
        warnings.filterwarnings("ignore", message=message)
