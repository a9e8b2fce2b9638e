"""Reading YOLO's and Pascal VOC's folders, as detectron2's dicts and from these as COCO's content."""

import os
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Sequence, Tuple
from xml.etree import ElementTree

import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.data.datasets.pascal_voc import load_voc_instances
from detectron2.structures import BoxMode
from PIL import Image, UnidentifiedImageError

from ..errors import D2kdError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


class Read(NamedTuple):
    """A data set that was read.

    Attributes:
        content: in COCO format; file names are relative to ``root``.
        root: folder of the images.
    """

    content: Dict[str, Any]
    root: Path


def read_yolo(file: Path, split: str) -> Read:
    """Reads a data set in YOLO's layout: ``images/x.jpg`` and for each ``labels/x.txt``, ``class cx cy w h`` per line.

    Sizes are relative to the image. Lines with more numbers are polygons, of which the bounding box is taken. An image
    without a label file has no objects.

    Args:
        file: data.yaml, with ``names`` and, for each split, a folder of images or a text file that lists them, or
            several of these.
        split: "train", "val" or "test".

    Raises:
        D2kdError: a file is missing or damaged.
    """
    settings = yolo_settings(file)
    names = settings["names"]
    classes = [str(name) for _, name in sorted(names.items())] if isinstance(names, Mapping) else list(map(str, names))
    images = [path for place in yolo_places(file, settings, split) for path in _images_at(place)]
    if not images:
        raise D2kdError(f"{file}: there are no images in its {split!r}; correct that entry")
    root = Path(os.path.commonpath([path.parent for path in images]))
    return Read(
        to_coco([_yolo_image(number, path, len(classes)) for number, path in enumerate(images)], classes, root), root
    )


def yolo_settings(file: Path) -> Dict[str, Any]:
    """The content of a data.yaml; raises D2kdError if it names no classes."""
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise D2kdError(f"{file} cannot be read ({error}); name the data.yaml of a YOLO data set") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("names"), (list, dict)) or not settings["names"]:
        raise D2kdError(f"{file} has no 'names', the list of classes; name the data.yaml of a YOLO data set")
    return settings


def yolo_places(file: Path, settings: Mapping[str, Any], split: str) -> List[Path]:
    """Where the images of a split are; raises D2kdError if that is nowhere."""
    entry = settings.get(split) or (settings.get("valid") if split == "val" else None)
    if not entry:
        raise D2kdError(f"{file} has no entry {split!r}; add one, or name another: {file}:<entry>")
    root = file.parent / str(settings.get("path") or ".")
    found = []
    for place in entry if isinstance(entry, list) else [entry]:
        # Roboflow writes ../train/images and means train/images.
        candidates = [root / place, file.parent / place, file.parent / str(place).removeprefix("../")]
        existing = [candidate for candidate in candidates if candidate.exists()]
        if not existing:
            raise D2kdError(f"{file}: {split} is {place}, but there is no {candidates[0]}; correct 'path' or {split!r}")
        found.append(existing[0])
    return found


