"""Which values settings may have, in either config style.

What is listed here is checked before anything is built, for a run's config and for its teacher's, so that a value with
which nothing can run is reported by its key instead of by whatever it breaks.
"""

import math
import re
from fnmatch import translate
from functools import cache
from typing import Any, Callable, Dict, Iterator, List, Mapping, Tuple

from .errors import D2kdError, check_choice
from .inference_copy import DTYPES
from .keys import LAZY

Test = Callable[[Any], bool]


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: Any) -> bool:
    """Whether a value is an integer above 0."""
    return _whole(value) and value >= 1


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _positive(value: Any) -> bool:
    return is_number(value) and value > 0


def _not_negative(value: Any) -> bool:
    return is_number(value) and value >= 0


def _probability(value: Any) -> bool:
    return is_number(value) and 0 < value < 1


def _fraction(value: Any) -> bool:
    return is_number(value) and 0 <= value < 1


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _any(value: Any) -> bool:
    return True


def _list_of(test: Test, length: int = 0, empty: bool = False) -> Test:
    """Tests a list: its elements, their number if it is not 0, and that it is not empty."""

    def is_valid(values: Any) -> bool:
        if not isinstance(values, (list, tuple)) or not values:
            return isinstance(values, (list, tuple)) and empty
        return (not length or len(values) == length) and all(test(value) for value in values)

    return is_valid


def _ascending(test: Test, empty: bool = False) -> Test:
    return lambda values: _list_of(test, empty=empty)(values) and list(values) == sorted(set(values))


def _either(*tests: Test) -> Test:
    return lambda value: any(test(value) for test in tests)


