"""ATSS R101, 1x on COCO."""

from .atss_R50 import dataloader, lr_multiplier, model, optimizer, train
from .common.dense import resnet

model.backbone.bottom_up = resnet(101)
train.init_checkpoint = "torchvision://resnet101"
train.output_dir = "output/lazy_atss_R101"
