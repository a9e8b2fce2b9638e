"""FCOS R18 with the published recipe and torchvision's weights, which expect RGB; 2x on COCO."""

from .common.dense import resnet
from .common.fcos import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up = resnet(18)
train.init_checkpoint = "torchvision://resnet18"
train.output_dir = "output/lazy_fcos_R18"
