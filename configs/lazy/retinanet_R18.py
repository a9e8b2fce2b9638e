"""RetinaNet R18 with torchvision's weights, which expect RGB; 1x on COCO."""

from .retinanet_R50 import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.stages.depth = 18
del model.backbone.bottom_up.stages.stride_in_1x1  # basic blocks have no 1x1 convolution
model.backbone.top_block.in_channels = 512
model.pixel_mean = [123.675, 116.28, 103.53]
model.pixel_std = [58.395, 57.12, 57.375]
model.input_format = "RGB"
dataloader.train.mapper.image_format = "RGB"
train.init_checkpoint = "torchvision://resnet18"
train.output_dir = "output/lazy_retinanet_R18"
