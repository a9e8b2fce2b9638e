"""LD with the valuable localization region and the class loss: GFL R50 from R101."""

from .ld_gfl_R50 import dataloader, lr_multiplier, model, optimizer, train

model.methods[0].vlr_weight = 0.25
model.methods[0].cls_weight = 10.0
train.output_dir = "output/lazy_ld_full_gfl_R50"
