"""FGD: RetinaNet R50 from R101."""

from detectron2.config import LazyCall as L

from d2kd.methods import FGD

from .crosskd_retinanet_R50 import dataloader, lr_multiplier, model, optimizer, train

model.methods = [L(FGD)()]
model.inherit = ["neck", "head"]
train.output_dir = "output/lazy_fgd_retinanet_R50"
