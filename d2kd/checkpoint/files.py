"""Reading checkpoint files without running code from them, and writing them atomically."""

import contextlib
import os
import re
import tempfile
from collections import OrderedDict
from typing import IO, Any, Callable, Dict, Iterator, List, Set

import safetensors.torch
import torch

from ..errors import D2kdError
from . import bounds, pickles

PARTIAL = ".partial"  # suffix of the files left behind by processes that die while writing
_RESAVE_HINT = "save its state dict alone, or as .safetensors"
# What mmdetection stores besides weights: its log, its config, the time. Weights never have any of these types.
_METADATA = re.compile(
    r"(mmengine|mmcv|mmdet|addict|datetime|pathlib)\..+|argparse\.Namespace"
    r"|collections\.defaultdict|builtins\.(getattr|dict|list|int|float)"
)
_REFUSED = re.compile(r"GLOBAL ([\w.]+)")


def read(filename: str, mmap: bool = False) -> Dict[str, Any]:
    """Reads a file of weights: ``.safetensors``, ``.pkl`` (detectron2's zoo, Caffe2), or anything ``torch.load`` reads.

    No code from the file is run. Objects of mmdetection's own classes, which are metadata, become meaningless dicts.

    Args:
        filename: a local file.
        mmap: memory-map a file written by ``torch.save`` instead of reading all of it.

    Returns:
        The dict in the file. Tensors are on the CPU; those of a ``.pkl`` are numpy arrays.

    Raises:
        D2kdError: the file is missing, cannot be read, does not hold a dict, or holds Python objects other than weights
            and plain values.
    """
    if not os.path.isfile(filename):
        raise D2kdError(f"{filename}: no such file; check the path")
    try:
        if filename.endswith(".safetensors"):
            bounds.check_header(filename)
            loaded = safetensors.torch.load_file(filename)
        elif filename.endswith(".pkl"):
            with open(filename, "rb") as file:
                bounds.check_pickle(file, os.path.getsize(filename))
                file.seek(0)
                loaded = pickles.load(file)
        else:
            loaded = _torch_load(filename, mmap)
    except Exception as error:  # a damaged file can raise almost anything, including KeyError
        raise D2kdError(f"{filename} {_what_is_wrong(filename, error)}") from error
    if not isinstance(loaded, dict):
        raise D2kdError(f"{filename} holds a {type(loaded).__name__}, not a state dict; save model.state_dict()")
    return loaded


def write(filename: str, content: Dict[str, Any]) -> None:
    """Writes a file with ``torch.save`` so that readers see all of it or nothing, even after a power failure.

    Raises:
        OSError: the folder cannot be written to, or the disk is full; an existing file of that name is unchanged.
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
    """Opens a file that gets its name once all of it is on disk; until then its name ends with PARTIAL."""
    folder = os.path.dirname(filename) or "."
    descriptor, partial = tempfile.mkstemp(dir=folder, suffix=PARTIAL)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)  # with mkstemp's 0600, other users of a shared cache could not read it
        os.replace(partial, filename)
    except BaseException:
        os.remove(partial)
        raise
    with contextlib.suppress(OSError):  # not all file systems support this; the file itself is already safe
        _sync_folder(folder)


def _save(content: Dict[str, Any], file: Any) -> None:
    try:
        torch.save(content, file)
    except RuntimeError as error:  # if the disk is full, closing torch's zip writer fails and hides the OSError
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
    """Stands in for any class of mmdetection's metadata: instances are OrderedDicts.

    OrderedDict is the only type for which torch accepts both items and a state.
    """

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()


def _torch_load(filename: str, mmap: bool) -> Any:
    """Calls ``torch.load`` with ``weights_only``, with stand-ins for numpy's names and for metadata."""
    metadata = {name: _Metadata for name in _used_names(filename) if _METADATA.fullmatch(name)}
    stand_ins: Dict[str, Callable] = {**metadata, **pickles.STAND_INS}
    named: List[Any] = [(stand_in, name) for name, stand_in in stand_ins.items()]
    with torch.serialization.safe_globals(named):
        return torch.load(filename, map_location="cpu", weights_only=True, mmap=mmap)


def _used_names(filename: str) -> Set[str]:
    """The full names that a file uses; none for a damaged one, of which torch knows better what is wrong."""
    try:
        return {name.replace("__builtin__.", "builtins.") for name in bounds.check_torch(filename)}
    except (bounds.TooMuchError, OSError):
        raise
    except Exception:
        return set()


def _refused_name(error: Exception) -> str:
    """Returns the full name of what torch's unpickler refused, or ``""``."""
    found = _REFUSED.search(str(error))
    name = found[1] if found else ""
    return name if "." in name or not name else f"builtins.{name}"  # torch omits "builtins."


def _what_is_wrong(filename: str, error: Exception) -> str:
    if isinstance(error, bounds.TooMuchError):
        return f"{error}; {_RESAVE_HINT}"
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror}); check its permissions"
    name = str(error) if isinstance(error, pickles.ForeignObjectError) else _refused_name(error)
    if name:
        return f"holds Python objects other than weights ({name}), which could run code; {_RESAVE_HINT}"
    if "TorchScript" in str(error):
        return "is a TorchScript program, not weights; pass the checkpoint it was exported from"
    with open(filename, "rb") as file:
        start = file.read(64).lstrip().lower()
    if not start:
        return "is empty; download it again"
    if start.startswith(b"<"):
        return "is a web page, not weights; open its URL in a browser and download the file itself"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not weights; run git lfs pull"
    return "cannot be read as weights (damaged, or an incomplete download?); download it again"
