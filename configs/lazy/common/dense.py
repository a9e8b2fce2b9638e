"""Common parts of the published GFL, ATSS and FCOS recipes, equivalent to Base-dense.yaml: 12 epochs of COCO."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from d2kd.modeling import ExtraLevels, make_resnet
from d2kd.modeling.backbone import BLOCKS_OF_DEPTH

ITERATIONS_PER_EPOCH = 7330  # train2017 has 117266 images with annotations, 16 in a batch


def schedule(epochs, steps, warmup_method="linear", warmup_factor=0.001):
    """Learning rate schedule over a number of epochs, divided by 10 after each of the steps."""
    return L(WarmupParamScheduler)(
        scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1, 0.01], milestones=[*steps, epochs]),
        warmup_length=500 / (epochs * ITERATIONS_PER_EPOCH),
        warmup_method=warmup_method,
        warmup_factor=warmup_factor,
    )


def resnet(depth):
    """ResNet for torchvision's weights."""
    return L(make_resnet)(blocks=list(BLOCKS_OF_DEPTH[depth]), bottleneck=depth >= 50)


def detector(detector_class, head_class, **options):
    """Detector with 80 classes and a ResNet-50 backbone."""
    return L(detector_class)(
        backbone=L(FPN)(
            bottom_up=resnet(50),
            in_features=["res3", "res4", "res5"],
            out_channels=256,
            top_block=L(ExtraLevels)(in_channels="${..out_channels}", out_channels="${..out_channels}"),
        ),
        head=L(head_class)(
            input_shape=[ShapeSpec(channels=256)] * 5, num_classes="${..num_classes}", conv_dims=[256] * 4
        ),
        num_classes=80,
        head_in_features=["p3", "p4", "p5", "p6", "p7"],
        pixel_mean=[123.675, 116.28, 103.53],
        pixel_std=[58.395, 57.12, 57.375],
        input_format="RGB",
        **options,
    )


_zoo = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.py")
train, optimizer, dataloader = _zoo.train, _zoo.optimizer, _zoo.dataloader
optimizer.params.weight_decay_norm = "${..weight_decay}"
dataloader.train.mapper.image_format = "RGB"
dataloader.train.mapper.augmentations[0].short_edge_length = [800]
lr_multiplier = schedule(12, [8, 11])
train.max_iter = 12 * ITERATIONS_PER_EPOCH
train.init_checkpoint = "torchvision://resnet50"
