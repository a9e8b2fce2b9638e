"""RetinaNet R50 with 128 channels in FPN and head."""

from .common.heads import narrow
from .retinanet_R50 import dataloader, lr_multiplier, model, optimizer, train

narrow(model, 128)
train.output_dir = "output/lazy_retinanet_R50_128"
