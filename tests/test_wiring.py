"""Parts of a built detector that do not fit together are named."""

import re

import pytest
from detectron2.config import LazyConfig, instantiate
from detectron2.layers import ShapeSpec
from omegaconf import OmegaConf
from small import CONFIGS
from torch import nn

from d2kd.config import drop_teacher
from d2kd.errors import D2kdError
from d2kd.wiring import check_wiring

QUICK = str(CONFIGS / "lazy" / "quick_crosskd_retinanet.py")


def built(**changes):
    config = LazyConfig.load(QUICK)
    drop_teacher(config)
    for key, value in changes.items():
        OmegaConf.update(config, f"model.{key.replace('__', '.')}", value, merge=False)
    return instantiate(config.model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_in_features": ["p3", "p4", "p5", "p7"]}, "head_in_features) is 'p7'; use one of p3, p4, p5, p6"),
        ({"backbone__top_block__num_levels": 0}, "head_in_features) is 'p6'; use one of p3, p4, p5"),
        ({"anchor_generator__strides": [4, 8, 16, 32]}, "strides [8, 16, 32, 64], but model.anchor_generator.strides"),
        ({"head_in_features": ["p3", "p4", "p5"]}, "strides [8, 16, 32], but model.anchor_generator.strides"),
        (
            {"head__input_shape": [ShapeSpec(channels=16)] * 4},
            "levels of 16 channels (input_shape), but the backbone's have 32",
        ),
        ({"backbone__top_block__out_channels": 64}, "top_block.out_channels is 64, but"),
        ({"head__num_anchors": 3}, "the head predicts 9 classes of anchors per place"),
        ({"head__num_classes": 4}, "the head predicts 36 classes of anchors per place"),
        ({"anchor_generator__aspect_ratios": [[1.0], [1.0], [1.0], [1.0, 2.0]]}, "numbers of anchors, 3 or 6"),
        ({"backbone__top_block__in_channels": 16}, "top_block.in_channels is 16, but p5 has 32 channels"),
    ],
)
def test_parts_that_do_not_fit_are_named(changes, message):
    with pytest.raises(D2kdError, match="^the teacher's config: .*" + re.escape(message)):
        check_wiring(built(**changes), prefix="the teacher's config: ")


def test_what_fits_or_is_of_another_kind_passes():
    check_wiring(built())
    check_wiring(nn.Linear(1, 1))


@pytest.mark.parametrize("detector", ["gfl", "atss", "fcos"])
def test_heads_with_one_anchor_need_a_shape_for_each_level(detector):
    config = LazyConfig.load(str(CONFIGS / "lazy" / f"{detector}_R18.py"))
    config.model.backbone.bottom_up.width = 4
    config.model.head.conv_dims = [32]
    check_wiring(instantiate(config.model))
    config.model.head.input_shape = config.model.head.input_shape[:4]
    with pytest.raises(D2kdError, match=r"the head reads 5 levels, but model\.head\.input_shape has 4"):
        check_wiring(instantiate(config.model))


@pytest.mark.parametrize("detector", ["gfl", "atss", "fcos"])
@pytest.mark.slow
def test_levels_that_the_backbone_lacks_are_named(detector):
    """detectron2's FCOS reads their strides when it is made, before its parts could be checked."""
    config = LazyConfig.load(str(CONFIGS / "lazy" / f"{detector}_R18.py"))
    config.model.backbone.bottom_up.width = 4
    config.model.head.conv_dims = [32]
    config.model.head_in_features = ["p3", "p9"]
    with pytest.raises(D2kdError, match=r"head_in_features\) is 'p9'; use one of p3"):
        check_wiring(instantiate(config.model))
