"""CrossKD: RetinaNet on EfficientNet-Lite0 from R50."""

from d2kd.meta_arch import DistillRetinaNet

from .crosskd_retinanet_R18 import model as r18
from .retinanet_lite0 import dataloader, lr_multiplier, model, optimizer, train

model._target_ = DistillRetinaNet
model.teacher = r18.teacher
model.methods = r18.methods
train.output_dir = "output/lazy_crosskd_retinanet_lite0"
