"""Config nodes for the detectors in this package."""

from detectron2.config import CfgNode

from .atss import ATSS
from .fcos import FCOS
from .gfl import GFL


def add_detector_config(cfg: CfgNode) -> None:
    """Adds MODEL.GFL, MODEL.ATSS and MODEL.FCOS in place, with keys and defaults from the classes' signatures."""
    for detector in (GFL, ATSS, FCOS):
        cfg.MODEL[detector.config_node] = CfgNode(detector.config_defaults())
