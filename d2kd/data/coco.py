"""Checks of COCO-format files, to find mistakes before they end a run later or silently spoil it.

What pycocotools, detectron2's ``load_coco_json`` and mapper, or evaluation cannot handle is an error. What they drop or
change silently is counted in a warning.
"""

import gc
import json
import logging
import re
import reprlib
from collections import Counter
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Set, Tuple, Union

import numpy as np

from ..errors import D2kdError
from .images import check_image_files

LISTS = ("images", "categories", "annotations")
REFERENCES = {"image_id": "images", "category_id": "categories"}

# No image is larger than this many pixels, and sums of larger integers could overflow.
MAX_LENGTH = 1e9
# COCO's evaluation ignores larger objects.
MAX_AREA = 1e10
# In pixels: detectron2 drops boxes unless both sides are longer than this.
MIN_SIDE = 1e-5
# In pixels: boxes that extend beyond their image by no more than this are not reported.
TOLERANCE = 1.0
DROPS = "drops them"

MISSING = object()
# Evaluation converts ids to NumPy, which strips NULs. Lone surrogates cannot be written to files.
_UNFIT = re.compile("[\0\ud800-\udfff]")
_LOG = logging.getLogger(__name__)

#: Level and text of a log message.
Remark = Tuple[int, str]


class CocoFile(NamedTuple):
    """An annotation file that can be used for training.

    Attributes:
        path: path of the file.
        classes: class names by category id, sorted by id, which is the order in which detectron2 numbers them.
        images: file name, width and height of each image.
        evaluation_error: why the file cannot be used for evaluation and how to fix that; empty if it can be used.
        warnings: what is dropped or changed silently; empty if nothing is.
        num_empty: number of images without a usable box.
    """

    path: str
    classes: Dict[Any, str]
    images: List[Tuple[str, int, int]]
    evaluation_error: str
    warnings: str
    num_empty: int

    def remarks(self) -> List[Remark]:
        """Returns what to log: the warnings, and the number of images without boxes as information."""
        found = []
        if self.warnings:
            found.append((logging.WARNING, f"{self.path}: {self.warnings}; fix or remove these entries"))
        if self.num_empty:
            text = f"{self.path}: {self.num_empty} of {len(self.images)} images have no usable box"
            found.append((logging.INFO, text))
        return found


def check_coco(json_file: Union[str, Path], image_root: Union[str, Path], evaluated: bool = True) -> CocoFile:
    """Checks that a data set in COCO format can be used, and warns about what detectron2 would silently drop or change.

    Args:
        json_file: the annotation file.
        image_root: the folder that the file names in ``json_file`` are relative to.
        evaluated: whether the data set is also used for evaluation. This requires ``area`` and ``iscrowd`` in all
            annotations, and images that have the size given in the file; the headers of some images are read.

    Returns:
        The content of the file that a run needs.

    Raises:
        D2kdError: the data set cannot be used; the message names the file and the entry and how to fix it.
    """
    found = examine_coco(json_file)
    check_files(found, image_root, evaluated)
    for level, text in found.remarks():
        _LOG.log(level, text)
    return found


def check_files(found: CocoFile, image_root: Union[str, Path], evaluated: bool) -> None:
    """Checks the image files and what evaluation needs; a part of :func:`check_coco`."""
    if evaluated and found.evaluation_error:
        raise D2kdError(found.evaluation_error)
    check_image_files(found.path, image_root, found.images, read_headers=evaluated)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Disables garbage collection, which halves the time to read COCO with its millions of objects."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_no_garbage_collection()
