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
    "MODEL.RESNETS.STEM_OUT_CHANNELS model.backbone.bottom_up.width": (is_count, "a number of channels, 1 or more"),
    "MODEL.RESNETS.*_OUT_CHANNELS MODEL.RESNETS.*GROUP*": (is_count, "1 or more"),
    "MODEL.RESNETS.OUT_FEATURES model.head_in_features": (_list_of(_text), "one name or more"),
    "MODEL.RETINANET.IN_FEATURES MODEL.GFL.IN_FEATURES": (_list_of(_text), "one name or more"),
    "MODEL.ATSS.IN_FEATURES MODEL.FCOS.IN_FEATURES": (_list_of(_text), "one name or more"),
    "MODEL.FPN.IN_FEATURES": (_list_of(_text, empty=True), "names of stages"),
    "model.backbone.norm model.head.norm model.backbone.bottom_up.norm": (
        lambda norm: norm in NORMS or "." in norm,  # the latter is a function's full name
        f"one of {', '.join(map(repr, NORMS))}",
    ),
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
    "MODEL.DISTILL.*.VLR_TOPK model.methods.*.vlr_topk": (is_count, "1 or more"),
    "MODEL.DISTILL.TEACHER.OPTS": (
        _list_of(lambda x: not isinstance(x, (list, tuple, dict)), empty=True),
        "a list of overrides: KEY, value, ...",
    ),
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
    "MODEL.FPN.FUSE_TYPE model.backbone.fuse_type": ("sum", "avg"),
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


# detectron2's own default of these is None.
MAY_BE_NONE = ("SOLVER.WEIGHT_DECAY_BIAS",)


