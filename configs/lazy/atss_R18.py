"""ATSS R18, 1x on COCO."""

from .atss_R50 import dataloader, lr_multiplier, model, optimizer, train
from .common.dense import resnet

model.backbone.bottom_up = resnet(18)
train.init_checkpoint = "torchvision://resnet18"
train.output_dir = "output/lazy_atss_R18"
