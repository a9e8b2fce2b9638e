"""CrossKD: FCOS R18 from R50."""

from d2kd.meta_arch import DistillFCOS

from .common.distill import distill
from .common.fcos import crosskd
from .fcos_R18 import dataloader, lr_multiplier, model, optimizer, train

distill(model, DistillFCOS, "fcos_R50", [crosskd])
train.output_dir = "output/lazy_crosskd_fcos_R18"