def _images_at(place: Path) -> List[Path]:
    if place.is_dir():
        return sorted(path for path in place.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    lines = place.read_text(encoding="utf-8").splitlines()
    return [place.parent / line.strip() for line in lines if line.strip()]


def _yolo_image(number: int, path: Path, num_classes: int) -> Dict[str, Any]:
    try:
        with Image.open(path) as image:
            width, height = image.size
    except (OSError, UnidentifiedImageError) as error:
        raise D2kdError(f"the image {path} cannot be read ({error}); fix or remove it") from error
    boxes = list(_yolo_boxes(label_file(path), num_classes, (width, height)))
    return {"file_name": path, "image_id": number, "width": width, "height": height, "annotations": boxes}


def label_file(image: Path) -> Path:
    """YOLO's label file of an image: in the folder ``labels`` in place of the last ``images`` of its path."""
    parts = list(image.parts)
    if "images" in parts[:-1]:
        parts[len(parts) - 2 - parts[-2::-1].index("images")] = "labels"
    return Path(*parts).with_suffix(".txt")


def _yolo_boxes(file: Path, num_classes: int, size: Tuple[int, int]) -> Iterator[Dict[str, Any]]:
    if not file.is_file():
        return
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            category, *numbers = [float(word) for word in line.split()]
            corners = yolo_box(numbers)
            if category not in range(num_classes):
                raise ValueError(f"there is no class {category:g}")
        except ValueError as error:
            raise D2kdError(
                f"{file}, line {number}: {error}; write <class from 0 to {num_classes - 1}> <x center> <y center> "
                "<width> <height>, the last four between 0 and 1"
            ) from None
        box = [corner * size[axis % 2] for axis, corner in enumerate(corners)]
        yield {"category_id": int(category), "bbox": box, "bbox_mode": BoxMode.XYXY_ABS}


def yolo_box(numbers: Sequence[float]) -> Tuple[float, float, float, float]:
    """Corners of a box or of a polygon's bounding box, relative to the image, cut off at its border.

    Raises:
        ValueError: these are no four numbers and no polygon, or they are not relative.
    """
    if len(numbers) != 4 and (len(numbers) < 6 or len(numbers) % 2):
        raise ValueError(f"{len(numbers)} numbers after the class")
    if not all(-0.01 <= x <= 1.01 for x in numbers):
        raise ValueError("numbers that are not between 0 and 1")
    xs, ys = numbers[0::2], numbers[1::2]
    if len(numbers) == 4:
        (x, width), (y, height) = xs, ys
        xs, ys = [x - width / 2, x + width / 2], [y - height / 2, y + height / 2]
    low_x, low_y, high_x, high_y = (min(max(x, 0.0), 1.0) for x in (min(xs), min(ys), max(xs), max(ys)))
    return low_x, low_y, high_x, high_y


def read_voc(folder: Path, split: str) -> Read:
    """Reads a data set in Pascal VOC's layout with detectron2's reader: Annotations, JPEGImages, ImageSets/Main.

    The classes are those of all annotation files, by name. Objects marked as difficult count as any other.

    Args:
        folder: such as VOCdevkit/VOC2007.
        split: name of a file in ImageSets/Main.

    Raises:
        D2kdError: a file is missing or damaged.
    """
    if not (folder / "ImageSets" / "Main" / f"{split}.txt").is_file():
        raise D2kdError(
            f"{folder} has no ImageSets/Main/{split}.txt, which lists the images of {split!r}, one name without its "
            f"suffix per line; write it, or name another list: {folder}:<list>"
        )
    classes = voc_classes(folder / "Annotations")
    try:
        dicts = load_voc_instances(str(folder), split, classes)
    except (OSError, ValueError, AttributeError, IndexError, TypeError) as error:
        raise D2kdError(f"{folder}: the images of {split!r} cannot be read ({error}); correct these files") from error
    images = {path.stem: path for path in sorted((folder / "JPEGImages").glob("*"), reverse=True)}
    for entry in dicts:  # the reader expects JPEG files
        entry["image_id"] = stem = str(entry["image_id"])
        entry["file_name"] = images.get(stem, entry["file_name"])
    return Read(to_coco(dicts, classes, folder), folder)


def voc_classes(folder: Path) -> List[str]:
    """All class names in VOC's annotation files, sorted; raises D2kdError if there are none or a file is damaged."""
    found = set()
    for file in sorted(folder.glob("*.xml")):
        try:
            found |= {entry.findtext("name", "") for entry in ElementTree.parse(file).iter("object")}
        except (ElementTree.ParseError, OSError) as error:
            raise D2kdError(f"{file} is not an annotation in Pascal VOC's format ({error}); correct it") from error
    if not found:
        raise D2kdError(f"{folder} has no annotation files with objects; name a folder in Pascal VOC's layout")
    return sorted(found)


def to_coco(dicts: List[Dict[str, Any]], classes: Sequence[str], root: Path) -> Dict[str, Any]:
    """Converts detectron2's dicts to COCO's content, by detectron2's own converter.

    Args:
        dicts: with paths as ``file_name``.
        classes: their names.
        root: the folder that file names are relative to afterwards.
    """
    name = "d2kd_converted"
    relative = [{**entry, "file_name": Path(entry["file_name"]).relative_to(root).as_posix()} for entry in dicts]
    DatasetCatalog.register(name, lambda: relative)
    MetadataCatalog.get(name).set(thing_classes=list(classes))
    try:
        content = convert_to_coco_dict(name)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    return {key: content.get(key, []) for key in ("images", "annotations", "categories")}
