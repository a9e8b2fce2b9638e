"""CrossKD: FCOS R50 from R101."""

from d2kd.meta_arch import DistillFCOS

from .common.distill import distill
from .common.fcos import crosskd
from .fcos_R50 import dataloader, lr_multiplier, model, optimizer, train

distill(model, DistillFCOS, "fcos_R101", [crosskd])
train.output_dir = "output/lazy_crosskd_fcos_R50"
