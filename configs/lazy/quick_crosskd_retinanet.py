"""A few iterations of a tiny CrossKD student, for tests and for checking an installation."""

from pathlib import Path

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec

from d2kd.meta_arch import DistillRetinaNet
from d2kd.methods import CrossKD
from d2kd.modeling import ExtraLevels, make_resnet
from d2kd.teacher import load_teacher

from .retinanet_R50 import dataloader, lr_multiplier, model, optimizer, train

model._target_ = DistillRetinaNet
model.backbone.bottom_up = L(make_resnet)(blocks=[1, 1, 1, 1], width=4, freeze_at=0)
model.backbone.out_channels = 32
model.backbone.top_block = L(ExtraLevels)(in_channels=32, out_channels=32, num_levels=1)
model.head.input_shape = [ShapeSpec(channels=32)] * 4
model.head.conv_dims = [32, 32]
model.head.norm = "GN"
model.anchor_generator.sizes = [[x, x * 1.2599, x * 1.5874] for x in [16, 32, 64, 128]]
model.anchor_generator.strides = [8, 16, 32, 64]
model.head_in_features = ["p3", "p4", "p5", "p6"]
model.num_classes = 3
model.box_reg_loss_type = "giou"
model.pixel_std = [57.375, 57.12, 58.395]
model.teacher = L(load_teacher)(
    config_file=str(Path(__file__).parent.parent / "quick_retinanet.yaml"),
    weights="output/quick_retinanet/model_final.pth",
    when_needed=True,
)
model.methods = [L(CrossKD)(cut=1)]

dataloader.train.dataset.names = "blood_cells_train"
dataloader.test.dataset.names = "blood_cells_val"
dataloader.train.mapper.augmentations[0].short_edge_length = [128]
dataloader.test.mapper.augmentations[0].short_edge_length = 128
dataloader.train.total_batch_size = 4
dataloader.train.num_workers = dataloader.test.num_workers = 0
train.init_checkpoint = ""
train.device = "cpu"
train.preflight = 0  # this teacher is trained for a few iterations only, so it is no better than a random one
train.max_iter = train.eval_period = 4
train.output_dir = "output/lazy_quick_crosskd_retinanet"
