"""Converts the config of a detector to that of a student."""

from pathlib import Path

from detectron2.config import LazyCall as L

from d2kd.teacher import load_teacher

MMDET = "https://download.openmmlab.com/mmdetection/v2.0/"
WEIGHTS = {
    "gfl_R50": "gfl/gfl_r50_fpn_1x_coco/gfl_r50_fpn_1x_coco_20200629_121244-25944287.pth",
    "gfl_R101": "gfl/gfl_r101_fpn_mstrain_2x_coco/gfl_r101_fpn_mstrain_2x_coco_20200629_200126-dd12f847.pth",
    "atss_R50": "atss/atss_r50_fpn_1x_coco/atss_r50_fpn_1x_coco_20200209-985f7bd0.pth",
    "atss_R101": "atss/atss_r101_fpn_1x_coco/atss_r101_fpn_1x_20200825-dfcadd6f.pth",
    "fcos_R50": "fcos/fcos_r50_caffe_fpn_gn-head_mstrain_640-800_2x_coco/"
    "fcos_r50_caffe_fpn_gn-head_mstrain_640-800_2x_coco-d92ceeea.pth",
    "fcos_R101": "fcos/fcos_r101_caffe_fpn_gn-head_mstrain_640-800_2x_coco/"
    "fcos_r101_caffe_fpn_gn-head_mstrain_640-800_2x_coco-511424d6.pth",
}


def distill(model, student, teacher, methods):
    """Sets the class, the teacher (a YAML config with mmdetection's weights for it) and the methods of a model."""
    model._target_ = student
    model.teacher = L(load_teacher)(
        config_file=str(Path(__file__).parents[2] / f"{teacher}.yaml"),
        weights=MMDET + WEIGHTS[teacher],
        when_needed=True,
    )
    model.methods = methods
