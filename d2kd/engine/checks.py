"""Checks before a run starts: data sets, files, devices. Each says in one sentence what to mend."""

import logging
import math
import os
import socket
from functools import lru_cache
from typing import Any, Callable, Collection, Dict, Iterable, Optional, Sequence, Tuple
from urllib.parse import urlparse

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

from ..data.coco import CocoFile, check_files, examine_coco
from ..errors import D2kdError, nearest
from .run_folder import flatten


def check_datasets(names: Iterable[str], num_classes: int, key: str, evaluated: Collection[str] = ()) -> None:
    """Checks that data sets are registered, complete, fit the number of classes and agree in their order.

    The main process does; others rely on it.

    Args:
        names: as in DATASETS.TRAIN and DATASETS.TEST.
        num_classes: of the model.
        key: where that stands in the config.
        evaluated: those of them that are evaluated; evaluation needs more.

    Raises:
        D2kdError: names the data set and the mend.
    """
    if not comm.is_main_process():
        return  # another process has looked, and large files take seconds
    files = []
    for name in dict.fromkeys(names):
        if name not in DatasetCatalog:
            known = DatasetCatalog.list()
            raise D2kdError(f"no data set {name!r} is registered{nearest(name, known)} (see docs/custom_data.md)")
        found = _examined(name)
        if found is None:
            continue  # not in COCO's format: its loader says what is wrong
        check_files(found, MetadataCatalog.get(name).image_root, name in evaluated)
        if len(found.classes) != num_classes:
            raise D2kdError(
                f"data set {name} has {len(found.classes)} categories ({found.path}), but the model has {num_classes} "
                f"classes; set {key} to {len(found.classes)}"
            )
        _check_registered_classes(name, found)
        files.append(found)
    for other in files[1:]:
        _check_same_classes(files[0], other)


def tell_datasets(names: Iterable[str]) -> None:
    """Logs what is odd about data sets, once there is a log to write to; the main process does."""
    if not comm.is_main_process():
        return
    for name in dict.fromkeys(names):
        found = _examined(name)
        if found is not None:
            found.log()


def _examined(name: str) -> Optional[CocoFile]:
    """What the annotation file of a data set holds, if it is registered as one in COCO's format."""
    metadata = MetadataCatalog.get(name)
    path, root = (metadata.get(key, None) for key in ("json_file", "image_root"))
    if path is None or root is None:
        return None
    state = os.stat(path) if os.path.exists(path) else None
    return _examined_once(path, *((state.st_mtime_ns, state.st_size) if state else ()))


@lru_cache(maxsize=16)
def _examined_once(path: str, *state: int) -> CocoFile:
    """Large files take seconds, and configs are prepared again in the process that trains; ``state`` tells changes."""
    return examine_coco(path)


def _check_registered_classes(name: str, found: CocoFile) -> None:
    """Raises D2kdError if a data set is registered with other classes than its file has; detectron2 would stop."""
    numbers = {category: number for number, category in enumerate(found.classes)}
    held = {"thing_classes": list(found.classes.values()), "thing_dataset_id_to_contiguous_id": numbers}
    for key, value in held.items():
        if MetadataCatalog.get(name).get(key, value) != value:
            raise D2kdError(
                f"data set {name} is registered with other categories than {found.path} has; register that file under "
                "another name"
            )


def _check_same_classes(one: CocoFile, other: CocoFile) -> None:
    for number, names in enumerate(zip(one.classes.values(), other.classes.values())):
        if names[0] != names[1]:
            raise D2kdError(
                f"class {number} is {names[0]!r} in {one.path}, but {names[1]!r} in {other.path}; give both files the "
                "same categories (their ids decide about the order)"
            )


