"""Checks before a run starts: data sets, files, devices. Each says in one sentence what to mend."""

import logging
import os
from typing import Iterable

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..data import check_coco, read_coco
from ..errors import D2kdError, nearest


def check_datasets(names: Iterable[str], num_classes: int, key: str) -> None:
    """Checks that data sets are registered, complete, and fit the number of classes.

    Args:
        names: as in DATASETS.TRAIN and DATASETS.TEST.
        num_classes: of the model.
        key: where that stands in the config.

    Raises:
        D2kdError: names the data set and the mend.
    """
    for name in names:
        if name not in DatasetCatalog:
            known = DatasetCatalog.list()
            raise D2kdError(f"no data set {name!r} is registered{nearest(name, known)} (see docs/custom_data.md)")
        metadata = MetadataCatalog.get(name)
        json_file = metadata.get("json_file", None)
        if json_file is None:
            continue  # not in COCO's format: its loader says what is wrong
        check_coco(json_file, metadata.image_root)
        categories = len(read_coco(json_file)["categories"])
        if categories != num_classes:
            raise D2kdError(
                f"data set {name} has {categories} categories ({json_file}), but the model has {num_classes} classes; "
                f"set {key} to {categories}"
            )


def check_weights_file(path: str, key: str) -> None:
    """Raises D2kdError if ``path`` is meant as a local file and is none; URLs are left to their handlers."""
    if path and "://" not in path and not os.path.isfile(path):
        raise D2kdError(f"{key}: there is no file {path}")


def usable_device(device: str) -> str:
    """Returns the device, or "cpu" with a warning where CUDA is asked for and there is none."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        logging.getLogger(__name__).warning("No CUDA device here: running on the CPU.")
        return "cpu"
    return device


def check_num_gpus(num_gpus: int) -> None:
    """Raises D2kdError if more GPUs are asked for than there are; without any, they count processes on the CPU."""
    available = torch.cuda.device_count()
    if torch.cuda.is_available() and num_gpus > available:
        raise D2kdError(f"--num-gpus {num_gpus}, but this machine has {available}; use --num-gpus {available}")
