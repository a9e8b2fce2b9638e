"""FCOS R101 with the published recipe; 2x on COCO."""

from d2kd.modeling.backbone import BLOCKS_OF_DEPTH

from .fcos_R50 import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.blocks = list(BLOCKS_OF_DEPTH[101])
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-101.pkl"
train.output_dir = "output/lazy_fcos_R101"