def examine_coco(json_file: Union[str, Path]) -> CocoFile:
    """Checks the annotation file alone; a part of :func:`check_coco`.

    Raises:
        D2kdError: the file cannot be used; the message names the file and the entry and how to fix it.
    """
    content = read_coco(json_file)
    for key in LISTS:
        _check_list(content, json_file, key)
    _raise_first(_dangling_references(content), json_file, "annotations")
    _check_unit(content["annotations"], json_file)
    defects = _defects(content)
    num_empty = len(content["images"]) - len(_images_with_boxes(content["annotations"], defects))
    if num_empty == len(content["images"]):
        raise D2kdError(
            f"{json_file}: no image has a usable box (with an area, inside its image and with iscrowd 0); "
            "fix the annotations or remove this data set"
        )
    missing = next(_invalid_values(content["annotations"], NEEDED_BY_EVALUATION), None)
    return CocoFile(
        path=str(json_file),
        classes=_classes(content),
        images=[(entry["file_name"], entry["width"], entry["height"]) for entry in content["images"]],
        evaluation_error=f"{_describe(missing, json_file, 'annotations')}; evaluation needs it" if missing else "",
        warnings="; ".join([*(x.describe(content["annotations"]) for x in defects), *_entry_warnings(content)]),
        num_empty=num_empty,
    )


def read_classes(json_file: Union[str, Path]) -> Dict[Any, str]:
    """Reads only the class names, by category id and sorted by id.

    Raises:
        D2kdError: they cannot be read; the message names the file and the entry and how to fix it.
    """
    content = read_coco(json_file)
    _check_list(content, json_file, "categories")
    return _classes(content)


def read_coco(json_file: Union[str, Path]) -> Dict[str, Any]:
    """Reads an annotation file and checks that COCO's three lists of objects exist and are not empty.

    Args:
        json_file: the annotation file.

    Returns:
        The content of the file, with at least the non-empty lists ``images``, ``annotations`` and ``categories``.

    Raises:
        D2kdError: the file is missing, not JSON or not in COCO format, or a list is empty.
    """
    try:
        content = json.loads(Path(json_file).read_text(encoding="utf-8"))
    except OSError as error:
        raise D2kdError(
            f"cannot read the annotation file {json_file} ({error.strerror}); put the data set there or set "
            "DETECTRON2_DATASETS to the folder that holds it (see datasets/README.md)"
        ) from None
    except (ValueError, RecursionError) as error:
        raise D2kdError(f"{json_file} is not a JSON file ({error}); use an annotation file in COCO format") from None
    for key in LISTS:
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise D2kdError(f"{json_file} has no list '{key}'; use an annotation file in COCO's detection format")
        if not entries:
            raise D2kdError(f"the list '{key}' of {json_file} is empty; use a file with at least one entry in it")
        for position, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise D2kdError(f"{json_file}: {key}[{position}] is {reprlib.repr(entry)}; make it an object {{...}}")
    return content


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != "" and not _UNFIT.search(value)


def _is_integer(value: Any) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def _is_length(value: Any) -> bool:
    return type(value) is int and 0 < value <= MAX_LENGTH


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -MAX_LENGTH <= value <= MAX_LENGTH


