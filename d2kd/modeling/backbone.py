"""ResNets of any width and depth, and FPNs with configurable extra levels."""

import re
import string
from typing import Dict, List, Sequence

import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock, ResNet
from fvcore.nn import weight_init
from torch import Tensor, nn

from ..errors import D2kdError, check_choice
from ..keys import key

BLOCKS_OF_DEPTH = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class ExtraLevels(nn.Module):
    """Extra levels on top of an FPN, each computed from the previous one by a 3x3 convolution with stride 2.

    detectron2's ``LastLevelP6P7`` always has a ReLU before P7; the published GFL, ATSS and CrossKD-RetinaNet models
    have none. Parameter names are the same.

    Args:
        in_channels: channels of ``in_feature``.
        out_channels: channels of the new levels.
        in_feature: the input of the first extra level, see :func:`make_fpn`. Levels are numbered after it: "res5" is
            followed by p6.
        num_levels: number of extra levels.
        relu: apply a ReLU between them.
    """

    def __init__(
        self, in_channels: int, out_channels: int, in_feature: str = "p5", num_levels: int = 2, relu: bool = False
    ) -> None:
        super().__init__()
        if not re.fullmatch(r"[A-Za-z]+\d+", in_feature):
            raise D2kdError(f"in_feature of the extra levels is {in_feature!r}; it must end in a number, such as p5")
        self.in_feature = in_feature
        self.num_levels = num_levels
        self.relu = relu
        for level in range(num_levels):
            conv = nn.Conv2d(out_channels if level else in_channels, out_channels, 3, stride=2, padding=1)
            weight_init.c2_xavier_fill(conv)
            self.add_module(f"p{_stage(in_feature) + 1 + level}", conv)

    def forward(self, x: Tensor) -> List[Tensor]:
        """Returns the new levels for an input (N, C, H, W), each half the size of the previous one, rounded up."""
        levels: List[Tensor] = []
        for conv in self.children():
            x = conv(F.relu(x) if self.relu and levels else x)
            levels.append(x)
        return levels


def make_resnet(
    blocks: Sequence[int],
    width: int = 64,
    bottleneck: bool = False,
    out_features: Sequence[str] = ("res3", "res4", "res5"),
    norm: str = "FrozenBN",
    freeze_at: int = 2,
    stride_in_1x1: bool = False,
    in_channels: int = 3,
) -> ResNet:
    """Builds a ResNet of any width; detectron2's own builder supports only a width of 64 for basic blocks.

    Args:
        blocks: number of blocks of res2 to res5.
        width: channels of the stem and of the 3x3 convolutions of res2; doubled from stage to stage.
        bottleneck: use bottleneck blocks (ResNet-50 and deeper) instead of basic ones.
        out_features: the stages to return.
        norm: see detectron2's ``get_norm``.
        freeze_at: number of stages to freeze, including the stem.
        stride_in_1x1: put the stride in the first 1x1 convolution of a bottleneck (MSRA weights) instead of the 3x3.
        in_channels: channels of the image.

    Raises:
        D2kdError: ``out_features`` names a stage that there is not.
    """
    for name in out_features:
        check_choice(
            f"a stage of {key('MODEL.RESNETS.OUT_FEATURES')}", name, [f"res{i + 2}" for i in range(len(blocks))]
        )
    stem = BasicStem(in_channels, width, norm)
    stages = []
    previous = width
    for stage, num_blocks in enumerate(blocks):
        channels = width * 2**stage
        out_channels = 4 * channels if bottleneck else channels
        extra = {"bottleneck_channels": channels, "stride_in_1x1": stride_in_1x1} if bottleneck else {}
        stages.append(
            ResNet.make_stage(
                BottleneckBlock if bottleneck else BasicBlock,
                num_blocks,
                stride_per_block=[2 if stage else 1] + [1] * (num_blocks - 1),
                in_channels=previous,
                out_channels=out_channels,
                norm=norm,
                **extra,
            )
        )
        previous = out_channels
    return ResNet(stem, stages, out_features=list(out_features), freeze_at=freeze_at)


