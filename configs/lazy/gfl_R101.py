"""GFL R101, 1x on COCO."""

from .common.dense import resnet
from .gfl_R50 import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up = resnet(101)
train.init_checkpoint = "torchvision://resnet101"
train.output_dir = "output/lazy_gfl_R101"
