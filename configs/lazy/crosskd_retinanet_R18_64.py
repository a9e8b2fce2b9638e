"""CrossKD: RetinaNet R18 with 64 channels in FPN and head, from R50."""

from .common.heads import narrow
from .crosskd_retinanet_R18 import dataloader, lr_multiplier, model, optimizer, train

narrow(model, 64)
train.output_dir = "output/lazy_crosskd_retinanet_R18_64"
