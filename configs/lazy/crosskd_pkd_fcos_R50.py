"""CrossKD and PKD: FCOS R50 from R101."""

from detectron2.config import LazyCall as L

from d2kd.methods import PKD

from .crosskd_fcos_R50 import dataloader, lr_multiplier, model, optimizer, train

model.methods.append(L(PKD)(weight=2.0))
train.output_dir = "output/lazy_crosskd_pkd_fcos_R50"
