"""CrossKD and PKD: ATSS R50 from R101."""

from detectron2.config import LazyCall as L

from d2kd.methods import PKD

from .crosskd_atss_R50 import dataloader, lr_multiplier, model, optimizer, train

model.methods.append(L(PKD)(weight=1.0))
train.output_dir = "output/lazy_crosskd_pkd_atss_R50"
