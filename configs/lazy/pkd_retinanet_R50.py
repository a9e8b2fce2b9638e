"""PKD: RetinaNet R50 from R101."""

from detectron2.config import LazyCall as L

from d2kd.methods import PKD

from .crosskd_retinanet_R50 import dataloader, lr_multiplier, model, optimizer, train

model.methods = [L(PKD)()]
train.output_dir = "output/lazy_pkd_retinanet_R50"
