"""COCO-format data sets: their location, and their registration with detectron2."""

import json
import logging
import os
from pathlib import Path
from typing import Any, Dict, Union

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from ..errors import D2kdError

BUILTIN_SPLITS = {"blood_cells": ("train", "val"), "bccd": ("train", "val", "test")}


def dataset_root() -> Path:
    """Returns the folder of all data sets: the environment variable ``DETECTRON2_DATASETS``, or else ``datasets``."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()


def register_coco(name: str, json_file: Union[str, Path], image_root: Union[str, Path]) -> None:
    """Registers a data set in COCO format with detectron2 under ``name``.

    No file is read: the files are needed only when the data set is used. Registering the same files again under the
    same name has no effect.

    Args:
        name: the name to use in ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
        json_file: the annotation file.
        image_root: the folder that the file names in ``json_file`` are relative to.

    Raises:
        D2kdError: ``name`` is already registered for other files.
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
            f"the data set name '{name}' is already used for {metadata.get('json_file', 'another data set')} with "
            f"images in {metadata.get('image_root', 'no folder')}; choose another name for {json_file} with images in "
            f"{image_root}"
        )


def register_builtin(root: Union[str, Path]) -> None:
    """Registers ``blood_cells_{train,val}`` and ``bccd_{train,val,test}``, expected in folders of those names.

    A name that is registered already with other files stays as it is, with a warning.

    Args:
        root: the folder of all data sets; ``root/bccd`` then holds ``instances_<split>.json`` and ``images``.
    """
    for folder, splits in BUILTIN_SPLITS.items():
        for split in splits:
            try:
                register_coco(
                    f"{folder}_{split}", Path(root, folder, f"instances_{split}.json"), Path(root, folder, "images")
                )
            except D2kdError as error:
                logging.getLogger(__name__).warning("Data set not registered: %s", error)


def write_coco(content: Dict[str, Any], json_file: Path) -> None:
    """Writes an annotation file atomically, so that no reader sees a partial file.

    Args:
        content: the annotations in COCO format.
        json_file: the file to write or replace.
    """
    temporary = json_file.with_name(json_file.name + ".tmp")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    os.replace(temporary, json_file)
