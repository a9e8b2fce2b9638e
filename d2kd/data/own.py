"""A user's own data, from the command line to registered data sets: --train-data, --val-data and --val-split."""

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..checkpoint import files
from ..errors import D2kdError
from .coco import Remark, examine_coco, read_classes, read_coco
from .formats import read_voc, read_yolo, yolo_settings
from .sets import register_coco

TRAIN, VAL, ALL = "train", "val", "all"
FORMS = (
    "a COCO file and the folder of its images (train.json:images), a YOLO data.yaml, or a folder in Pascal VOC's layout"
)


class CocoSet(NamedTuple):
    """A data set in COCO format and the name that it is registered under."""

    name: str
    json_file: str
    image_root: str


@dataclass(frozen=True)
class OwnData:
    """A user's data sets.

    Attributes:
        train: to train on.
        val: to evaluate on.
        classes: names of the classes.
        origin: where the data come from, in words.
    """

    train: Tuple[CocoSet, ...]
    val: Tuple[CocoSet, ...]
    classes: Tuple[str, ...]
    origin: str

    @property
    def names(self) -> Tuple[List[str], List[str]]:
        """Names of the data sets to train on and to evaluate on."""
        return [x.name for x in self.train], [x.name for x in self.val]

    def register(self) -> None:
        """Registers the data sets with detectron2, in place of what their names stood for."""
        for name, json_file, image_root in (*self.train, *self.val):
            if name in DatasetCatalog:
                DatasetCatalog.remove(name)
                MetadataCatalog.remove(name)
            register_coco(name, json_file, image_root)

    def remark(self) -> Remark:
        """What to log: where the data come from and which classes they have."""
        known = f"{len(self.classes)} class{'es' if len(self.classes) > 1 else ''} ({', '.join(self.classes)})"
        evaluated = "" if self.val else "; nothing is evaluated: for that add --val-data, or --val-split 0.2"
        return logging.INFO, f"Own data: {self.origin}; {known} for student and teacher{evaluated}"

    def identity(self) -> Dict[str, Any]:
        """What a resumed run must not change: the annotations to train on, by their digests, wherever they lie."""
        return {"--train-data": [_digest(x.json_file) for x in self.train]}


def _digest(file: str) -> str:
    return f"{os.path.basename(file)} (SHA-256 {hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12]})"


def prepare_own_data(train: Sequence[str], val: Sequence[str], val_split: float, folder: Path) -> OwnData:
    """Reads what the command line names.

    Args:
        train: data sets to train on, each as :data:`FORMS` says. ``data.yaml:<entry>`` and ``<folder>:<list>`` choose a
            part of YOLO's and VOC's data sets, by default train.
        val: data sets to evaluate on, alike, by default val.
        val_split: the fraction of the images of each of ``train`` to keep for evaluation, 0 for none.
        folder: where the COCO files of converted or divided data sets are written.

    Raises:
        D2kdError: a data set cannot be read, or the arguments do not fit together.
    """
    _check_arguments(train, val, val_split)
    if not val and not val_split:
        val = [text for text in train if _has_val(text)]
    sets = {
        split: [_located(text, split, f"own_{name}{_suffix(i)}", folder) for i, text in enumerate(texts)]
        for split, texts, name in ((TRAIN, train, ALL if val_split else TRAIN), (VAL, val, VAL))
    }
    origin = f"training on {', '.join(train) or 'nothing'}"
    if val_split:
        divided = [divide(x, val_split, folder) for x in sets[TRAIN]]
        sets = {TRAIN: [one for one, _ in divided], VAL: [other for _, other in divided]}
        counts = [sum(len(read_coco(x.json_file)["images"]) for x in sets[split]) for split in (TRAIN, VAL)]
        origin += f" without {counts[1]} of {sum(counts)} images, which are for evaluation (--val-split {val_split:g})"
    elif val:
        origin += f", evaluating on {', '.join(val)}"
    first = (sets[TRAIN] or sets[VAL])[0]
    classes = tuple(read_classes(first.json_file).values())
    return OwnData(tuple(sets[TRAIN]), tuple(sets[VAL]), classes, origin)


def _check_arguments(train: Sequence[str], val: Sequence[str], val_split: float) -> None:
    if not 0 <= val_split < 1:
        raise D2kdError(f"--val-split is {val_split:g}; it must be a fraction of the images, such as 0.2")
    if val_split and val:
        raise D2kdError(
            "--val-split takes images to evaluate from --train-data, but --val-data names some; leave one out"
        )
    if val_split and not train:
        raise D2kdError("--val-split needs --train-data to take images from")


