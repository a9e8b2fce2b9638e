"""Checks of a whole config before anything is built: of each value by its range, and of values that belong together."""

from typing import Any, Iterator, Mapping, Tuple

from .errors import D2kdError
from .keys import LAZY
from .ranges import check_ranges, is_count, with_elements


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
    check_ranges(values, is_lazy, prefix)
    check_relations(values, is_lazy, prefix)


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[Tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


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
        _check_warmup,
    ):
        message = check(_Named(values, is_lazy))
        if message:
            raise D2kdError(prefix + message)


class _Named:
    """Values by pairs of keys, YAML's and LazyConfig's; None where there is none."""

    def __init__(self, values: Mapping[str, Any], is_lazy: bool) -> None:
        self.values, self.is_lazy = values, is_lazy
        self.elements = dict(with_elements(values))

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
        "build_timm_fpn_backbone": config.get("MODEL.FPN.EXTRA.NUM_LEVELS"),
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


def _check_warmup(config: _Named) -> str:
    rescale = ("SOLVER.RESCALE_INTERVAL", "lr_multiplier.rescale_interval")
    length = ("SOLVER.WARMUP_ITERS", "lr_multiplier.warmup_length")  # in iterations, and as a share of the run
    whole = 1 if config.is_lazy else config.get("SOLVER.MAX_ITER")
    if not config.get(*rescale) or (config.get(*length) or 0) < (whole or 0):
        return ""
    return f"{config.key(*rescale)} leaves nothing to rescale: {config.key(*length)} is the whole run; set either lower"
