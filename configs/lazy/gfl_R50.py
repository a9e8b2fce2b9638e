"""GFL R50, 1x on COCO."""

from d2kd.modeling import GFL, GFLHead

from .common.dense import dataloader, detector, lr_multiplier, optimizer, train

model = detector(GFL, GFLHead)
train.output_dir = "output/lazy_gfl_R50"
