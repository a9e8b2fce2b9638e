"""GFL R18 with 128 channels in FPN and head."""

from .common.heads import narrow
from .gfl_R18 import dataloader, lr_multiplier, model, optimizer, train

narrow(model, 128)
train.output_dir = "output/lazy_gfl_R18_128"
