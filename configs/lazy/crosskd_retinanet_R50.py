"""CrossKD: RetinaNet R50 from R101."""

from pathlib import Path

from detectron2.config import LazyCall as L

from d2kd.meta_arch import DistillRetinaNet
from d2kd.methods import CrossKD
from d2kd.teacher import load_teacher

from .retinanet_R50 import dataloader, lr_multiplier, model, optimizer, train

model._target_ = DistillRetinaNet
model.teacher = L(load_teacher)(
    config_file=str(Path(__file__).parent.parent / "retinanet_R101.yaml"),
    weights="detectron2://COCO-Detection/retinanet_R_101_FPN_3x/190397697/model_final_971ab9.pkl",
    when_needed=True,
)
model.methods = [L(CrossKD)(cut=3)]
train.output_dir = "output/lazy_crosskd_retinanet_R50"
