"""Dense detectors, and parts of them, that detectron2 does not have."""

from .atss import ATSS, ATSSHead
from .backbone import ExtraLevels, LateralFPN, build_extra_fpn_backbone, make_fpn, make_resnet
from .config import add_detector_config
from .fcos import FCOS, FCOSHead
from .gfl import GFL, GFLHead
from .timm_backbone import TimmBackbone, build_timm_fpn_backbone

__all__ = [
    "ATSS",
    "ATSSHead",
    "FCOS",
    "FCOSHead",
    "GFL",
    "GFLHead",
    "ExtraLevels",
    "LateralFPN",
    "TimmBackbone",
    "add_detector_config",
    "build_extra_fpn_backbone",
    "build_timm_fpn_backbone",
    "make_fpn",
    "make_resnet",
]