def _is_area(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= MAX_AREA


def _is_box(value: Any) -> bool:
    return type(value) is list and len(value) == 4 and all(map(_is_number, value)) and value[2] >= 0 <= value[3]


def _is_segmentation(value: Any) -> bool:
    """Whether detectron2 can load it. Dense detectors use no masks, so the coordinates of polygons are not checked."""
    if isinstance(value, dict) and value:
        return _is_rle(value.get("counts"), value.get("size"))
    return not value or (isinstance(value, list) and all(isinstance(polygon, list) for polygon in value))


def _is_rle(counts: Any, size: Any) -> bool:
    if not isinstance(counts, list):
        return isinstance(counts, str)
    has_size = isinstance(size, list) and len(size) == 2 and all(map(_is_length, size))
    return has_size and all(type(count) is int and 0 <= count < 2**32 for count in counts)


class Field(NamedTuple):
    """What an entry must have under a key: a test, and its description for messages."""

    key: str
    is_valid: Callable[[Any], bool]
    expected: str
    optional: bool = False


_OWN_ID = Field("id", lambda v: _is_integer(v) or _is_text(v), "a unique integer or string")
FIELDS = {
    "images": (
        _OWN_ID,
        Field("file_name", _is_text, "the name of the image's file"),
        Field("height", _is_length, "the image's height in pixels, an integer above 0"),
        Field("width", _is_length, "the image's width in pixels, an integer above 0"),
    ),
    "categories": (_OWN_ID, Field("name", _is_text, "the name of the class, a string")),
    "annotations": (
        Field("id", _is_integer, "a unique integer"),
        Field("bbox", _is_box, "[x, y, width, height] in pixels, as finite numbers with no negative sizes"),
        Field("area", _is_area, f"a number from 0 to {MAX_AREA:.0e} (for instance width x height)", optional=True),
        Field("iscrowd", lambda v: v in (0, 1), "0, or 1 for a group, which is not trained on", optional=True),
        Field("ignore", lambda v: v == 0, "0 (did you mean iscrowd 1?) or remove it", optional=True),
        Field("segmentation", _is_segmentation, "a list of polygons or an RLE, or remove it", optional=True),
        Field(
            "keypoints",
            lambda v: not v or (isinstance(v, list) and all(map(_is_number, v))),
            "a list of numbers, or remove it",
            optional=True,
        ),
    ),
}
NEEDED_BY_EVALUATION = [
    field._replace(is_valid=lambda _: True, optional=False)
    for field in FIELDS["annotations"]
    if field.key in ("area", "iscrowd")
]


class InvalidValue(NamedTuple):
    """An entry with a wrong or missing value under a key, and how to fix it."""

    position: int
    entry: Dict[str, Any]
    key: str
    fix: str


def _invalid_values(entries: List[Dict[str, Any]], fields: Iterable[Field]) -> Iterator[InvalidValue]:
    for key, is_valid, expected, optional in fields:
        values = [entry[key] for entry in entries if key in entry]
        if (optional or len(values) == len(entries)) and all(map(is_valid, values)):
            continue  # the fast path; the loop below finds the entries that are wrong
        for position, entry in enumerate(entries):
            value = entry.get(key, MISSING)
            if not (optional if value is MISSING else is_valid(value)):
                yield InvalidValue(position, entry, key, f"set it to {expected}")


def _dangling_references(content: Dict[str, Any]) -> Iterator[InvalidValue]:
    """Finds annotations that refer to images or categories that do not exist."""
    for key, listed in REFERENCES.items():
        known = {entry["id"] for entry in content[listed]}
        for position, entry in enumerate(content["annotations"]):
            value = entry.get(key)
            if isinstance(value, (list, dict)) or value not in known:
                yield InvalidValue(position, entry, key, f"set it to an id from '{listed}', or add that entry")


def _raise_first(invalid_values: Iterator[InvalidValue], json_file: Union[str, Path], listed: str) -> None:
    for invalid in invalid_values:
        raise D2kdError(_describe(invalid, json_file, listed))


def _describe(invalid: InvalidValue, json_file: Union[str, Path], listed: str) -> str:
    position, entry, key, fix = invalid
    value = reprlib.repr(entry[key]) if key in entry else ""
    own = f" (id {reprlib.repr(entry['id'])})" if "id" in entry and key != "id" else ""
    return f"{json_file}: {listed}[{position}]{own} has {f'{key} {value}' if value else f'no {key}'}; {fix}"


def _classes(content: Dict[str, Any]) -> Dict[Any, str]:
    return {entry["id"]: entry["name"] for entry in sorted(content["categories"], key=lambda entry: entry["id"])}


def _check_list(content: Dict[str, Any], json_file: Union[str, Path], listed: str) -> None:
    _raise_first(_invalid_values(content[listed], FIELDS[listed]), json_file, listed)
    _check_ids([entry["id"] for entry in content[listed]], json_file, listed)


def _check_ids(ids: List[Any], json_file: Union[str, Path], listed: str) -> None:
    if len(set(map(type, ids))) > 1:
        raise D2kdError(f"{json_file}: the ids of '{listed}' are integers and strings; use one type")
    # Like detectron2, allow repeated ids in minival, a set from 2014 that is known to have them.
    may_repeat = listed == "annotations" and "minival" in str(json_file)
    if len(set(ids)) < len(ids) and not may_repeat:
        repeated, count = Counter(ids).most_common(1)[0]
        raise D2kdError(
            f"{json_file}: {count} entries of '{listed}' have the id {reprlib.repr(repeated)}; give each a unique id"
        )


def _check_unit(annotations: List[Dict[str, Any]], json_file: Union[str, Path]) -> None:
    if not any(number > 1 for annotation in annotations for number in annotation["bbox"]):
        raise D2kdError(
            f"{json_file}: all boxes end within the first pixel, as if normalized by the image size; use pixels"
        )


class Defect(NamedTuple):
    """A defect of some boxes, what training does with them, and a mask of the annotations that have it, (M,) bool."""

    what: str
    consequence: str
    mask: np.ndarray

    def describe(self, annotations: List[Dict[str, Any]]) -> str:
        example = annotations[int(self.mask.argmax())]
        such_as = f"such as annotation {example['id']} with {example['bbox']}"
        return f"{self.what}: {self.mask.sum()}, {such_as} (training {self.consequence})"


def _defects(content: Dict[str, Any]) -> List[Defect]:
    images, annotations = content["images"], content["annotations"]
    place_of = {image["id"]: place for place, image in enumerate(images)}
    places = np.array([place_of[annotation["image_id"]] for annotation in annotations])
    sizes = np.array([(image["width"], image["height"]) for image in images])[places]
    numbers = chain.from_iterable(annotation["bbox"] for annotation in annotations)
    boxes = np.fromiter(numbers, float).reshape(-1, 4)
    low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    flat = np.any(boxes[:, 2:] <= MIN_SIDE, axis=1)
    outside = np.any(np.minimum(high, sizes) - np.maximum(low, 0) <= MIN_SIDE, axis=1)
    protruding = np.any((low < -TOLERANCE) | (high > sizes + TOLERANCE), axis=1)
    shapeless = np.array([_has_no_polygon(annotation.get("segmentation")) for annotation in annotations])
    found = [
        Defect("boxes without area", DROPS, flat),
        Defect("boxes outside their image", DROPS, outside & ~flat),
        Defect("boxes that extend beyond their image", "clips them", protruding & ~outside & ~flat),
        Defect("boxes whose segmentation has no polygon with three points", DROPS, shapeless),
    ]
    return [defect for defect in found if defect.mask.any()]


def _has_no_polygon(segmentation: Any) -> bool:
    """Returns whether detectron2 drops an annotation because of its segmentation."""
    if not segmentation or isinstance(segmentation, dict):
        return False
    return not any(len(polygon) % 2 == 0 and len(polygon) >= 6 for polygon in segmentation)


def _images_with_boxes(annotations: List[Dict[str, Any]], defects: List[Defect]) -> Set[Any]:
    """Returns the ids of the images with a usable box."""
    is_out = np.zeros(len(annotations), dtype=bool)
    for defect in defects:
        is_out |= defect.mask & (defect.consequence == DROPS)
    is_used = (~is_out).tolist()
    return {x["image_id"] for x, trains in zip(annotations, is_used) if trains and not x.get("iscrowd")}


def _entry_warnings(content: Dict[str, Any]) -> Iterator[str]:
    names = Counter(image["file_name"] for image in content["images"])
    repeated = [name for name, count in names.items() if count > 1]
    if repeated:
        yield f"file names shared by several images: {len(repeated)}, such as {reprlib.repr(repeated[0])}"
    low = [annotation["id"] for annotation in content["annotations"] if annotation["id"] < 1]
    if low:
        yield f"annotation ids below 1: {len(low)}, such as {low[0]} (evaluation counts these objects as not found)"
