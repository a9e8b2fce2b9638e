"""student.yaml: the config of a run's model for detectron2 without d2kd."""

import copy
import logging
import os
from typing import Any, Dict, Iterable, Iterator, List

from detectron2.config import CfgNode, LazyConfig, get_cfg
from detectron2.modeling import ANCHOR_GENERATOR_REGISTRY, BACKBONE_REGISTRY, META_ARCH_REGISTRY
from omegaconf import DictConfig

from ..checkpoint import files
from ..meta_arch import DistillMetaArch
from ..nodes import located, resolved
from ..signatures import arguments
from .recipe import Config
from .styles.lazy_style import TRAIN_DEFAULTS

STUDENT_FILE, FINAL_CHECKPOINT = "student.yaml", "model_final.pth"
#: What a folder is called where detectron2's own configs name none.
DEFAULT_OUTPUT = "./output"


def write_student(config: Config, folder: str) -> None:
    """Writes student.yaml into the folder of a run, in the style of its config.

    It names the run's last checkpoint as weights. Keys that only d2kd has are left out, and so is the folder, lest
    other programs write there. A model with parts that detectron2 does not have gets no file; the log says which.

    Args:
        config: of the run.
        folder: of the run.

    Raises:
        OSError: the file cannot be written.
    """
    path, weights = os.path.join(folder, STUDENT_FILE), os.path.abspath(os.path.join(folder, FINAL_CHECKPOINT))
    is_yaml = isinstance(config, CfgNode)
    foreign = _foreign_names(config) if is_yaml else _foreign_targets(lazy_student(config, weights))
    if foreign:
        logging.getLogger(__name__).info(
            "No %s: detectron2 without d2kd has no %s", STUDENT_FILE, ", ".join(dict.fromkeys(foreign))
        )
    elif is_yaml:
        files.write_text(path, yaml_student(config, weights).dump(default_flow_style=None))
    else:
        LazyConfig.save(lazy_student(config, weights), path)


def yaml_student(config: CfgNode, weights: str) -> CfgNode:
    """What differs from detectron2's defaults in a config, of the keys that detectron2 has.

    Args:
        config: with d2kd's keys.
        weights: its MODEL.WEIGHTS.
    """
    config = config.clone()
    config.defrost()
    config.MODEL.META_ARCHITECTURE, config.MODEL.WEIGHTS = _plain_name(config), weights
    defaults = get_cfg()
    config.OUTPUT_DIR = defaults.OUTPUT_DIR
    return CfgNode({"VERSION": config.VERSION, **_differences(config, defaults)})


def _plain_name(config: CfgNode) -> str:
    return str(config.MODEL.META_ARCHITECTURE).removeprefix("Distill")


def _differences(config: CfgNode, defaults: CfgNode) -> Dict[str, Any]:
    found = {}
    for key in config.keys() & defaults.keys():
        value, default = config[key], defaults[key]
        if isinstance(value, CfgNode):
            value, default = _differences(value, default), {}
        if value != default:
            found[key] = value
    return found


def _foreign_names(config: CfgNode) -> List[str]:
    """Names of the parts of a model that detectron2 does not register."""
    model = config.MODEL
    parts = (
        (META_ARCH_REGISTRY, _plain_name(config)),
        (BACKBONE_REGISTRY, model.BACKBONE.NAME),
        (ANCHOR_GENERATOR_REGISTRY, model.ANCHOR_GENERATOR.NAME),
    )
    return [name for registry, name in parts if registry.get(name).__module__.split(".")[0] != "detectron2"]


def lazy_student(config: DictConfig, weights: str) -> DictConfig:
    """A LazyConfig with the plain class of its student, and without what d2kd reads.

    Args:
        config: of a run.
        weights: its train.init_checkpoint.
    """
    config = copy.deepcopy(config)
    model, train = config.model, config.train
    detector = located(model._target_)
    if isinstance(detector, type) and issubclass(detector, DistillMetaArch):
        model._target_ = detector.__mro__[detector.__mro__.index(DistillMetaArch) + 1]
    _drop(model, arguments(DistillMetaArch, DistillMetaArch))
    _drop(train, TRAIN_DEFAULTS.keys() - {"seed"})
    _drop(train.amp, ["dtype"])
    train.init_checkpoint, train.output_dir = weights, DEFAULT_OUTPUT
    return config


def _drop(node: DictConfig, keys: Iterable[str]) -> None:
    for key in keys:
        node.pop(key, None)


def _foreign_targets(config: DictConfig) -> List[str]:
    """Names of the classes and functions of d2kd that a LazyConfig calls."""
    found = [located(target) for target in _targets(resolved(config))]
    return [x.__qualname__ for x in found if str(getattr(x, "__module__", "")).split(".")[0] == "d2kd"]


def _targets(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from (x for key, x in value.items() if key == "_target_")
        value = list(value.values())
    for child in value if isinstance(value, list) else ():
        yield from _targets(child)
