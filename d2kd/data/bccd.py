"""BCCD, a data set of blood cells (RBC, WBC, platelets), from its original files or from files in COCO format."""

import os
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from ..errors import D2kdError
from .blood_cells import CLASS_NAMES
from .coco import check_coco, read_coco
from .sets import write_coco

SPLITS = ("train", "val", "test")


def find_voc(source: Path) -> Optional[Path]:
    """Returns which of ``source`` and ``source/BCCD`` has JPEGImages, Annotations and ImageSets, or None."""
    needed = ("JPEGImages", "Annotations", "ImageSets/Main")
    found = (folder for folder in (source, source / "BCCD") if all((folder / name).is_dir() for name in needed))
    return next(found, None)


def load_source(source: Path) -> Tuple[Dict[str, Dict[str, Any]], Path, List[str]]:
    """Reads and checks all of a source.

    Args:
        source: folder in COCO or VOC layout.

    Returns:
        The COCO content of each split, the folder with the images, and one line per annotation that was dropped.

    Raises:
        D2kdError: ``source`` has neither layout, or a file in it is missing or damaged.
    """
    voc = find_voc(source)
    if voc is not None:
        dropped: List[str] = []
        return {split: convert_split(voc, split, dropped) for split in SPLITS}, voc / "JPEGImages", dropped
    if not (source / "images").is_dir():
        raise D2kdError(
            f"{source} has neither BCCD/JPEGImages, BCCD/Annotations and BCCD/ImageSets/Main nor images/ and "
            "instances_{train,val,test}.json; pass a checkout of https://github.com/Shenggan/BCCD_Dataset"
        )
    files = {split: source / f"instances_{split}.json" for split in SPLITS}
    for file in files.values():
        check_coco(file, source / "images")
    return {split: read_coco(file) for split, file in files.items()}, source / "images", []


def convert_split(voc: Path, split: str, dropped: List[str]) -> Dict[str, Any]:
    """Converts one split from VOC to COCO.

    Args:
        voc: folder with Annotations and ImageSets.
        split: name of the split.
        dropped: one line is appended for each annotation that is dropped.

    Returns:
        The content of the annotation file of the split.

    Raises:
        D2kdError: a file is missing or damaged.
    """
    content: Dict[str, Any] = {
        "info": {
            "description": "BCCD (blood cell count and detection)",
            "url": "https://github.com/Shenggan/BCCD_Dataset",
        },
        "licenses": [],
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name, "supercategory": "cell"} for i, name in enumerate(CLASS_NAMES, 1)],
    }
    for stem in read_text(voc / "ImageSets" / "Main" / f"{split}.txt").split():
        image, annotations = convert_image(voc / "Annotations" / f"{stem}.xml", f"{stem}.jpg", dropped)
        content["images"].append(image)
        content["annotations"] += annotations
    for number, annotation in enumerate(content["annotations"], 1):
        annotation["id"] = number
    return content


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise D2kdError(f"cannot read {path} ({error}); get a complete copy of BCCD_Dataset") from None


def convert_image(xml: Path, file_name: str, dropped: List[str]) -> Tuple[Dict[str, Any], List[Dict[str, Any]]]:
    """Converts the VOC file of one image.

    Args:
        xml: VOC annotation file; the number at the end of its name becomes the image id.
        file_name: file name of the image.
        dropped: one line is appended for each box without area.

    Returns:
        The COCO entry of the image, and those of its boxes, without ``id``.

    Raises:
        D2kdError: the file is missing or damaged, or has a class that is not in BCCD.
    """
    text = read_text(xml)
    try:
        tree = ElementTree.fromstring(text)
        number = re.search(r"\d+$", xml.stem)
        image = {
            "id": int(number[0]),  # type: ignore[index]
            "file_name": file_name,
            "width": int(tree.findtext("size/width", "")),
            "height": int(tree.findtext("size/height", "")),
        }
        objects = [convert_object(entry) for entry in tree.iter("object")]
    except (ElementTree.ParseError, TypeError, ValueError) as error:
        raise D2kdError(f"{xml} is not a VOC annotation of BCCD ({error}); get it again from BCCD_Dataset") from None
    annotations = []
    for category, corners in objects:
        xmin, ymin, xmax, ymax = corners
        if xmax <= xmin or ymax <= ymin:
            dropped.append(f"{xml.stem}: {CLASS_NAMES[category - 1]} box without area {corners}")
            continue
        # VOC counts pixels from 1, and boxes include both corners.
        bbox = [xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1]
        annotations.append(
            {"image_id": image["id"], "category_id": category, "bbox": bbox, "area": bbox[2] * bbox[3], "iscrowd": 0}
        )
    return image, annotations


def convert_object(entry: ElementTree.Element) -> Tuple[int, List[int]]:
    """Returns the category id and [xmin, ymin, xmax, ymax] of a VOC object; raises ValueError if it is invalid."""
    name = entry.findtext("name", "")
    if name not in CLASS_NAMES:
        raise ValueError(f"unknown class '{name}'")
    return CLASS_NAMES.index(name) + 1, [
        int(entry.findtext(f"bndbox/{corner}", "")) for corner in ("xmin", "ymin", "xmax", "ymax")
    ]


def place(source: Path, target: Path, link: bool) -> None:
    """Copies or links a file atomically, replacing an existing one."""
    temporary = target.with_name(target.name + ".tmp")
    temporary.unlink(missing_ok=True)
    if link:
        temporary.symlink_to(source.resolve())
    else:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def prepare(source: Path, output: Path, link: bool = False) -> Tuple[Dict[str, Dict[str, Any]], List[str]]:
    """Reads a source and writes the data set. Nothing is written before all of the source has been read.

    Args:
        source: folder in COCO or VOC layout.
        output: folder for ``images``, ``instances_<split>.json`` and the license, if there is one.
        link: link the images instead of copying them.

    Returns:
        The COCO content of each split, and one line per annotation that was dropped.

    Raises:
        D2kdError: ``source`` is not usable, or is the same as ``output``.
    """
    if source.resolve() == output.resolve():
        raise D2kdError(f"SOURCE and --output are both {source}; choose another --output")
    contents, images, dropped = load_source(source)
    names = [image["file_name"] for content in contents.values() for image in content["images"]]
    missing = [name for name in names if not (images / name).is_file()]
    if missing:
        raise D2kdError(f"{images / missing[0]} and {len(missing) - 1} more images are missing; get a complete copy")
    (output / "images").mkdir(parents=True, exist_ok=True)
    for name in names:
        place(images / name, output / "images" / name, link)
    for license_file in source.glob("LICENSE*"):
        place(license_file, output / license_file.name, link=False)
    # Written last, so that an interrupted run leaves no annotation file without its images.
    for split, content in contents.items():
        write_coco(content, output / f"instances_{split}.json")
    return contents, dropped


def summary(contents: Dict[str, Dict[str, Any]], dropped: List[str]) -> str:
    """Returns a table of the images and boxes per class and split, followed by what was dropped."""
    row = "{:<6}" + "{:>10}" * (len(CLASS_NAMES) + 2)
    lines = [row.format("split", "images", *CLASS_NAMES, "boxes")]
    for split, content in contents.items():
        names = {category["id"]: category["name"] for category in content["categories"]}
        count = Counter(names[annotation["category_id"]] for annotation in content["annotations"])
        per_class = [count[name] for name in CLASS_NAMES]
        lines.append(row.format(split, len(content["images"]), *per_class, len(content["annotations"])))
    return "\n".join(lines + [f"dropped {line}" for line in dropped])