NORMS = ("", "BN", "SyncBN", "FrozenBN", "GN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N", "LN")
TIMM_NORMS = ("BN", "SyncBN", "FrozenBN")
# Patterns of YAML keys and of LazyConfig keys, what their values must be, and the same in words.
RANGES: Dict[str, Tuple[Test, str]] = {
    "OUTPUT_DIR": (lambda path: _text(path) and path != "" and "\0" not in path, "the path of a folder"),
    "SEED": (lambda value: _whole(abs(value)) and value < 2**31, "below 2147483648; negative for a random one"),
    # data
    "DATASETS.TRAIN": (_either(_text, _list_of(_text)), "one data set or more"),
    "DATASETS.TEST": (_either(_text, _list_of(_text, empty=True)), "names of data sets"),
    "DATALOADER.NUM_WORKERS dataloader.test.num_workers": (_whole, "0 or more"),
    "DATALOADER.REPEAT_THRESHOLD": (_not_negative, "0 or more"),
    "DATALOADER.RANDOM_SUBSET_RATIO": (lambda value: is_number(value) and 0 < value <= 1, "above 0 and at most 1"),
    "INPUT.MIN_SIZE_TRAIN": (_list_of(is_count), "lengths in pixels, 1 or more"),
    "INPUT.MIN_SIZE_TEST": (_whole, "0 (no resizing) or a length in pixels"),
    "INPUT.MAX_SIZE_*": (is_count, "a length in pixels, 1 or more"),
    "dataloader.*.augmentations.*.short_edge_length": (_either(_whole, _list_of(is_count)), "lengths in pixels"),
    "dataloader.*.augmentations.*.max_size": (is_count, "a length in pixels, 1 or more"),
    "dataloader.*.augmentations.*.prob": (lambda x: is_number(x) and 0 <= x <= 1, "between 0 and 1"),
    "dataloader.*.mapper.image_format": (lambda value: value in ("BGR", "RGB"), "BGR or RGB"),
    "INPUT.CROP.SIZE": (_list_of(_positive, 2), "two numbers above 0, height and width"),
    "INPUT.FORMAT": (lambda value: value in ("BGR", "RGB"), "BGR or RGB"),
    "MODEL.PIXEL_MEAN": (_list_of(is_number, 3), "three finite numbers"),
    "MODEL.PIXEL_STD": (_list_of(_positive, 3), "three numbers above 0"),
    # backbone
    "MODEL.RESNETS.BLOCKS": (_list_of(is_count, 4, empty=True), "empty, or the number of blocks of res2 to res5"),
    "model.backbone.bottom_up.blocks": (_list_of(is_count), "numbers of blocks, 1 or more"),
    "MODEL.RESNETS.DEPTH": (lambda depth: depth in (18, 34, 50, 101, 152), "18, 34, 50, 101 or 152"),
    "MODEL.RESNETS.RES5_DILATION": (lambda dilation: dilation in (1, 2), "1 or 2"),
    "MODEL.RESNETS.STEM_OUT_CHANNELS model.backbone.bottom_up.width": (is_count, "a number of channels, 1 or more"),
    "MODEL.TIMM.NAME": (_text, "the name of a model of timm"),
    "MODEL.TIMM.PRETRAINED": (
        lambda value: value is None or isinstance(value, bool) or (_text(value) and value != ""),
        "True, False, or the path of a file",
    ),
    "MODEL.RESNETS.*_OUT_CHANNELS MODEL.RESNETS.*GROUP*": (is_count, "1 or more"),
    "MODEL.RESNETS.OUT_FEATURES model.head_in_features": (_list_of(_text), "one name or more"),
    "MODEL.RETINANET.IN_FEATURES MODEL.GFL.IN_FEATURES": (_list_of(_text), "one name or more"),
    "MODEL.ATSS.IN_FEATURES MODEL.FCOS.IN_FEATURES": (_list_of(_text), "one name or more"),
    "MODEL.FPN.IN_FEATURES": (_list_of(_text, empty=True), "names of stages"),
    "model.teacher.input_format": (lambda value: value in ("BGR", "RGB", None), "BGR or RGB"),
    "model.teacher.device": (lambda value: value.split(":")[0] in ("cpu", "cuda"), "cpu or cuda"),
    "model.backbone.in_features model.backbone.bottom_up.out_features": (_list_of(_text), "one name or more"),
    "MODEL.FPN.OUT_CHANNELS model.backbone.out_channels": (is_count, "a number of channels, 1 or more"),
    "model.backbone.top_block.*_channels": (is_count, "a number of channels, 1 or more"),
    "MODEL.FPN.EXTRA.NUM_LEVELS model.backbone.top_block.num_levels": (_whole, "0 or more"),
    "MODEL.BACKBONE.FREEZE_AT model.backbone.bottom_up.freeze_at": (lambda x: _whole(abs(x)), "a number of stages"),
    # heads
    "MODEL.*.NUM_CLASSES model.num_classes model.head.num_classes": (is_count, "1 or more"),
    "MODEL.RETINANET.NUM_CONVS MODEL.GFL.NUM_CONVS": (is_count, "1 or more"),
    "MODEL.ATSS.NUM_CONVS MODEL.FCOS.NUM_CONVS": (is_count, "1 or more"),
    "model.head.conv_dims": (_list_of(is_count), "numbers of channels, 1 or more of each convolution"),
    "model.head.input_shape": (_list_of(_any), "the shapes of one level or more"),
    "model.head.input_shape.*.channels": (is_count, "1 or more"),
    "model.head.num_anchors": (is_count, "1 or more"),
    "MODEL.*.PRIOR_PROB model.head.prior_prob": (_probability, "a probability between 0 and 1"),
    "MODEL.GFL.REG_MAX model.head.reg_max": (is_count, "1 or more"),
    "MODEL.*.TOPK MODEL.*.TOPK_CANDIDATES_TEST model.topk model.test_topk_candidates": (is_count, "1 or more"),
    "MODEL.*.NMS_THRESH_TEST model.test_nms_thresh": (lambda x: is_number(x) and 0 <= x <= 1, "between 0 and 1"),
    "MODEL.*.FOCAL_LOSS_GAMMA model.focal_loss_gamma": (_not_negative, "0 or more"),
    "MODEL.GFL.QFL_BETA model.qfl_beta MODEL.RETINANET.SMOOTH_L1_LOSS_BETA model.smooth_l1_beta": (
        _not_negative,
        "0 or more",
    ),
    "MODEL.FCOS.CENTER_SAMPLING_RADIUS model.center_sampling_radius": (_not_negative, "0 (the whole box) or more"),
    "MODEL.RETINANET.BBOX_REG_WEIGHTS model.box2box_transform.weights": (_list_of(_positive, 4), "four above 0"),
    "MODEL.RETINANET.IOU_THRESHOLDS model.anchor_matcher.thresholds": (
        _ascending(_positive),
        "ascending numbers above 0",
    ),
    "MODEL.RETINANET.IOU_LABELS model.anchor_matcher.labels": (
        _list_of(lambda label: label in (-1, 0, 1)),
        "a list of 0 (background), -1 (ignored) and 1 (object)",
    ),
    # anchors
    "MODEL.*.ANCHOR_SCALE model.anchor_scale": (_positive, "above 0"),
    "MODEL.ANCHOR_GENERATOR.SIZES MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS model.anchor_generator.sizes "
    "model.anchor_generator.aspect_ratios": (
        _either(_list_of(_list_of(_positive)), _list_of(_positive)),
        "a list for each level, or one for all, of numbers above 0",
    ),
    "MODEL.ANCHOR_GENERATOR.OFFSET model.anchor_generator.offset": (_fraction, "at least 0 and below 1"),
    "model.anchor_generator.strides": (_list_of(is_count), "the stride of each level"),
    # distillation
    "MODEL.DISTILL.PREFLIGHT": (_whole, "0 (no check) or more images"),
    "MODEL.DISTILL.GRADIENT_PERIOD": (_whole, "0 (never) or more iterations"),
    "MODEL.DISTILL.SCHEDULE.*": (_whole, "0 or more iterations"),
    "MODEL.DISTILL.*TEMPERATURE model.methods.*temperature": (_positive, "above 0"),
    "MODEL.DISTILL.*.BETA model.methods.*.beta": (_not_negative, "0 or more"),
    "MODEL.DISTILL.*.CUT model.methods.*.cut": (_whole, "0 or more convolutions"),
    "MODEL.DISTILL.*.TEACHER_CUT model.methods.*.teacher_cut": (
        lambda value: value == -1 or _whole(value),
        "0 or more convolutions; -1 for the distance of the student's cut from the predictors",
    ),
    "MODEL.DISTILL.*.VLR_TOPK model.methods.*.vlr_topk": (is_count, "1 or more"),
    "MODEL.DISTILL.TEACHER.OPTS": (
        _list_of(lambda x: not isinstance(x, (list, tuple, dict)), empty=True),
        "a list of overrides: KEY, value, ...",
    ),
    "MODEL.DISTILL.TEACHER.SCALE": (_positive, "above 0"),
    "MODEL.DISTILL.LEVELS": (_list_of(_text, empty=True), "a list of levels, student's:teacher's"),
    "MODEL.DISTILL.FEATURES": (_list_of(_text, empty=True), "a list of paths of modules"),
    "MODEL.DISTILL.METHODS": (_list_of(_either(_text, lambda x: isinstance(x, dict)), empty=True), "a list of methods"),
    "MODEL.DISTILL.INHERIT": (_list_of(_text, empty=True), "a list of neck and head"),
    "MODEL.DISTILL.CLASS_MAP": (
        _list_of(_either(_text, _list_of(_either(_text, _whole), 2)), empty=True),
        "a list of names or of pairs (the student's class, the teacher's)",
    ),
    # solver
    "SOLVER.MAX_ITER": (is_count, "1 or more"),
    "SOLVER.IMS_PER_BATCH": (is_count, "1 or more"),
    "SOLVER.ACCUMULATE": (is_count, "1 or more micro-batches"),
    "SOLVER.BASE_LR": (_positive, "above 0"),
    "SOLVER.BASE_LR_END": (_not_negative, "0 or more"),
    "SOLVER.BIAS_LR_FACTOR optimizer.params.bias_lr_factor": (_not_negative, "0 or more"),
    "SOLVER.CHECKPOINT_PERIOD": (is_count, "1 or more"),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": (_positive, "above 0"),
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": (lambda value: value > 0, "above 0, or inf"),
    "SOLVER.EMA_DECAY": (_fraction, "at least 0 (no average) and below 1"),
    "SOLVER.GAMMA": (_positive, "above 0"),
    "SOLVER.MOMENTUM optimizer.momentum": (_fraction, "at least 0 and below 1"),
    "SOLVER.NUM_DECAYS": (is_count, "1 or more"),
    "SOLVER.REFERENCE_WORLD_SIZE": (_whole, "0 (no scaling) or more"),
    "SOLVER.STEPS": (_ascending(_positive, empty=True), "ascending iterations above 0"),
    "SOLVER.WARMUP_FACTOR lr_multiplier.warmup_factor": (_not_negative, "0 or more"),
    "SOLVER.WARMUP_ITERS": (_whole, "0 or more"),
    "lr_multiplier.warmup_length": (lambda x: is_number(x) and 0 <= x <= 1, "a share of training, 0 to 1"),
    "lr_multiplier.scheduler.values": (_list_of(is_number), "numbers"),
    "lr_multiplier.scheduler.milestones": (_ascending(_positive, empty=True), "ascending numbers above 0"),
    "SOLVER.WEIGHT_DECAY SOLVER.WEIGHT_DECAY_NORM optimizer.weight_decay": (_not_negative, "0 or more"),
    "optimizer.params.weight_decay*": (_either(_not_negative, lambda value: value is None), "0 or more, or null"),
    "SOLVER.WEIGHT_DECAY_BIAS": (_either(_not_negative, lambda value: value is None), "0 or more"),
    # training and tests
    "train.log_period": (is_count, "1 or more"),
    "train.checkpointer.max_to_keep": (_either(is_count, lambda value: value is None), "1 or more, or null"),
    "TEST.EVAL_PERIOD": (_whole, "0 (only at the end) or more"),
    "TEST.DETECTIONS_PER_IMAGE": (is_count, "1 or more"),
    "TEST.PRECISE_BN.NUM_ITER": (is_count, "1 or more"),
    "TEST.EXPECTED_RESULTS": (
        _list_of(lambda x: _list_of(_any, 4)(x) and all(map(_text, x[:2])) and all(map(is_number, x[2:])), empty=True),
        "a list of [task, metric, value, tolerance]",
    ),
}
# Settings that name one of a few things.
CHOICES: Dict[str, Tuple[str, ...]] = {
    "MODEL.RESNETS.NORM MODEL.FPN.NORM MODEL.RETINANET.NORM MODEL.GFL.NORM MODEL.ATSS.NORM MODEL.FCOS.NORM": NORMS,
    "MODEL.TIMM.NORM": TIMM_NORMS,
    "MODEL.FPN.FUSE_TYPE model.backbone.fuse_type": ("sum", "avg"),
    "MODEL.DISTILL.TEACHER.DTYPE": DTYPES,
    "INPUT.CROP.TYPE": ("relative", "relative_range", "absolute", "absolute_range"),
    "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "dataloader.*.augmentations.*.sample_style": ("choice", "range"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm"),
    "SOLVER.LR_SCHEDULER_NAME": ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"),
    "SOLVER.WARMUP_METHOD lr_multiplier.warmup_method": ("linear", "constant"),
}
# Infinite numbers make sense here.
MAY_BE_INFINITE = ("SOLVER.CLIP_GRADIENTS.NORM_TYPE",)


