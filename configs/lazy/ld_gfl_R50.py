"""LD in the main region: GFL R50 from R101."""

from detectron2.config import LazyCall as L

from d2kd.meta_arch import DistillGFL
from d2kd.methods import LD

from .common.distill import distill
from .gfl_R50 import dataloader, lr_multiplier, model, optimizer, train

distill(model, DistillGFL, "gfl_R101", [L(LD)()])
train.output_dir = "output/lazy_ld_gfl_R50"
