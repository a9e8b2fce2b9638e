"""d2kd: knowledge distillation for dense object detectors, as an extension of detectron2.

Importing it registers its meta architectures, backbones, data sets and the ``torchvision://`` weights.
"""

__version__ = "0.1.0"

import warnings

import torch  # noqa: F401  # before the block below, so that it keeps the warning filters it sets

from .quiet import quiet_known_warnings

with warnings.catch_warnings():
    quiet_known_warnings()  # of detectron2's modules, when they are imported
    try:
        import detectron2  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "d2kd needs detectron2, which has no official release in the package registry: run `make setup` in d2kd's "
            "folder, or install it from https://github.com/facebookresearch/detectron2."
        ) from error

    from . import modeling
    from .config import add_distill_config, drop_teacher, load_config
    from .data import dataset_root, register_builtin
    from .meta_arch import DistillATSS, DistillFCOS, DistillGFL, DistillMetaArch, DistillRetinaNet
    from .student import distill
    from .teacher import Teacher, load_teacher

register_builtin(dataset_root())

__all__ = [
    "DistillATSS",
    "DistillFCOS",
    "DistillGFL",
    "DistillMetaArch",
    "DistillRetinaNet",
    "Teacher",
    "__version__",
    "add_distill_config",
    "distill",
    "drop_teacher",
    "load_config",
    "load_teacher",
    "modeling",
]
