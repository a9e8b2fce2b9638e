"""Reading and writing checkpoint files: without unpickling code, and never half written."""

import os
import re
import tempfile
from typing import Any, Dict

import torch

from ..errors import D2kdError

_RESAVE = 'torch.save({"state_dict": torch.load(IN, weights_only=False)["state_dict"]}, OUT)'


def read(filename: str, mmap: bool = False) -> Dict[str, Any]:
    """Reads a file written by ``torch.save``; tensors land on the CPU.

    Args:
        filename: a local file.
        mmap: map the file instead of reading all of it.

    Returns:
        The dict the file holds.

    Raises:
        D2kdError: the file is missing, cannot be read, holds something else than a dict, or holds other Python
            objects than tensors and plain values: those are never unpickled, since that can run any code.
    """
    if not os.path.isfile(filename):
        raise D2kdError(f"{filename}: no such file; check the path")
    try:
        loaded = torch.load(filename, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged file raises nearly anything, KeyError included
        raise D2kdError(f"{filename} {_what_is_wrong(error)}") from error
    if not isinstance(loaded, dict):
        raise D2kdError(f"{filename} holds a {type(loaded).__name__}, not a state dict; save model.state_dict()")
    return loaded


def write(filename: str, content: Dict[str, Any]) -> None:
    """Writes a file with ``torch.save`` so that readers see all of it or nothing.

    Raises:
        OSError: the folder cannot be written.
    """
    descriptor, partial = tempfile.mkstemp(dir=os.path.dirname(filename) or ".", suffix=".partial")
    try:
        with os.fdopen(descriptor, "wb") as file:
            torch.save(content, file)
        os.chmod(partial, 0o644)  # mkstemp's 0600 would shut out the other users of a shared cache
        os.replace(partial, filename)
    except BaseException:
        os.remove(partial)
        raise


def _what_is_wrong(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror}); check its permissions"
    if re.search(r"Unsupported (global|class)", str(error)):
        return f"holds other Python objects than weights; if you trust it, re-save what counts: {_RESAVE}"
    return "cannot be read as weights (an unfinished download, a web page?); fetch it again"
