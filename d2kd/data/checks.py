"""Checks of a run's data sets before it starts."""

from typing import Collection, Iterable, List, Optional, Tuple

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..errors import D2kdError, nearest
from .coco import CocoFile, Remark, check_files, examine_coco


def check_datasets(
    names: Iterable[str], num_classes: Optional[Tuple[str, int]], evaluated: Collection[str] = ()
) -> List[Remark]:
    """Checks that data sets are registered, complete, fit the number of classes and agree in their order.

    Args:
        names: as in DATASETS.TRAIN and DATASETS.TEST.
        num_classes: the key of the model's number of classes and its value; None where unknown.
        evaluated: those of them that are evaluated; evaluation needs more.

    Returns:
        What is odd but no reason to stop, to be logged.

    Raises:
        D2kdError: names the data set and the fix.
    """
    files = []
    for name in dict.fromkeys(names):
        if name not in DatasetCatalog:
            known = DatasetCatalog.list()
            raise D2kdError(f"no data set {name!r} is registered{nearest(name, known)} (see docs/custom_data.md)")
        found = _examined(name)
        if found is None:
            _check_number(name, MetadataCatalog.get(name).get("thing_classes", None), "", num_classes)
            continue
        check_files(found, MetadataCatalog.get(name).image_root, name in evaluated)
        _check_number(name, found.classes, f" ({found.path})", num_classes)
        _check_registered_classes(name, found)
        files.append(found)
    for other in files[1:]:
        _check_same_classes(files[0], other)
    return [remark for found in files for remark in found.remarks()]


def _examined(name: str) -> Optional[CocoFile]:
    """What the annotation file of a data set holds; None where it is not in COCO's own format."""
    metadata = MetadataCatalog.get(name)
    path, root = (metadata.get(key, None) for key in ("json_file", "image_root"))
    if path is None or root is None or metadata.get("evaluator_type", "coco") != "coco":
        return None
    return examine_coco(path)


def _check_number(
    name: str, classes: Optional[Collection], source: str, num_classes: Optional[Tuple[str, int]]
) -> None:
    if classes is not None and num_classes is not None and len(classes) != num_classes[1]:
        raise D2kdError(
            f"data set {name} has {len(classes)} categories{source}, but the model has {num_classes[1]} classes; set "
            f"{num_classes[0]} to {len(classes)}"
        )


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
