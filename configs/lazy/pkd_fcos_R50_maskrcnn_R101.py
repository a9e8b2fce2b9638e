"""PKD: FCOS R50 from detectron2's Mask R-CNN R101."""

from d2kd.meta_arch import DistillFCOS

from .common.rcnn_teacher import learn_features
from .fcos_R50 import dataloader, lr_multiplier, model, optimizer, train

learn_features(model, DistillFCOS, "mask_rcnn_R101")
train.output_dir = "output/lazy_pkd_fcos_R50_maskrcnn_R101"
