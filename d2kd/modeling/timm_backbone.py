"""Backbones of timm, see :mod:`d2kd.modeling.timm_models`."""

import math
from typing import Any, Dict, List, Sequence, Tuple, Union

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone import FPN
from torch import Tensor, nn

from ..errors import check_choice
from ..keys import key
from ..ranges import TIMM_NORMS
from .backbone import fpn_of
from .timm_models import check_name, check_pixels, create, download, load_classifier, pixel_statistics


class TimmBackbone(Backbone):
    """A model of timm without its classifier, as a bottom-up backbone whose stages are named like those of a ResNet.

    The stage of stride 4 is res2, that of stride 8 is res3, and so on, whatever timm calls it.

    Args:
        name: a model of timm that supports ``features_only``, with or without the tag of its weights.
        pretrained: False for random weights; True for timm's own, which it downloads; or the path of a local file with
            the weights of the whole classifier under timm's names, such as the ``model.safetensors`` of
            huggingface.co/timm, or what ``python -m d2kd.checkpoint.convert`` writes for EfficientNet-Lite.
        out_features: the stages to return, in order.
        norm: what becomes of its BatchNorm: "BN", "SyncBN", or "FrozenBN", which keeps statistics and weights. Models
            without BatchNorm stay as they are.
        freeze_at: number of stages to freeze, as for detectron2's ResNets: 1 for the stem (all that the stage of
            stride 2 is computed from), 2 for res2 (stride 4) and all before it, and so on; 0 for none. The BatchNorm of
            frozen stages is frozen as well.
        in_channels: channels of the image.

    Attributes:
        pixel_statistics: mean and standard deviation, from 0 to 255 and in RGB, of the images that the weights expect;
            None for random weights.

    Raises:
        D2kdError: timm is not installed, has no such model or no weights for it, the model has no such stages, or the
            file cannot be read or does not hold all weights.
    """

    def __init__(
        self,
        name: str,
        pretrained: Union[bool, str, None] = False,
        out_features: Sequence[str] = ("res3", "res4", "res5"),
        norm: str = "FrozenBN",
        freeze_at: int = 0,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        check_choice(key("MODEL.TIMM.NORM"), norm, TIMM_NORMS)
        check_name(name)
        stages = _stages(create(name))
        for stage in out_features:
            check_choice(f"a stage of {name}, after FPN.IN_FEATURES or out_features,", stage, stages)
        needed = stages[out_features[-1]][0] + 1  # what lies above would be parameters without a gradient
        options: Dict[str, Any] = {"out_indices": list(range(needed)), "in_chans": in_channels}
        self.net = download(name, options) if pretrained is True else create(name, **options)
        if isinstance(pretrained, str) and pretrained:
            load_classifier(self.net, pretrained)
        self._indices = {stage: stages[stage][0] for stage in out_features}
        self._shapes = {stage: stages[stage][1] for stage in out_features}
        self.pixel_statistics = pixel_statistics(name) if pretrained else None
        self._freeze(freeze_at, in_channels)
        # Depthwise convolutions are faster this way, most of all backwards on a CPU; whatever follows keeps the layout.
        self.net = _with_norm(self.net, norm).to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Dict[str, Tensor]:
        """Returns the stages (N, C, H / stride, W / stride) for images (N, 3, H, W) by name."""
        found = self.net(x)
        return {stage: self._channels_first(found[index]) for stage, index in self._indices.items()}

    def _channels_first(self, feature: Tensor) -> Tensor:
        is_last = str(getattr(self.net, "output_fmt", "NCHW")).endswith("NHWC")
        return feature.permute(0, 3, 1, 2).contiguous() if is_last else feature

    def output_shape(self) -> Dict[str, ShapeSpec]:
        """Channels and stride of each stage by name."""
        return dict(self._shapes)

    def _freeze(self, freeze_at: int, in_channels: int) -> None:
        """Freezes all that the outputs of a stride up to 2 ** freeze_at are computed from."""
        info: Any = self.net.feature_info
        wanted = [i for i, stride in enumerate(info.reduction()) if stride <= 2**freeze_at]
        if freeze_at <= 0 or not wanted:
            return
        self.net.eval()  # so that no statistics change
        parameters = [p for p in self.net.parameters() if p.requires_grad]
        feature = self.net(torch.zeros(1, in_channels, 64, 64))[wanted[-1]]
        used = torch.autograd.grad(feature.sum(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, used):
            parameter.requires_grad_(gradient is None)
        self.net.train()
        frozen = [
            m for m in self.net.modules() if _is_batch_norm(m) and not any(p.requires_grad for p in m.parameters())
        ]
        _replace(self.net, frozen)


def _stages(net: nn.Module) -> Dict[str, Tuple[int, ShapeSpec]]:
    """Index among timm's outputs, and shape, of each stage; of several with the same stride the last."""
    info: Any = net.feature_info
    found = {}
    for index, (stride, channels) in enumerate(zip(info.reduction(), info.channels())):
        if stride & (stride - 1) == 0:
            found[f"res{int(math.log2(stride))}"] = (index, ShapeSpec(channels=channels, stride=stride))
    return found


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm))


def _with_norm(net: nn.Module, norm: str) -> nn.Module:
    from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d

    convert = {"BN": lambda same: same, "SyncBN": convert_sync_batchnorm, "FrozenBN": freeze_batch_norm_2d}
    return convert[norm](net)


def _replace(net: nn.Module, norms: List[nn.Module]) -> None:
    """Freezes some of the model's BatchNorms."""
    from timm.layers import freeze_batch_norm_2d

    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if any(child is norm for norm in norms):
                parent.add_module(name, freeze_batch_norm_2d(child))


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Builds a backbone of timm and an FPN from ``MODEL.TIMM``, ``MODEL.BACKBONE.FREEZE_AT`` and ``MODEL.FPN``.

    Raises:
        D2kdError: see :class:`TimmBackbone`, :func:`check_pixels` and :func:`fpn_of`.
    """
    timm, fpn = cfg.MODEL.TIMM, cfg.MODEL.FPN
    bottom_up = TimmBackbone(
        timm.NAME, timm.PRETRAINED, fpn.IN_FEATURES, timm.NORM, cfg.MODEL.BACKBONE.FREEZE_AT, input_shape.channels
    )
    check_pixels(bottom_up, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT)
    return fpn_of(cfg, bottom_up)
