"""Reading and writing checkpoint files: without running code from them, and never half written."""

import contextlib
import os
import pickle
import re
import tempfile
from collections import OrderedDict
from typing import IO, Any, Callable, Dict, Iterator, List

import safetensors.torch
import torch

from ..errors import D2kdError
from . import pickles

PARTIAL = ".partial"  # ends the name of what a process leaves behind that dies while it writes
_RESAVE_HINT = "have it saved again with its state dict alone, or as .safetensors"
# What mmdetection keeps beside the weights: its log, its config, the time. No weights are ever of these types.
_METADATA = re.compile(
    r"(mmengine|mmcv|mmdet|addict|datetime|pathlib)\..+|argparse\.Namespace"
    r"|collections\.defaultdict|builtins\.(getattr|dict|list|int|float)"
)
_REFUSED = re.compile(r"GLOBAL ([\w.]+)")


def read(filename: str, mmap: bool = False) -> Dict[str, Any]:
    """Reads a file of weights: ``.safetensors``, ``.pkl`` (detectron2's zoo, Caffe2), anything else by ``torch.load``.

    No code from the file is run. mmdetection's metadata, objects of its own classes, become dicts that mean nothing.

    Args:
        filename: a local file.
        mmap: map a file of ``torch.save`` instead of reading all of it.

    Returns:
        The dict the file holds; tensors are on the CPU, those of a ``.pkl`` are numpy arrays.

    Raises:
        D2kdError: the file is missing, cannot be read, holds something else than a dict, or holds other Python
            objects than weights and plain values.
    """
    if not os.path.isfile(filename):
        raise D2kdError(f"{filename}: no such file; check the path")
    try:
        if filename.endswith(".safetensors"):
            loaded = safetensors.torch.load_file(filename)
        elif filename.endswith(".pkl"):
            with open(filename, "rb") as file:
                loaded = pickles.load(file)
        else:
            loaded = _torch_load(filename, mmap)
    except Exception as error:  # a damaged file raises nearly anything, KeyError included
        raise D2kdError(f"{filename} {_what_is_wrong(filename, error)}") from error
    if not isinstance(loaded, dict):
        raise D2kdError(f"{filename} holds a {type(loaded).__name__}, not a state dict; save model.state_dict()")
    return loaded


def write(filename: str, content: Dict[str, Any]) -> None:
    """Writes a file with ``torch.save`` so that readers see all of it or nothing, also after a loss of power.

    Raises:
        OSError: the folder cannot be written, or the disk is full; a file of that name is as it was.
    """
    with _replacing(filename) as file:
        _save(content, file)


def write_text(filename: str, text: str) -> None:
    """Writes a text file as :func:`write` does.

    Raises:
        OSError: as :func:`write`.
    """
    with _replacing(filename) as file:
        file.write(text.encode())


@contextlib.contextmanager
def _replacing(filename: str) -> Iterator[IO[bytes]]:
    """A file that takes its name when all of it is on the disk; until then its name ends with PARTIAL."""
    folder = os.path.dirname(filename) or "."
    descriptor, partial = tempfile.mkstemp(dir=folder, suffix=PARTIAL)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)  # mkstemp's 0600 would shut out the other users of a shared cache
        os.replace(partial, filename)
    except BaseException:
        os.remove(partial)
        raise
    with contextlib.suppress(OSError):  # not every file system can; the file itself is safe already
        _sync_folder(folder)


def _save(content: Dict[str, Any], file: Any) -> None:
    try:
        torch.save(content, file)
    except RuntimeError as error:  # its zip writer stumbles while it closes, and hides that the disk is full
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Metadata:
    """Stands for any class of mmdetection's metadata: whatever is made of it is an OrderedDict.

    That is the one type of which torch takes both items and a state.
    """

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()


def _torch_load(filename: str, mmap: bool) -> Any:
    """``torch.load`` with ``weights_only``, which gives stand-ins for numpy's names and for metadata."""
    stand_ins: Dict[str, Callable] = dict(pickles.STAND_INS)
    while True:
        named: List[Any] = [(stand_in, name) for name, stand_in in stand_ins.items()]
        try:
            with torch.serialization.safe_globals(named):
                return torch.load(filename, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            name = _refused_name(error)
            if name in stand_ins or not _METADATA.fullmatch(name):
                raise
            stand_ins[name] = _Metadata


def _refused_name(error: Exception) -> str:
    """Returns the full name of what torch's unpickler refused, or ``""``."""
    found = _REFUSED.search(str(error))
    name = found[1] if found else ""
    return name if "." in name or not name else f"builtins.{name}"  # torch leaves out "builtins."


def _what_is_wrong(filename: str, error: Exception) -> str:
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror}); check its permissions"
    name = str(error) if isinstance(error, pickles.ForeignObjectError) else _refused_name(error)
    if name:
        return f"holds other Python objects than weights ({name}), not loaded as they can run code; {_RESAVE_HINT}"
    if "TorchScript" in str(error):
        return "is a TorchScript program, not weights; pass the checkpoint it was exported from"
    with open(filename, "rb") as file:
        start = file.read(64).lstrip().lower()
    if not start:
        return "is empty; fetch it again"
    if start.startswith(b"<"):
        return "is a web page, not weights; open its address in a browser and download the file itself"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not weights; run git lfs pull"
    return "cannot be read as weights (damaged, or an unfinished download?); fetch it again"
