"""GFL R50 with 128 channels in FPN and head."""

from .common.heads import narrow
from .gfl_R50 import dataloader, lr_multiplier, model, optimizer, train

narrow(model, 128)
train.output_dir = "output/lazy_gfl_R50_128"
