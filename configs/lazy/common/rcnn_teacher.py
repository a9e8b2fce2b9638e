"""Converts the config of a detector to that of a student of a Mask R-CNN of detectron2's model zoo."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from d2kd.methods import PKD
from d2kd.teacher import load_teacher

ZOO = {
    "mask_rcnn_R101": (
        "COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x.yaml",
        "COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x/138205316/model_final_a3ec72.pkl",
    ),
    "mask_rcnn_R101_LSJ": (
        "new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ.py",
        "new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ/42073830/model_final_f96b26.pkl",
    ),
}


def learn_features(model, student, teacher):
    """Sets the class, the teacher and PKD of a model."""
    config, weights = ZOO[teacher]
    model._target_ = student
    model.teacher = L(load_teacher)(
        config_file=model_zoo.get_config_file(config), weights=f"detectron2://{weights}", when_needed=True
    )
    model.methods = [L(PKD)()]
