"""What a run learns from, recorded so that a resumed run learns from the same: its teacher and annotation files."""

import hashlib
import os
from typing import Any, Dict, Iterator, Mapping, Optional
from urllib.parse import urlparse

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..checkpoint.names import some
from ..config import find_config
from ..errors import D2kdError
from ..nodes import resolved
from ..teacher import read_config
from .recipe import Recipe, flatten

#: Beginnings of the keys of a teacher's config that decide what it outputs; its other keys tell how it was trained.
_DECIDE = ("MODEL.", "INPUT.FORMAT", "DATASETS.TRAIN", "model.")
_DO_NOT = ("MODEL.WEIGHTS", "MODEL.DEVICE", "MODEL.DISTILL.")
_CHUNK = 1 << 20
_TEACHER, DATA_FILE = SOURCE_FILES = ("teacher.json", "data.json")

Sources = Dict[str, Dict[str, Any]]


def describe_sources(recipe: Recipe) -> Sources:
    """Describes the teacher, with its resolved config, and each annotation file to train on, with their SHA-256.

    Returns:
        By the name of the file that records it, what is written there as JSON.

    Raises:
        D2kdError: a file cannot be read.
    """
    found: Sources = {DATA_FILE: dict(_annotation_files(recipe))}
    if recipe.teacher:
        found[_TEACHER] = {**describe_file(recipe.teacher, "the teacher's weights"), "config": _config(recipe)}
    return found


def changes(saved: Mapping[str, Any], present: Sources) -> Iterator[str]:
    """Says what is not as it was when a run was started. What was not recorded then is not compared.

    Args:
        saved: as :func:`describe_sources` returned it then; damaged entries are left out.
        present: as it returns it now.
    """
    for name, file in present[DATA_FILE].items():
        yield from _change(f"the annotation file {file['file']} of data set {name}", saved[DATA_FILE].get(name), file)
    teacher, before = present.get(_TEACHER), saved[_TEACHER]
    if teacher is None:
        return
    yield from _change(f"the teacher {teacher['file']}", before, teacher)
    config = before.get("config")
    if isinstance(config, dict) and config and teacher["config"]:
        values = list(_changed_values(config, teacher["config"]))
        if values:
            yield f"the teacher's config has changed since this run was started: {some(values)}"


def describe_file(path: str, what: str) -> Dict[str, str]:
    """Returns the path as given, the local file and its SHA-256.

    Args:
        path: anything that detectron2's PathManager resolves.
        what: it is, for messages.

    Raises:
        D2kdError: there is no such file.
    """
    try:
        local = PathManager.get_local_path(urlparse(path)._replace(query="").geturl())
        return {"path": path, "file": os.path.abspath(local), "sha256": _sha256(local)}
    except (OSError, RuntimeError, KeyError) as error:  # the last two: unknown to detectron2's catalog
        raise D2kdError(f"{what} {path} cannot be read ({error}); check the path") from error


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(_CHUNK), b""):
            digest.update(chunk)
    return digest.hexdigest()


def _annotation_files(recipe: Recipe) -> Iterator[Any]:
    """Yields (name, description) of each training set that has an annotation file."""
    for name in recipe.train_sets:
        path = MetadataCatalog.get(name).get("json_file", None)
        if path is not None and os.path.isfile(path):
            yield name, describe_file(path, f"data set {name}:")


def _config(recipe: Recipe) -> Dict[str, Any]:
    """What decides in the teacher's own config, resolved, by key; empty if it has none."""
    file = recipe.get("MODEL.DISTILL.TEACHER.CONFIG_FILE")
    if not file:
        return {}
    config = read_config(find_config(file), recipe.get("MODEL.DISTILL.TEACHER.OPTS") or [])
    values = flatten(config if isinstance(config, CfgNode) else resolved(config))
    return {key: value for key, value in values.items() if key.startswith(_DECIDE) and not key.startswith(_DO_NOT)}


def _change(what: str, before: Any, now: Mapping[str, str]) -> Iterator[str]:
    digest: Optional[Any] = before.get("sha256") if isinstance(before, dict) else None
    if isinstance(digest, str) and digest != now["sha256"]:
        yield (
            f"{what} is not the one this run was started with ({before.get('file')}, SHA-256 {digest[:12]}..., now "
            f"{now['sha256'][:12]}...)"
        )


def _changed_values(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted(before.keys() & now.keys()):  # other versions of the code have other keys
        if before[key] != now[key]:
            yield f"{key} was {before[key]} and is {now[key]}"
