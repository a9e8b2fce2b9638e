"""What detectron2 lacks of dense detectors."""

from .backbone import ExtraLevels, build_extra_fpn_backbone, make_resnet

__all__ = ["ExtraLevels", "build_extra_fpn_backbone", "make_resnet"]
