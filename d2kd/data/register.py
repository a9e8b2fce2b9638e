"""COCO-format data sets: where they lie, their registration with detectron2, and checks of their files."""

import json
import os
from pathlib import Path
from typing import Any, Dict, Union

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from d2kd.errors import D2kdError

BUILTIN_SPLITS = {"blood_cells": ("train", "val"), "bccd": ("train", "val", "test")}
IMAGES_CHECKED = 10


def dataset_root() -> Path:
    """Returns the folder of all data sets: the variable ``DETECTRON2_DATASETS``, or ``datasets`` if it is not set."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()


def register_coco(name: str, json_file: Union[str, Path], image_root: Union[str, Path]) -> None:
    """Registers a data set in COCO's format with detectron2 under ``name``.

    Nothing is read: the files are needed only when the data set is used. Registering the same files again under the
    same name changes nothing.

    Args:
        name: the name to use in ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
        json_file: the annotation file.
        image_root: the folder that the file names in ``json_file`` are relative to.

    Raises:
        D2kdError: ``name`` is already taken by other files.
    """
    files = {"json_file": os.path.abspath(json_file), "image_root": os.path.abspath(image_root)}
    if name not in DatasetCatalog:
        register_coco_instances(name, {}, **files)
        return
    metadata = MetadataCatalog.get(name)
    # detectron2's own data sets hold paths relative to the working directory.
    taken = {key: os.path.abspath(metadata.get(key, "")) for key in files}
    if taken != files:
        raise D2kdError(
            f"the data set name '{name}' already stands for {metadata.get('json_file', 'another data set')} with "
            f"images in {metadata.get('image_root', 'no folder')}; choose another name for {json_file} with images in "
            f"{image_root}"
        )


def register_builtin(root: Union[str, Path]) -> None:
    """Registers ``blood_cells_{train,val}`` and ``bccd_{train,val,test}``, expected in folders of those names.

    Args:
        root: the folder of all data sets; ``root/bccd`` then holds ``instances_<split>.json`` and ``images``.

    Raises:
        D2kdError: one of the names is already taken by other files, for instance under another root.
    """
    for folder, splits in BUILTIN_SPLITS.items():
        for split in splits:
            register_coco(
                f"{folder}_{split}", Path(root, folder, f"instances_{split}.json"), Path(root, folder, "images")
            )


def read_coco(json_file: Union[str, Path]) -> Dict[str, Any]:
    """Reads an annotation file and checks that it has COCO's three lists, none of them empty.

    Args:
        json_file: the annotation file.

    Returns:
        The file's content, with at least the non-empty lists ``images``, ``annotations`` and ``categories``.

    Raises:
        D2kdError: the file is missing, not JSON or not in COCO's format, or a list is empty.
    """
    try:
        content = json.loads(Path(json_file).read_text(encoding="utf-8"))
    except OSError as error:
        raise D2kdError(
            f"cannot read the annotation file {json_file} ({error.strerror}); put the data set there or set "
            "DETECTRON2_DATASETS to the folder that holds it (see datasets/README.md)"
        ) from None
    except ValueError:
        raise D2kdError(f"{json_file} is not a JSON file; give an annotation file in COCO's format") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise D2kdError(f"{json_file} has no list '{key}'; give an annotation file in COCO's detection format")
        if not content[key]:
            raise D2kdError(f"the list '{key}' of {json_file} is empty; give a file with at least one entry in it")
    return content


def check_coco(json_file: Union[str, Path], image_root: Union[str, Path]) -> None:
    """Checks that a data set in COCO's format can be used for training and evaluation.

    Args:
        json_file: the annotation file.
        image_root: the folder that the file names in ``json_file`` are relative to.

    Raises:
        D2kdError: the file is missing, not in COCO's format or has an empty list, an annotation names a category or
            image that is not in the file, or the image folder or one of the first images is missing.
    """
    content = read_coco(json_file)
    for key, listed in (("category_id", "categories"), ("image_id", "images")):
        known = {entry.get("id") for entry in content[listed]}
        for annotation in content["annotations"]:
            if annotation.get(key) not in known:
                raise D2kdError(
                    f"annotation {annotation.get('id')} of {json_file} has {key} {annotation.get(key)}, which is not "
                    f"among its '{listed}'; correct the annotation or add the entry"
                )
    if not Path(image_root).is_dir():
        raise D2kdError(f"the image folder {image_root} of {json_file} does not exist; put the images there")
    for image in content["images"][:IMAGES_CHECKED]:
        if not Path(image_root, image.get("file_name", "")).is_file():
            raise D2kdError(
                f"the image '{image.get('file_name')}' named in {json_file} is not in {image_root}; put the images "
                "there or give the folder that the file names are relative to"
            )


def write_coco(content: Dict[str, Any], json_file: Path) -> None:
    """Writes an annotation file in one step, so that it is never seen half written.

    Args:
        content: the annotations in COCO's format.
        json_file: the file to write or replace.
    """
    temporary = json_file.with_name(json_file.name + ".tmp")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    os.replace(temporary, json_file)
