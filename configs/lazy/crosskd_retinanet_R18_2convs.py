"""CrossKD: RetinaNet R18 with 2 convolutions in each tower, from R50 with 4."""

from .crosskd_retinanet_R18 import dataloader, lr_multiplier, model, optimizer, train

model.head.conv_dims = [256, 256]
model.methods[0].cut = 1  # one convolution before the predictors in both heads: the teacher's cut is 3
train.output_dir = "output/lazy_crosskd_retinanet_R18_2convs"
