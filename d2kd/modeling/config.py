"""Config nodes for the detectors and backbones in this package."""

from detectron2.config import CfgNode

from .atss import ATSS
from .fcos import FCOS
from .gfl import GFL


def add_detector_config(cfg: CfgNode) -> None:
    """Adds MODEL.GFL, MODEL.ATSS and MODEL.FCOS, from the classes' signatures, and MODEL.TIMM, in place."""
    for detector in (GFL, ATSS, FCOS):
        cfg.MODEL[detector.config_node] = CfgNode(detector.config_defaults())
    # For the backbone "build_timm_fpn_backbone", see TimmBackbone. PRETRAINED: True, or the path of a file.
    cfg.MODEL.TIMM = CfgNode({"NAME": "", "PRETRAINED": None, "NORM": "FrozenBN"})
