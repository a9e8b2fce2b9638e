"""CrossKD: GFL on MobileNetV3 from R50."""

from detectron2.config import LazyCall as L

from d2kd.meta_arch import DistillGFL
from d2kd.methods import CrossKD

from .common.distill import distill
from .gfl_mobilenetv3 import dataloader, lr_multiplier, model, optimizer, train

distill(model, DistillGFL, "gfl_R50", [L(CrossKD)(box_weight=4.0)])
train.output_dir = "output/lazy_crosskd_gfl_mobilenetv3"
