"""RetinaNet on EfficientNet-Lite0 with timm's weights, and 64 channels in FPN and head; 1x on COCO."""

from detectron2.config import LazyCall as L

from d2kd.modeling import ExtraLevels, TimmBackbone

from .common.heads import narrow
from .retinanet_R50 import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up = L(TimmBackbone)(name="tf_efficientnet_lite0", pretrained=True, freeze_at=2)
model.backbone.top_block = L(ExtraLevels)(in_channels="${..out_channels}", out_channels="${..out_channels}")
narrow(model, 64)
model.pixel_mean = model.pixel_std = [127.5, 127.5, 127.5]
model.input_format = dataloader.train.mapper.image_format = dataloader.test.mapper.image_format = "RGB"
train.init_checkpoint = ""
train.output_dir = "output/lazy_retinanet_lite0"
