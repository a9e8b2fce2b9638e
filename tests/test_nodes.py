"""Nodes of LazyConfigs, checked by the signatures of what they call."""

import re
from typing import Tuple

import pytest
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig
from detectron2.layers import ShapeSpec
from omegaconf import OmegaConf
from small import CONFIGS
from torch import nn

from d2kd.errors import D2kdError
from d2kd.methods import CrossKD
from d2kd.nodes import check_nodes, resolved
from d2kd.signatures import arguments, fits

QUICK = str(CONFIGS / "lazy" / "quick_crosskd_retinanet.py")


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted((CONFIGS / "lazy").glob("*.py")), ids=lambda path: path.stem)
def test_configs_pass(file):
    check_nodes(LazyConfig.load(str(file)))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", 3, "model is 3; it must be an object"),
        ("train.amp", [], "train.amp is []; it must be a node of settings"),
        ("dataloader.evaluator", "x", "dataloader.evaluator is 'x'; it must be an object"),
        ("lr_multiplier", None, "lr_multiplier is None; it must be an object"),
        ("model.head", None, "model.head is None; RetinaNet takes"),
        ("model.backbone.bottom_up", {}, "model.backbone.bottom_up is {}; FPN takes an object there"),
        ("model.methods.0.cut", "x", "model.methods.0.cut is 'x'; CrossKD takes int there"),
        ("model.methods.0.cutt", 1, "model.methods.0 has no 'cutt', CrossKD takes "),
        ("model.methods", [3], "model.methods is [3]; DistillRetinaNet takes Sequence[d2kd.methods.base.Method] there"),
        ("model.head.input_shape", [-1], "model.head.input_shape is [-1]; RetinaNetHead takes"),
        ("model.head.conv_dims", [32, 1.5], "model.head.conv_dims is [32, 1.5]; RetinaNetHead takes List[int] there"),
        ("model.head._target_", "nowhere.Head", "model.head._target_ is 'nowhere.Head', which is no class"),
        ("model.head._target_", 3, "model.head._target_ is 3, which is no class"),
        (
            "dataloader.train.dataset.names",
            {},
            "names is {}; get_detection_dataset_dicts takes a plain value or an object",
        ),
        ("optimizer.nesterov", 1, "optimizer.nesterov is 1; SGD takes bool there"),
        ("model.head.norm", "GM", "model.head.norm is 'GM'; RetinaNetHead takes a function or one of '', 'BN'"),
        ("model.head.norm", "torch.nn.BatchNorm2d", "model.head.norm is 'torch.nn.BatchNorm2d'; RetinaNetHead takes"),
        ("model.focal_loss_alpha", "x", "model.focal_loss_alpha is 'x'; "),
        ("model.input_format", "${nothing}", "model.input_format of the config cannot be resolved"),
        ("model.input_format", "???", "model.input_format of the config cannot be resolved"),
    ],
)
def test_what_cannot_be_called_is_named(key, value, message):
    config = LazyConfig.load(QUICK)
    OmegaConf.update(config, key, value, merge=False)
    with pytest.raises(D2kdError, match=re.escape(message).replace("RetinaNet\\ ", "(Distill)?RetinaNet\\ ")):
        check_nodes(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dataloader.evaluator", None),
        ("model.teacher", None),
        ("optimizer.lr", 1),
        ("model.head.norm", lambda channels: nn.BatchNorm2d(channels)),
        ("model.head.input_shape", [ShapeSpec(channels=32)]),
        ("model.methods", []),
        ("model.methods", [L(CrossKD)(cut=2)]),
    ],
)
def test_what_can_be_called_passes(key, value):
    config = LazyConfig.load(QUICK)
    OmegaConf.update(config, key, value, merge=False)
    check_nodes(config)


@pytest.mark.parametrize("key", ["model.backbone", "model.head.conv_dims", "lr_multiplier.scheduler"])
def test_arguments_that_are_missing_are_named(key):
    config = LazyConfig.load(QUICK)
    parent, _, name = key.rpartition(".")
    del OmegaConf.select(config, parent)[name]
    with pytest.raises(D2kdError, match=f"^the teacher's config: {re.escape(key)} is missing, and "):
        check_nodes(config, prefix="the teacher's config: ")
    assert name not in resolved(config)[parent.split(".")[0]]


class Base:
    def __init__(self, size: int, scale: float = 1.0, **rest: object) -> None: ...


class Child(Base):
    def __init__(self, color: str = "red", **kwargs: object) -> None:
        super().__init__(size=3, **kwargs)


def test_arguments_include_those_that_a_base_takes_but_not_what_the_class_gives_it():
    assert list(arguments(Child)) == ["scale", "color"]
    assert list(arguments(Base)) == ["size", "scale"]


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (True, int, False),
        (1, float, True),
        (True, float, False),
        (1.0, int, False),
        (None, int, False),
        ((1, 2), tuple, True),
        ((1, 2), Tuple[int], True),
        ("ab", list, False),
        ({"_target_": "x"}, int, True),
        ({}, nn.Module, False),
    ],
)
def test_fits(value, annotation, expected):
    assert fits(value, annotation) is expected