def check_config(values: Mapping[str, Any], is_lazy: bool = False, prefix: str = "") -> None:
    """Checks all values of a config.

    Args:
        values: by dotted key; nodes of a config may be in them.
        is_lazy: whether the keys are those of a LazyConfig.
        prefix: what to say before the message, such as whose config it is.

    Raises:
        D2kdError: names key, value and range.
    """
    values = dict(_leaves(values))
    missing = [name for name, value in values.items() if value is None and name not in MAY_BE_NONE]
    if missing and not is_lazy:  # yacs takes None for any type; in a LazyConfig it is a value like any other
        names = ", ".join(missing)
        raise D2kdError(f"{prefix}{names}: a value is missing; write one, or leave the key out for its default")
    check_ranges(values, is_lazy, prefix)
    check_relations(values, is_lazy, prefix)


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[Tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def check_ranges(values: Mapping[str, Any], is_lazy: bool, prefix: str = "") -> None:
    """Checks values by themselves; arguments as of :func:`check_config`, all values by dotted key."""
    values = dict(_with_elements(values))
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


def check_relations(values: Mapping[str, Any], is_lazy: bool, prefix: str = "") -> None:
    """Checks values that depend on each other, after :func:`check_ranges`; takes the same arguments."""
    for check in (
        _check_labels,
        _check_anchors,
        _check_levels,
        _check_stages,
        _check_sizes,
        _check_crop,
        _check_proposals,
        _check_rates,
    ):
        message = check(_Named(values, is_lazy))
        if message:
            raise D2kdError(prefix + message)


class _Named:
    """Values by pairs of keys, YAML's and LazyConfig's; None where there is none."""

    def __init__(self, values: Mapping[str, Any], is_lazy: bool) -> None:
        self.values, self.is_lazy = values, is_lazy
        self.elements = dict(_with_elements(values))

    def key(self, yaml_key: str, lazy_key: str = "") -> str:
        return (lazy_key or LAZY.get(yaml_key, yaml_key)) if self.is_lazy else yaml_key

    def get(self, yaml_key: str, lazy_key: str = "") -> Any:
        return self.values.get(self.key(yaml_key, lazy_key))


def _check_labels(config: _Named) -> str:
    thresholds = ("MODEL.RETINANET.IOU_THRESHOLDS", "model.anchor_matcher.thresholds")
    labels = ("MODEL.RETINANET.IOU_LABELS", "model.anchor_matcher.labels")
    count, wanted = (len(config.get(*keys) or ()) for keys in (labels, thresholds))
    if not wanted or count == wanted + 1:
        return ""
    return f"{config.key(*labels)} has {count} labels; {wanted} thresholds ({config.key(*thresholds)}) need one more"


def _check_anchors(config: _Named) -> str:
    """Sizes and aspect ratios of anchors: of as many levels as there are, and as many of each level."""
    levels = len(config.get("MODEL.RETINANET.IN_FEATURES", "model.anchor_generator.strides") or ())
    if not levels or not (config.is_lazy or _architecture(config) == "RetinaNet"):
        return ""
    counts = []
    for name in ("sizes", "aspect_ratios"):
        keys = (f"MODEL.ANCHOR_GENERATOR.{name.upper()}", f"model.anchor_generator.{name}")
        values = config.get(*keys)
        lists = values if isinstance(values[0], (list, tuple)) else [values]
        if len(lists) not in (1, levels):
            return f"{config.key(*keys)} has {len(lists)} lists; give one for all levels, or {levels}, one for each"
        counts.append([len(x) for x in lists] * (levels if len(lists) == 1 else 1))
    if len({sizes * ratios for sizes, ratios in zip(*counts)}) > 1:
        prefix = config.key("MODEL.ANCHOR_GENERATOR", "model.anchor_generator")
        return f"{prefix}: levels have different numbers of anchors; give each as many sizes and aspect ratios"
    return ""


def _check_levels(config: _Named) -> str:
    """The levels that RetinaNet's head reads; the other detectors check theirs when they are built."""
    extra = {
        "build_extra_fpn_backbone": config.get("MODEL.FPN.EXTRA.NUM_LEVELS"),
        "build_retinanet_resnet_fpn_backbone": 2,
    }
    count = extra.get(str(config.get("MODEL.BACKBONE.NAME")))
    stages = config.get("MODEL.FPN.IN_FEATURES")
    if count is None or not stages or _architecture(config) != "RetinaNet" or not stages[-1][3:].isdigit():
        return ""
    last = int(stages[-1][3:])
    known = [f"p{stage[3:]}" for stage in stages] + [f"p{last + 1 + i}" for i in range(count)]
    for name in config.get("MODEL.RETINANET.IN_FEATURES"):
        if name not in known:
            return f"MODEL.RETINANET.IN_FEATURES names {name!r}; the backbone has {', '.join(known)}"
    return ""


def _check_stages(config: _Named) -> str:
    """The stages that a LazyConfig's FPN takes; :func:`make_fpn` checks those of YAML."""
    stages = config.values.get("model.backbone.in_features")
    known = config.values.get("model.backbone.bottom_up.out_features", ["res3", "res4", "res5"])
    if not stages or not isinstance(known, list) or stages in [known[i:j] for i in range(6) for j in range(i + 1, 7)]:
        return ""
    return f"model.backbone.in_features is {stages!r}; it must be consecutive ones of the backbone's, {known!r}"


def _architecture(config: _Named) -> str:
    return str(config.get("MODEL.META_ARCHITECTURE")).removeprefix("Distill")


def _check_sizes(config: _Named) -> str:
    for name, style in config.elements.items():
        length = config.elements.get(f"{name.rpartition('.')[0]}.short_edge_length")
        if name.endswith(".sample_style") and style == "range" and isinstance(length, list) and len(length) != 2:
            return f"{name} is range, which needs two short_edge_length, [least, largest], not {length!r}"
    sizes = config.get("INPUT.MIN_SIZE_TRAIN")
    if config.is_lazy or config.get("INPUT.MIN_SIZE_TRAIN_SAMPLING") != "range" or len(sizes) == 2:
        return ""
    return f"INPUT.MIN_SIZE_TRAIN is {sizes!r}; INPUT.MIN_SIZE_TRAIN_SAMPLING range needs two lengths, (least, largest)"


def _check_crop(config: _Named) -> str:
    size, kind = config.get("INPUT.CROP.SIZE"), config.get("INPUT.CROP.TYPE")
    if not config.get("INPUT.CROP.ENABLED"):
        return ""
    if kind.startswith("relative") and max(size) > 1:
        return f"INPUT.CROP.SIZE is {size!r}; with INPUT.CROP.TYPE {kind} it must be shares of the image, at most 1"
    if kind.startswith("absolute") and not all(map(is_count, size)):
        return f"INPUT.CROP.SIZE is {size!r}; with INPUT.CROP.TYPE {kind} it must be in pixels, 1 or more"
    if kind == "absolute_range" and size[0] > size[1]:
        return f"INPUT.CROP.SIZE is {size!r}; with INPUT.CROP.TYPE {kind} the least length comes first"
    return ""


def _check_proposals(config: _Named) -> str:
    sets, files = config.get("DATASETS.TRAIN"), config.get("DATASETS.PROPOSAL_FILES_TRAIN")
    if not config.get("MODEL.LOAD_PROPOSALS") or len(sets) == len(files):
        return ""
    return "MODEL.LOAD_PROPOSALS True needs a file in DATASETS.PROPOSAL_FILES_TRAIN for each data set; set it to False"


def _check_rates(config: _Named) -> str:
    rate, end, cosine = config.get("SOLVER.BASE_LR"), config.get("SOLVER.BASE_LR_END"), "WarmupCosineLR"
    if end is not None and end > rate and config.get("SOLVER.LR_SCHEDULER_NAME") == cosine:
        return f"SOLVER.BASE_LR_END is {end!r}; with {cosine} it must be at most SOLVER.BASE_LR, {rate!r}"
    if config.get("SOLVER.NESTEROV", "optimizer.nesterov") and not config.get("SOLVER.MOMENTUM", "optimizer.momentum"):
        keys = [config.key(f"SOLVER.{name}", f"optimizer.{name.lower()}") for name in ("NESTEROV", "MOMENTUM")]
        return f"{keys[0]} needs {keys[1]} above 0"
    batch, workers = config.get("SOLVER.IMS_PER_BATCH"), config.get("SOLVER.REFERENCE_WORLD_SIZE")
    if workers and batch % workers:
        return f"SOLVER.IMS_PER_BATCH is {batch}; it must be a multiple of SOLVER.REFERENCE_WORLD_SIZE, {workers}"
    return ""


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


def _with_elements(values: Mapping[str, Any], prefix: str = "") -> Iterator[Tuple[str, Any]]:
    """Adds the values of mappings in lists, such as a LazyConfig's methods, by keys like ``model.methods.0.cut``."""
    for key, value in values.items():
        yield prefix + key, value
        for index, element in enumerate(value if isinstance(value, list) else []):
            if isinstance(element, Mapping):
                yield from _with_elements(element, f"{prefix}{key}.{index}.")


def _floats(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, (list, tuple)):
        for element in value:
            yield from _floats(element)
