"""RetinaNet R18 with 2 convolutions in each tower instead of 4."""

from .retinanet_R18 import dataloader, lr_multiplier, model, optimizer, train

model.head.conv_dims = [256, 256]
train.output_dir = "output/lazy_retinanet_R18_2convs"
