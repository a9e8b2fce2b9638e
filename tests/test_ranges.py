"""Ranges of settings: all configs that come with d2kd pass, and values out of range are named with their key."""

import re

import pytest
from detectron2 import model_zoo
from detectron2.config import LazyConfig
from omegaconf import OmegaConf
from small import CONFIGS

from d2kd.config import load_config
from d2kd.engine.recipe import flatten
from d2kd.engine.styles.lazy_style import with_defaults
from d2kd.errors import D2kdError
from d2kd.ranges import CHOICES, RANGES, check_ranges
from d2kd.relations import check_config

DEFAULTS = str(CONFIGS / "quick_crosskd_retinanet.yaml")
ZOO = ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml")


@pytest.mark.parametrize("file", [*map(str, sorted(CONFIGS.glob("*.yaml"))), *map(model_zoo.get_config_file, ZOO)])
def test_yaml_configs_pass(file):
    check_config(load_config(file))


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted((CONFIGS / "lazy").glob("*.py")), ids=lambda path: path.stem)
def test_lazy_configs_pass(file):
    config = with_defaults(LazyConfig.load(str(file)))
    check_config(flatten(OmegaConf.to_container(config, resolve=True)), is_lazy=True)


def test_every_pattern_names_a_setting():
    """A misspelt pattern would check nothing."""
    keys = set(flatten(load_config(DEFAULTS))) | {"DATALOADER.RANDOM_SUBSET_RATIO"}  # detectron2's newer versions
    for patterns in [*RANGES, *CHOICES]:
        for pattern in patterns.split():
            if pattern.isupper() or pattern[0].isupper():
                expression = re.escape(pattern).replace(r"\*", ".*")
                assert any(re.fullmatch(expression, key) for key in keys), pattern


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.FPN.OUT_CHANNELS", 0),
        ("MODEL.GFL.NUM_CONVS", -1),
        ("MODEL.RETINANET.PRIOR_PROB", 1.0),
        ("MODEL.ANCHOR_GENERATOR.SIZES", [[8], []]),
        ("MODEL.DISTILL.SCHEDULE.CROSSKD.WARMUP", -1),
        ("SOLVER.WARMUP_METHOD", "linea"),
        ("SOLVER.BIAS_LR_FACTOR", float("nan")),
        ("GLOBAL.HACK", float("inf")),
    ],
)
def test_values_out_of_range_are_named(key, value):
    with pytest.raises(D2kdError, match=re.escape(f"the teacher's config: {key} is {value!r}; ")):
        check_ranges({key: value}, is_lazy=False, prefix="the teacher's config: ")


def test_settings_of_lazy_configs_go_by_their_own_keys():
    values = {"model.methods": [{"cut": -1}], "train.max_iter": 10}
    with pytest.raises(D2kdError, match=r"^model\.methods\.0\.cut is -1; it must be 0 or more"):
        check_ranges(values, is_lazy=True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["MODEL.RETINANET.IOU_LABELS", "[0, 1]"], "MODEL.RETINANET.IOU_LABELS has 2 labels"),
        (["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"], "INPUT.MIN_SIZE_TRAIN is"),
        (["INPUT.CROP.ENABLED", "True", "INPUT.CROP.SIZE", "[2.0, 0.5]"], "INPUT.CROP.SIZE is"),
        (["MODEL.LOAD_PROPOSALS", "True"], "MODEL.LOAD_PROPOSALS True needs"),
        (["SOLVER.BASE_LR_END", "1.0"], "SOLVER.BASE_LR_END is 1.0; with WarmupCosineLR"),
        (["SOLVER.NESTEROV", "True", "SOLVER.MOMENTUM", "0.0"], "SOLVER.NESTEROV needs SOLVER.MOMENTUM"),
        (["SOLVER.REFERENCE_WORLD_SIZE", "3"], "SOLVER.IMS_PER_BATCH is 4; it must be a multiple"),
        (["MODEL.ANCHOR_GENERATOR.SIZES", "[[8], [16]]"], "MODEL.ANCHOR_GENERATOR.SIZES has 2 lists"),
        (["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "[[1.0], [1.0, 2.0], [1.0], [1.0]]"], "different numbers of anchors"),
        (["MODEL.RETINANET.IN_FEATURES", "['p3', 'p4', 'p5', 'p8']"], "MODEL.RETINANET.IN_FEATURES names 'p8'"),
    ],
)
def test_values_that_do_not_fit_each_other(overrides, message):
    with pytest.raises(D2kdError, match=re.escape(message)):
        check_config(load_config(DEFAULTS, overrides))