def _suffix(number: int) -> str:
    return f"_{number + 1}" if number else ""


def _parts(text: str) -> Tuple[Path, str]:
    """Splits "<path>:<more>", where a path may hold colons too."""
    before, colon, after = text.rpartition(":")
    return (Path(text), "") if not colon or os.path.exists(text) else (Path(before), after)


def _yaml_of(path: Path) -> Optional[Path]:
    """The data.yaml that a path names, itself or inside a folder; None if it names none."""
    file = path / "data.yaml" if path.is_dir() else path
    return file if file.suffix in (".yaml", ".yml") and file.is_file() else None


def _has_val(text: str) -> bool:
    """Whether the data set of a whole YOLO or VOC folder has images to evaluate on as well."""
    path, part = _parts(text)
    if part:
        return False
    file = _yaml_of(path)
    if file:
        return bool({VAL, "valid"} & yolo_settings(file).keys())
    return (path / "ImageSets" / "Main" / f"{VAL}.txt").is_file()


def _located(text: str, split: str, name: str, folder: Path) -> CocoSet:
    """Finds a data set, and converts it if it is not in COCO format.

    Raises:
        D2kdError: there is none, or it cannot be read.
    """
    path, part = _parts(text)
    file = _yaml_of(path)
    if file:
        read = read_yolo(file, part or split)
    elif (path / "Annotations").is_dir():
        read = read_voc(path, part or split)
    elif path.is_dir() or not path.exists():
        what = "is a folder of an unknown layout" if path.is_dir() else "does not exist"
        raise D2kdError(f"--{split}-data {text}: {path} {what}; name {FORMS}")
    else:
        return CocoSet(name, os.path.abspath(path), os.path.abspath(part or path.parent))
    return _written(CocoSet(name, str(folder / f"{name}.json"), os.path.abspath(read.root)), read.content)


def divide(data: CocoSet, fraction: float, folder: Path) -> Tuple[CocoSet, CocoSet]:
    """Divides a data set into images to train on and to evaluate on.

    The images are drawn by the digests of their file names, so the same data give the same parts on any machine, and
    more images change little. Images without boxes are divided by themselves.

    Args:
        data: all images, with a name that says so: own_all.
        fraction: of the images to evaluate on, between 0 and 1.
        folder: where both parts are written.

    Raises:
        D2kdError: the data set cannot be evaluated on, or has fewer than two images with boxes.
    """
    found = examine_coco(data.json_file)
    if found.evaluation_error:
        raise D2kdError(found.evaluation_error)
    content = read_coco(data.json_file)
    with_boxes = {annotation["image_id"] for annotation in content["annotations"] if not annotation.get("iscrowd")}
    if len(with_boxes) < 2:
        raise D2kdError(
            f"{data.json_file} has only one image with boxes, so --val-split cannot divide it; add --val-data"
        )
    chosen = set()
    for annotated in (True, False):
        drawn = sorted((x for x in content["images"] if (x["id"] in with_boxes) == annotated), key=_drawing_order)
        count = round(fraction * len(drawn))
        chosen |= {image["id"] for image in drawn[: min(max(count, 1), len(drawn) - 1) if annotated else count]}
    parts = []
    for split in (TRAIN, VAL):
        name = data.name.replace(ALL, split)
        place = CocoSet(name, str(folder / f"{name}.json"), data.image_root)
        parts.append(_written(place, _part(content, lambda image, split=split: (image in chosen) == (split == VAL))))
    return parts[0], parts[1]


def _drawing_order(image: Dict[str, Any]) -> str:
    return hashlib.sha256(str(image["file_name"]).encode()).hexdigest()


def _part(content: Dict[str, Any], is_in: Any) -> Dict[str, Any]:
    """The images that a test selects by id, with their annotations."""
    return {
        **content,
        "images": [x for x in content["images"] if is_in(x["id"])],
        "annotations": [x for x in content["annotations"] if is_in(x["image_id"])],
    }


def _written(data: CocoSet, content: Dict[str, Any]) -> CocoSet:
    """Writes an annotation file, as several processes may at the same time."""
    try:
        os.makedirs(os.path.dirname(data.json_file), exist_ok=True)
        files.write_text(data.json_file, json.dumps(content))
    except OSError as error:
        raise D2kdError(
            f"{data.json_file} cannot be written ({error.strerror}); choose another output folder"
        ) from error
    return data
