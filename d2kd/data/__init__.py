"""Data sets: registration and checks of COCO-format files, and a generated data set that needs no download."""

from .blood_cells import CLASS_NAMES, write_blood_cells
from .coco import check_coco, read_coco
from .sets import dataset_root, register_builtin, register_coco, write_coco

__all__ = [
    "CLASS_NAMES",
    "check_coco",
    "dataset_root",
    "read_coco",
    "register_builtin",
    "register_coco",
    "write_blood_cells",
    "write_coco",
]
