"""Weights: safe and strict loading, and conversion from torchvision's and mmdetection's names to detectron2's,
and of EfficientNet-Lites to timm's.

Importing this package makes ``torchvision://resnet18`` a valid ``MODEL.WEIGHTS``. The command-line tool is
``python -m d2kd.checkpoint.convert``.
"""

from .efficientnet_lite import convert_efficientnet_lite
from .mmdet import convert_mmdet, is_mmdet
from .safe import SafeCheckpointer
from .strict import StrictCheckpointer, load_strict
from .torchvision_weights import convert_torchvision, register_torchvision

__all__ = [
    "SafeCheckpointer",
    "StrictCheckpointer",
    "convert_efficientnet_lite",
    "convert_mmdet",
    "convert_torchvision",
    "is_mmdet",
    "load_strict",
    "register_torchvision",
]

register_torchvision()
