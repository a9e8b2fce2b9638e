"""What a file of weights may cost: its size, depth and names are checked before anything in it is made.

A few bytes can ask for gigabytes or for hours: compressed zeros, an index into an empty memo, a tuple that holds itself
many times over as a key. The checks read the file once and make nothing of it.
"""

import os
import pickletools
import zipfile
from typing import IO, Any, Dict, List, Set

#: Bytes of the header of a .safetensors file: about a hundred thousand tensors.
MAX_HEADER = 16 << 20
#: How many times its own size a file may unpack to; weights hardly compress at all.
MAX_EXPANSION = 10
# What is allowed to any file, however small: bytes, and steps of hashing.
_ALWAYS = 1 << 20
# torch's old format is a sequence of pickles, followed by raw numbers.
_PICKLES = 5

_UNHASHABLE = {"EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "BUILD"}
_PUT, _GET = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}
_OPENED = pickletools.markobject


class TooMuchError(Exception):
    """A file asks for far more memory or time than its weights need. The message completes "<file> ..."."""


def check_header(path: str) -> None:
    """Raises TooMuchError if the header of a .safetensors file is longer than that of any detector."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER and length < os.path.getsize(path):
        raise TooMuchError(
            f"has a header of {length / 1e6:.0f} MB, far more than the names of any detector's tensors need"
        )


def check_torch(path: str) -> Set[str]:
    """Checks a file of torch, zipped or in the old format; returns the full names that its pickles use.

    Raises:
        TooMuchError: it asks for too much.
        Exception: of almost any type, if it is damaged.
    """
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            return set().union(*(check_pickle(file, os.path.getsize(path)) for _ in range(_PICKLES)))
    with zipfile.ZipFile(path) as archive:
        limit = MAX_EXPANSION * os.path.getsize(path) + _ALWAYS
        unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > limit:
            raise TooMuchError(f"unpacks to {unpacked / 1e6:.0f} MB, more than {MAX_EXPANSION} times its own size")
        found: Set[str] = set()
        for entry in archive.infolist():
            if os.path.basename(entry.filename) == "data.pkl":
                with archive.open(entry) as file:
                    found |= check_pickle(file, entry.file_size)
        return found


def check_pickle(file: IO[bytes], size: int) -> Set[str]:
    """Checks one pickle, up to its end; returns the full names that it uses.

    It follows the unpickler's stack, on which stands, instead of each object, the number of steps that hashing it
    takes: that of a tuple is the sum of its items'.

    Args:
        file: opened at the beginning of the pickle.
        size: of the file in bytes.

    Raises:
        TooMuchError: it asks for too much.
        Exception: of almost any type, if it is damaged.
    """
    limit = MAX_EXPANSION * size + _ALWAYS
    stack: List[int] = []
    marks: List[int] = []
    memo: Dict[Any, int] = {}
    names, texts, total = set(), ["", ""], 0
    for opcode, argument, _ in pickletools.genops(file):
        if isinstance(argument, str):
            texts = [texts[1], argument]
        if opcode.name in ("GLOBAL", "INST"):
            names.add(".".join(str(argument).split(" ", 1)))
        elif opcode.name == "STACK_GLOBAL":
            names.add(".".join(texts))
        if opcode.name in _PUT or opcode.name == "MEMOIZE":
            index = len(memo) if argument is None else argument
            if index > size:
                raise TooMuchError(f"has an index of {index} in its pickle, more than it has bytes")
            memo[index] = stack[-1]
        elif opcode.name in _GET:
            stack.append(memo[argument])
        elif opcode.name == "MARK":
            marks.append(len(stack))
        elif opcode.name == "POP" and marks and marks[-1] == len(stack):
            marks.pop()
        else:
            taken = _take(stack, marks, opcode)
            if taken > limit or total > limit:
                raise TooMuchError("has nested keys that would take hours to read")
            stack += [1 if opcode.name in _UNHASHABLE else 1 + taken] * len(opcode.stack_after)
            total += 0 if "TUPLE" in opcode.name else taken
    return names


def _take(stack: List[int], marks: List[int], opcode: pickletools.OpcodeInfo) -> int:
    """Takes what an opcode takes off the stack; returns the sum."""
    count = len(opcode.stack_before)
    if _OPENED in opcode.stack_before:
        count = opcode.stack_before.index(_OPENED) + len(stack) - marks.pop()
    if count > len(stack):
        raise IndexError("the pickle takes more than it has made")
    taken = stack[len(stack) - count :]
    del stack[len(stack) - count :]
    return sum(taken)
