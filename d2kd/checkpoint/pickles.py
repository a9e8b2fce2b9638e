"""Unpickling of numpy arrays and plain containers, without running anything that the file names.

numpy's own ``_reconstruct`` and ``dtype`` are not allowed: ``dtype.__setstate__`` trusts the flags in a pickle, so raw
bytes could become object pointers. Each numpy name is therefore replaced by a stand-in from this file that checks its
arguments. A pickle can also set attributes of objects that it gets (opcode BUILD), so every class here defines
``__setstate__`` and no function has default arguments.
"""

import pickle
import re
from collections import OrderedDict
from typing import IO, Any, Callable, Dict, Tuple

import numpy as np

_PLAIN = re.compile(r"[biufcSU][1-9]\d*")


class ForeignObjectError(Exception):
    """Raised for a pickle that names something other than an array, a plain value or a plain container.

    It is not an ``UnpicklingError``, because torch would hide its message.
    """


class _DType:
    """Stands in for ``numpy.dtype``: numbers and text only, and only their byte order can be set."""

    def __init__(self, code: str, *_: Any) -> None:
        if not isinstance(code, str) or not _PLAIN.fullmatch(code):
            raise ForeignObjectError(f"numpy.dtype {code!r}")
        self.numpy = np.dtype(code)

    def __setstate__(self, state: Tuple[Any, ...]) -> None:
        if state[1] not in ("<", ">", "=", "|") or any(part is not None for part in state[2:5]):
            raise ForeignObjectError("numpy.dtype with fields")
        self.numpy = self.numpy.newbyteorder(state[1])


class _Array(np.ndarray):
    """Stands in for ``numpy.ndarray`` and for the function that creates an empty array to be filled from its state."""

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
    if encoding != "latin1":  # the only one that pickle uses; others would import modules
        raise ForeignObjectError(f"encoding {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""


# Name in the file -> its replacement. numpy 2 renamed its core to _core; files can have either.
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
    """Reads a pickle of numpy arrays and plain containers, including those written by Python 2.

    Raises:
        ForeignObjectError: it names anything else, which was not run.
        Exception: almost any type, if the file is damaged.
    """
    return _Unpickler(file, encoding="latin1").load()
