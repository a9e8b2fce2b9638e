"""FCOS R50 with the published recipe and MSRA's weights, which expect BGR; 2x on COCO."""

from .common.fcos import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.stride_in_1x1 = True
model.pixel_mean = [102.9801, 115.9465, 122.7717]
model.pixel_std = [1.0, 1.0, 1.0]
model.input_format = "BGR"
dataloader.train.mapper.image_format = "BGR"
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
train.output_dir = "output/lazy_fcos_R50"
