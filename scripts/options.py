"""Writes docs/options.md from signatures and docstrings; a test says if it is out of date."""

import inspect
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import griffe
from detectron2.config import CfgNode, get_cfg

from d2kd.config import add_distill_config
from d2kd.inference_copy import Engine
from d2kd.keys import LAZY
from d2kd.meta_arch import DistillMetaArch
from d2kd.methods import METHOD_REGISTRY, Schedule, method_names
from d2kd.modeling import ATSS, FCOS, GFL
from d2kd.modeling.anchor_points import AnchorPointDetector
from d2kd.modeling.backbone import ExtraLevels
from d2kd.modeling.one_anchor import config_key
from d2kd.modeling.timm_backbone import TimmBackbone
from d2kd.teacher import load_teacher

PAGE = Path(__file__).parents[1] / "docs" / "options.md"
INTRO = """\
# Options

All keys that d2kd adds to detectron2's configs. `scripts/options.py` makes this page from the signatures and docstrings
of the classes that take the options, so search it for any key, such as `CLIP_BEFORE_NMS`.

Set a key in a YAML config or as an override, `MODEL.DISTILL.CROSSKD.CUT 2`. The second column is the name in Python and
in a LazyConfig: a method's options are keyword arguments of its class, `CrossKD(cut=2)` or `model.methods.0.cut=2`;
those of a detector belong to `model` or `model.head`.
"""
METHODS = {name: METHOD_REGISTRY.get(name) for name in method_names()}
#: The classes and functions whose docstrings describe the keys of a node.
MAKERS: Dict[str, Tuple[Any, ...]] = {
    "MODEL.DISTILL": (DistillMetaArch,),
    "MODEL.DISTILL.TEACHER": (Engine, load_teacher),
    **{f"MODEL.DISTILL.{name.upper()}": (method,) for name, method in METHODS.items()},
    "MODEL.DISTILL.SCHEDULE.<METHOD>": (Schedule,),
    **{f"MODEL.{cls.config_node}": (cls, cls.head_class, AnchorPointDetector) for cls in (GFL, ATSS, FCOS)},
    "MODEL.FPN.EXTRA": (ExtraLevels,),
    "MODEL.TIMM": (TimmBackbone,),
}
#: Keys that are not the arguments of one class.
OTHERS = {
    "MODEL.DISTILL.METHODS": "names of the methods, such as `('CrossKD', 'PKD')`; empty for a plain detector.",
    "MODEL.DISTILL.PREFLIGHT": "number of training images on which the teacher is tested before training; 0 for none.",
    "MODEL.RESNETS.BLOCKS": "number of blocks of each stage; empty: by `DEPTH`.",
    "MODEL.FPN.EXTRA.IN_FEATURE": "input of the levels above the FPN. If the last stage is res5: `res5`, the stage; "
    "`p5`, its level; `lateral5`, the output of its lateral convolution.",
    "SOLVER.OPTIMIZER": "`SGD` or `AdamW`.",
    "SOLVER.EMA_DECAY": "decay of a moving average of the weights, evaluated and saved as well; 0 for none.",
    "SOLVER.ACCUMULATE": "micro-batches of each process per step of the optimizer. `IMS_PER_BATCH` stays the step's.",
    "SOLVER.AMP.DTYPE": "type of mixed precision, `float16` or `bfloat16`; on the CPU always bfloat16.",
    "DATALOADER.SKIP_BAD_IMAGES": "replace images that cannot be read, and count them, instead of ending the run.",
    "NUM_CLASSES": "number of classes.",
    "IN_FEATURES": "levels that the head reads.",
    "NUM_CONVS": "convolutions in each tower of the head.",
    "FOCAL_LOSS_ALPHA": "alpha of the focal loss.",
    "FOCAL_LOSS_GAMMA": "gamma of the focal loss.",
    "PRIOR_PROB": "class score at initialization.",
}
#: Arguments whose names are not those of the keys.
ARGUMENTS = {
    "MODEL.FPN.EXTRA.IN_FEATURE": "extra_in_feature",
    "MODEL.FPN.EXTRA.NUM_LEVELS": "num_extra",
    "MODEL.RESNETS.BLOCKS": "model.backbone.bottom_up.blocks",
    "SOLVER.OPTIMIZER": "optimizer",
    "IN_FEATURES": "head_in_features",
    "NUM_CONVS": "conv_dims",
}


def page() -> str:
    """The text of docs/options.md."""
    nodes: Dict[str, List[str]] = {}
    for key, default in sorted(new_keys()):
        node, _, name = key.rpartition(".")
        nodes.setdefault(node, []).append(_row(node, name, default))
    return INTRO + "".join(_section(node, rows) for node, rows in sorted(nodes.items()))


def new_keys() -> Iterator[Tuple[str, Any]]:
    """Keys that detectron2 does not have, with their defaults; schedules once, for any method."""
    old, new = get_cfg(), get_cfg()
    add_distill_config(new)
    known = {key for key, _ in _leaves(old)}
    for key, default in _leaves(new):
        method = key.removeprefix("MODEL.DISTILL.SCHEDULE.").partition(".")[0]
        if key not in known and (method == next(iter(METHODS)).upper() or "DISTILL.SCHEDULE." not in key):
            yield key.replace(f"SCHEDULE.{method}", "SCHEDULE.<METHOD>"), default


def _leaves(node: CfgNode, prefix: str = "") -> Iterator[Tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, CfgNode):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _section(node: str, rows: List[str]) -> str:
    head = "| key | argument | default | meaning |\n| --- | --- | --- | --- |\n"
    return f"\n## {_text(node)}\n\n{head}" + "".join(rows)


def _row(node: str, name: str, default: Any) -> str:
    key = f"{node}.{name}"
    argument, text = _described(node).get(name, ("", ""))
    meaning = OTHERS.get(key) or text or OTHERS.get(name)
    if not meaning:
        sys.exit(f"{key} is not described: in the docstring of what takes it, or in OTHERS of scripts/options.py")
    argument = LAZY.get(key) or ARGUMENTS.get(key) or argument or ARGUMENTS.get(name, name.lower())
    return f"| `{name}` | `{argument}` | `{default!r}` | {meaning if key in OTHERS else _text(meaning)} |\n"


@cache
def _described(node: str) -> Dict[str, Tuple[str, str]]:
    """Keys with their arguments and what docstrings say of them; a class's own replace those of its bases."""
    found = {}
    for maker in reversed(MAKERS.get(node, ())):
        for cls in reversed(inspect.getmro(maker) if inspect.isclass(maker) else (maker,)):
            text = cls.__doc__ if cls.__module__.startswith("d2kd.") else ""
            for section in griffe.Docstring(inspect.cleandoc(text or "")).parse("google", warnings=False):
                if section.kind.value in ("parameters", "attributes"):
                    found.update({config_key(item.name): (item.name, item.description) for item in section.value})
    return found


def _text(text: str) -> str:
    """A docstring's text as Markdown in a cell of a table."""
    text = re.sub(r":(?:class|func|meth):", "", text)
    for mark, plain in (("\n", " "), ("``", "`"), ("<", "&lt;"), ("|", "\\|"), ('"*"', "`*`")):
        text = text.replace(mark, plain)
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