class LateralFPN(FPN):
    """An FPN whose extra levels are computed from the output of the last 1x1 lateral convolution."""

    def forward(self, x: Tensor) -> Dict[str, Tensor]:
        """Returns the levels for images (N, 3, H, W) by name, high to low resolution."""
        stages = self.bottom_up(x)
        merged = self.lateral_convs[0](stages[self.in_features[-1]])
        levels = [self.output_convs[0](merged)] + self.top_block(merged)
        for index, (lateral, output) in enumerate(zip(self.lateral_convs, self.output_convs)):
            if index > 0:
                above = F.interpolate(merged, scale_factor=2.0, mode="nearest")
                merged = lateral(stages[self.in_features[-1 - index]]) + above
                if self._fuse_type == "avg":
                    merged = merged / 2
                levels.insert(0, output(merged))
        return dict(zip(self._out_features, levels))


def make_fpn(
    bottom_up: Backbone,
    in_features: Sequence[str],
    out_channels: int,
    norm: str = "",
    fuse_type: str = "sum",
    extra_in_feature: str = "p5",
    num_extra: int = 2,
    relu: bool = False,
) -> FPN:
    """Builds an FPN with extra levels on top.

    Args:
        bottom_up: a ResNet.
        in_features: consecutive stages of the ResNet; level p3 is computed from res3, and so on.
        out_channels: channels of the levels.
        norm: norm of the lateral and output convolutions, see detectron2's ``get_norm``.
        fuse_type: "sum" or "avg" of the lateral and the upper level.
        extra_in_feature: the input of the extra levels. If the last stage is res5: "res5", the stage itself; "p5", its
            level; "lateral5", the output of its 1x1 lateral convolution.
        num_extra: number of extra levels.
        relu: apply a ReLU between extra levels.

    Raises:
        D2kdError: there is no such stage, or the extra levels cannot start from ``extra_in_feature``.
    """
    shapes = bottom_up.output_shape()
    for name in in_features:
        check_choice("a stage of MODEL.FPN.IN_FEATURES", name, shapes)
    if not in_features:
        raise D2kdError(
            "MODEL.FPN.IN_FEATURES names no stage; list consecutive stages in order, such as res3, res4, res5"
        )
    stages = [_stage(name) for name in in_features]
    last = stages[-1]
    if stages != list(range(stages[0], last + 1)):
        raise D2kdError(f"MODEL.FPN.IN_FEATURES is {', '.join(in_features)}; list consecutive stages in order")
    check_choice("MODEL.FPN.EXTRA.IN_FEATURE", extra_in_feature, [f"res{last}", f"p{last}", f"lateral{last}"])
    in_channels = shapes[extra_in_feature].channels if extra_in_feature in shapes else out_channels
    extra = ExtraLevels(in_channels, out_channels, extra_in_feature, num_extra, relu)
    fpn_class = LateralFPN if extra_in_feature.startswith("lateral") else FPN
    return fpn_class(bottom_up, list(in_features), out_channels, norm, extra, fuse_type)


def _stage(feature: str) -> int:
    """Returns the number in "res5", "p5" or "lateral5"."""
    return int(feature.lstrip(string.ascii_letters))


@BACKBONE_REGISTRY.register()
def build_extra_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Builds a ResNet and FPN from ``MODEL.RESNETS`` (DEPTH, BLOCKS, STEM_OUT_CHANNELS) and ``MODEL.FPN.EXTRA``."""
    resnets = cfg.MODEL.RESNETS
    if resnets.DEPTH not in BLOCKS_OF_DEPTH:
        raise D2kdError(f"MODEL.RESNETS.DEPTH is {resnets.DEPTH}; use one of {sorted(BLOCKS_OF_DEPTH)}")
    bottom_up = make_resnet(
        resnets.BLOCKS or BLOCKS_OF_DEPTH[resnets.DEPTH],
        width=resnets.STEM_OUT_CHANNELS,
        bottleneck=resnets.DEPTH >= 50,
        out_features=resnets.OUT_FEATURES,
        norm=resnets.NORM,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        stride_in_1x1=resnets.STRIDE_IN_1X1,
        in_channels=input_shape.channels,
    )
    return fpn_of(cfg, bottom_up)


def fpn_of(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    """Makes the FPN of ``MODEL.FPN`` on a bottom-up network; see :func:`make_fpn`."""
    fpn = cfg.MODEL.FPN
    return make_fpn(
        bottom_up,
        fpn.IN_FEATURES,
        fpn.OUT_CHANNELS,
        norm=fpn.NORM,
        fuse_type=fpn.FUSE_TYPE,
        extra_in_feature=fpn.EXTRA.IN_FEATURE,
        num_extra=fpn.EXTRA.NUM_LEVELS,
        relu=fpn.EXTRA.RELU,
    )
