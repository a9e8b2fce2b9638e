"""GFL on MobileNetV3 with timm's weights, and 128 channels in FPN and head; 1x on COCO."""

from detectron2.config import LazyCall as L

from d2kd.modeling import TimmBackbone

from .common.heads import narrow
from .gfl_R50 import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up = L(TimmBackbone)(name="mobilenetv3_large_100", pretrained=True, freeze_at=2)
narrow(model, 128)
train.init_checkpoint = ""
train.output_dir = "output/lazy_gfl_mobilenetv3"
