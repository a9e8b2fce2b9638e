"""CrossKD: ATSS R18 from R50."""

from detectron2.config import LazyCall as L

from d2kd.meta_arch import DistillATSS
from d2kd.methods import CrossKD

from .atss_R18 import dataloader, lr_multiplier, model, optimizer, train
from .common.distill import distill

distill(model, DistillATSS, "atss_R50", [L(CrossKD)()])
train.output_dir = "output/lazy_crosskd_atss_R18"