def check_ranges(values: Mapping[str, Any], is_lazy: bool, prefix: str = "") -> None:
    """Checks values by themselves; arguments as of :func:`check_config`, all values by dotted key."""
    values = dict(with_elements(values))
    for name, (is_valid, words) in RANGES.items():
        for found in _matching(values, name, is_lazy):
            if not _holds(is_valid, values[found]):
                raise D2kdError(f"{prefix}{found} is {values[found]!r}; it must be {words}")
    for name, choices in CHOICES.items():
        for found in _matching(values, name, is_lazy):
            check_choice(prefix + found, values[found], choices)
    for found, value in values.items():
        if found not in MAY_BE_INFINITE and any(not math.isfinite(x) for x in _floats(value)):
            raise D2kdError(f"{prefix}{found} is {value!r}; it must be finite")


def _matching(values: Mapping[str, Any], patterns: str, is_lazy: bool) -> List[str]:
    wanted = _expression(patterns, is_lazy)
    return [key for key in values if wanted.match(key)]


@cache
def _expression(patterns: str, is_lazy: bool) -> "re.Pattern[str]":
    wanted = [LAZY.get(pattern, pattern) if is_lazy else pattern for pattern in patterns.split()]
    return re.compile("|".join(map(translate, wanted)))


def _holds(is_valid: Test, value: Any) -> bool:
    try:
        return bool(is_valid(value))
    except TypeError:  # an element is of another type than the others
        return False


def with_elements(values: Mapping[str, Any], prefix: str = "") -> Iterator[Tuple[str, Any]]:
    """Adds the values of mappings in lists, such as a LazyConfig's methods, by keys like ``model.methods.0.cut``."""
    for key, value in values.items():
        yield prefix + key, value
        for index, element in enumerate(value if isinstance(value, list) else []):
            if isinstance(element, Mapping):
                yield from with_elements(element, f"{prefix}{key}.{index}.")


def _floats(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, (list, tuple)):
        for element in value:
            yield from _floats(element)
