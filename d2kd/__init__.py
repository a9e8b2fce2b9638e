"""d2kd: knowledge distillation for dense object detectors, as an extension of detectron2.

Importing it registers its meta architectures, backbones, data sets and the ``torchvision://`` weights.
"""

__version__ = "0.1.0"

import warnings

# detectron2 and torch say these on import; a user can do nothing about them.
warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
warnings.filterwarnings("ignore", message=r".*torch\.jit\..* is (deprecated|not supported)")
warnings.filterwarnings("ignore", message=r"torch\.meshgrid: in an upcoming release")

try:
    import detectron2  # noqa: F401
except ImportError as error:
    raise ImportError(
        "d2kd needs detectron2, which has no official release in the package registry: run `make setup` in d2kd's "
        "folder, or install it from https://github.com/facebookresearch/detectron2."
    ) from error

from . import modeling
from .config import add_distill_config
from .data import dataset_root, register_builtin
from .meta_arch import DistillMetaArch, DistillRetinaNet
from .teacher import load_teacher

register_builtin(dataset_root())

__all__ = ["DistillMetaArch", "DistillRetinaNet", "add_distill_config", "load_teacher", "modeling"]
