"""What a YAML config may ask for, checked before detectron2 reads it: its size, its aliases, and what it builds on."""

import os
from pathlib import Path
from typing import Any, Dict, Iterator, Tuple

import yaml
from fvcore.common.config import BASE_KEY

from .errors import D2kdError

#: Bytes of a config, and values in it with all aliases written out; configs have some thousands and some hundreds.
MAX_BYTES, MAX_VALUES = 1 << 20, 100_000


def check_yaml(path: str, from_paths: Tuple[str, ...] = ()) -> None:
    """Checks a config and those that it builds on.

    Args:
        path: of the file.
        from_paths: files that build on it.

    Raises:
        D2kdError: a file is far too large, by its aliases perhaps, or builds on itself or on a URL.
        yaml.YAMLError: it is not YAML.
    """
    own = os.path.realpath(path)
    if own in from_paths:
        raise D2kdError(f"{path} builds on itself: its {BASE_KEY} leads back to it; name another config there")
    if os.path.getsize(path) > MAX_BYTES:
        raise D2kdError(f"{path} has more than {MAX_BYTES} bytes, which no config has; check the path")
    with open(path, encoding="utf-8") as file:
        root = yaml.compose(file, Loader=yaml.SafeLoader)
    if _values(root, {}) > MAX_VALUES:
        raise D2kdError(
            f"{path} has more than {MAX_VALUES} values when its aliases (*name) are written out; write values instead"
        )
    for base in _bases(root):
        if "://" in base:
            raise D2kdError(f"{path} builds on {base}; download that config and name the file as {BASE_KEY}")
        where = os.path.join(os.path.dirname(path), os.path.expanduser(base))
        if Path(where).is_file():
            check_yaml(where, (*from_paths, own))
        elif os.path.exists(where):
            raise D2kdError(f"{path} builds on {base}, which is no file; name a config as {BASE_KEY}")


def _values(node: Any, known: Dict[int, float]) -> float:
    """Number of values of a node with its aliases written out; infinite if it contains itself."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = float("inf")
        parts = [part for entry in node.value for part in (entry if isinstance(entry, tuple) else (entry,))]
        known[id(node)] = 1 + sum(_values(part, known) for part in parts)
    return known[id(node)]


def _bases(root: Any) -> Iterator[str]:
    """Yields what a config builds on, as it is written there."""
    for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
        if key.value == BASE_KEY:
            yield from (x.value for x in ([value] if isinstance(value, yaml.ScalarNode) else value.value))
