"""ATSS R50, 1x on COCO."""

from d2kd.modeling import ATSS, ATSSHead

from .common.dense import dataloader, detector, lr_multiplier, optimizer, train

model = detector(ATSS, ATSSHead)
train.output_dir = "output/lazy_atss_R50"
