"""Unpickling without running anything a file names: numpy arrays and plain containers, and nothing else.

numpy's own ``_reconstruct`` and ``dtype`` are not admitted: ``dtype.__setstate__`` believes the flags that a pickle
gives it, so that raw bytes become object pointers. Each name of numpy is therefore answered by a stand-in of this file
that checks what it is given. A pickle can set attributes of what it is given (opcode BUILD), hence ``__setstate__`` in
each class and no default argument in any function.
"""

import pickle
import re
from collections import OrderedDict
from typing import IO, Any, Callable, Dict, Tuple

import numpy as np

_PLAIN = re.compile(r"[biufcSU][1-9]\d*")


class ForeignObjectError(Exception):
    """A pickle names something that is neither an array nor a plain value or container.

    No ``UnpicklingError``: torch would hide its message.
    """


class _DType:
    """Stands for ``numpy.dtype``: numbers and text only, and only their byte order can be set."""

    def __init__(self, code: str, *_: Any) -> None:
        if not isinstance(code, str) or not _PLAIN.fullmatch(code):
            raise ForeignObjectError(f"numpy.dtype {code!r}")
        self.numpy = np.dtype(code)

    def __setstate__(self, state: Tuple[Any, ...]) -> None:
        if state[1] not in ("<", ">", "=", "|") or any(part is not None for part in state[2:5]):
            raise ForeignObjectError("numpy.dtype with fields")
        self.numpy = self.numpy.newbyteorder(state[1])


class _Array(np.ndarray):
    """Stands for ``numpy.ndarray`` and the function that makes an empty one, to be filled by its state."""

    def __new__(cls, *_: Any) -> "_Array":
        return super().__new__(cls, (0,), np.uint8)

    def __setstate__(self, state: Tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, raw = state
        super().__setstate__((1, shape, dtype.numpy, fortran, _bytes(raw)))  # numpy checks that the sizes agree


def _bytes(raw: Any) -> Any:
    return raw.encode("latin1") if isinstance(raw, str) else raw  # str: written by Python 2


def _scalar(dtype: _DType, raw: Any) -> Any:
    return np.frombuffer(_bytes(raw), dtype.numpy)[0]


def _from_buffer(buffer: Any, dtype: _DType, shape: Tuple[int, ...], order: str) -> np.ndarray:
    return np.frombuffer(bytearray(buffer), dtype.numpy).reshape(shape, order=order)  # type: ignore[call-overload]


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":  # the only one that pickling uses; others import modules
        raise ForeignObjectError(f"encoding {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""


# Name in the file -> what is given instead. numpy 2 renamed its core to _core; files have either.
STAND_INS: Dict[str, Callable] = {"_codecs.encode": _encode, "builtins.bytes": _no_bytes}
STAND_INS.update({"numpy.ndarray": _Array, "numpy.dtype": _DType})
for _core in ("numpy.core", "numpy._core"):
    STAND_INS[f"{_core}.multiarray._reconstruct"] = _Array
    STAND_INS[f"{_core}.multiarray.scalar"] = _scalar
    STAND_INS[f"{_core}.numeric._frombuffer"] = _from_buffer


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}".replace("__builtin__.", "builtins.")  # Python 2's name
        if full_name == "collections.OrderedDict":
            return OrderedDict
        if full_name not in STAND_INS:
            raise ForeignObjectError(full_name)
        return STAND_INS[full_name]


def load(file: IO[bytes]) -> Any:
    """Reads a pickle of numpy arrays and plain containers, also one written by Python 2.

    Raises:
        ForeignObjectError: it names anything else; that has not been run.
        Exception: of nearly any kind, where the file is damaged.
    """
    return _Unpickler(file, encoding="latin1").load()