def _all(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda values: len(values) > 0 and all(test(value) for value in values)


def _positive(value: float) -> bool:
    return 0 < value < math.inf


def _triple(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda values: len(values) == 3 and _all(test)(values)


# Config keys, what their values must be, and the same in words.
VALUES: Dict[str, Tuple[Callable[[Any], bool], str]] = {
    "SOLVER.MAX_ITER": (_positive, "1 or more"),
    "SOLVER.IMS_PER_BATCH": (_positive, "1 or more"),
    "SOLVER.BASE_LR": (_positive, "above 0"),
    "SOLVER.CHECKPOINT_PERIOD": (_positive, "1 or more"),
    "SOLVER.STEPS": (lambda steps: list(steps) == sorted(set(steps)), "ascending iterations"),
    "TEST.EVAL_PERIOD": (lambda value: value >= 0, "0 (only at the end) or more"),
    "TEST.DETECTIONS_PER_IMAGE": (_positive, "1 or more"),
    "DATASETS.TRAIN": (bool, "one data set or more"),
    "DATALOADER.NUM_WORKERS": (lambda value: value >= 0, "0 or more"),
    "INPUT.MIN_SIZE_TRAIN": (_all(_positive), "lengths above 0"),
    "INPUT.MAX_SIZE_TRAIN": (_positive, "a length above 0"),
    "INPUT.FORMAT": (lambda value: value in ("BGR", "RGB"), "BGR or RGB"),
    "MODEL.PIXEL_MEAN": (_triple(math.isfinite), "three finite numbers"),
    "MODEL.PIXEL_STD": (_triple(_positive), "three numbers above 0"),
    "MODEL.DISTILL.PREFLIGHT": (lambda value: value >= 0, "0 (no check) or more images"),
}
# detectron2's own default of these is None.
MAY_BE_NONE = ("SOLVER.WEIGHT_DECAY_BIAS",)


def check_values(cfg: CfgNode) -> None:
    """Raises D2kdError for a value in a YAML config with which no run is possible; names key, value and range."""
    values = flatten(cfg)
    empty = [key for key, value in values.items() if value is None and key not in MAY_BE_NONE]
    if empty:  # yacs takes None for any type
        raise D2kdError(f"{', '.join(empty)}: a value is missing; write one, or leave the key out for its default")
    for key, (is_valid, words) in VALUES.items():
        try:
            valid = is_valid(values[key])
        except TypeError:  # an element of a list is no number
            valid = False
        if not valid:
            raise D2kdError(f"{key} is {values[key]!r}; it must be {words}")


def check_learning_rate(settings: Sequence[Tuple[float, int]], key: str) -> None:
    """Warns where the batch was changed and the learning rate was not, with the value by the linear rule.

    Args:
        settings: learning rate and images per batch, from the first config to the last override.
        key: where the rate stands.
    """
    chosen_for = settings[0][1]
    for (before, _), (rate, batch) in zip(settings, settings[1:]):
        chosen_for = chosen_for if rate == before else batch
    rate, batch = settings[-1]
    if batch != chosen_for and rate:
        logging.getLogger(__name__).warning(
            "%s %g was set for batches of %d images; with %d the linear rule (arXiv 1706.02677) gives %g",
            *(key, rate, chosen_for, batch, rate * batch / chosen_for),
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


def check_address(url: str, num_machines: int, machine_rank: int) -> None:
    """Raises D2kdError if the processes cannot meet at ``--dist-url``."""
    if url == "auto" and num_machines > 1:
        raise D2kdError("several machines need --dist-url tcp://<address of the first>:<free port>, the same on all")
    address = urlparse(url)
    if address.scheme != "tcp" or machine_rank > 0:
        return
    try:
        port = address.port or 0
        socket.create_server(("", port)).close()
    except (OSError, ValueError) as error:
        raise D2kdError(
            f"--dist-url {url}: the port cannot be used ({error}), perhaps by another run; leave it out or name another"
        ) from error


def check_num_gpus(num_gpus: int) -> None:
    """Raises D2kdError if more GPUs are asked for than there are; without any, they count processes on the CPU."""
    if num_gpus < 0:
        raise D2kdError(f"--num-gpus {num_gpus}; it must be 0 or more")
    available = torch.cuda.device_count()
    if torch.cuda.is_available() and num_gpus > available:
        raise D2kdError(f"--num-gpus {num_gpus}, but this machine has {available}; use --num-gpus {available}")
