"""Whether the nodes of a LazyConfig can be called with the arguments that they have, before any of them is."""

import inspect
import re
from typing import Any, Dict, Iterator, Mapping, Tuple

from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf, SCMode
from omegaconf.errors import OmegaConfBaseException

from .errors import D2kdError, nearest
from .ranges import NORMS
from .signatures import ANY, arguments, fits, is_object, takes_any

# Nodes that hold settings, those that must be objects, and those of them that may be switched off.
SETTINGS = ("train", "train.amp", "train.checkpointer", "train.ddp", "dataloader")
OBJECTS = ("model", "optimizer", "lr_multiplier", "dataloader.train")
MAY_BE_NULL = ("dataloader.test", "dataloader.evaluator")
# Arguments of detectron2's that must be objects though it does not annotate them so.
PARTS = (
    *("anchor_generator", "anchor_matcher", "box2box_transform", "bottom_up", "collate_fn", "dataset", "mapper"),
    *("params", "sampler", "scheduler", "stem", "top_block"),
)
# What the model of a student has and a plain detector does not.
OF_STUDENTS = ("teacher", "methods", "inherit")
# Arguments that are known only when a run builds the object.
FILLED_IN = ("optimizer.params.model",)


def resolved(config: DictConfig, mode: SCMode = SCMode.DICT) -> Dict[str, Any]:
    """A config as plain containers, its interpolations replaced by what they stand for.

    Args:
        config: the config.
        mode: whether dataclasses such as ``ShapeSpec`` become dicts or objects.

    Raises:
        D2kdError: an interpolation names nothing, or a value is missing.
    """
    try:
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True, structured_config_mode=mode)
    except OmegaConfBaseException as error:
        reason = re.sub(r"^\w+ (raised )?while resolving interpolation: ", "", str(error).split("\n", maxsplit=1)[0])
        raise D2kdError(f"{error.full_key} of the config cannot be resolved: {reason}") from error


def check_nodes(config: DictConfig, prefix: str = "") -> None:
    """Checks all nodes of a LazyConfig by the signatures of what they call.

    Args:
        config: the config.
        prefix: what to say before the message, such as whose config it is.

    Raises:
        D2kdError: a node calls nothing known, an argument is unknown, missing or of another type than it is annotated
            with or its default has, or a part that must be an object is none.
    """
    values = resolved(config, SCMode.INSTANTIATE)
    found = dict(_nodes(values))
    for key, value in found.items():
        message = _kind_fault(key, value) or (_call_fault(key, value) if _is_call(value) else "")
        if message:
            raise D2kdError(prefix + message)


def _nodes(value: Any, key: str = "") -> Iterator[Tuple[str, Any]]:
    """All values by dotted key, the containers too."""
    if key:
        yield key, value
    children = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for name, child in children:
        yield from _nodes(child, f"{key}.{name}" if key else str(name))


def _is_call(value: Any) -> bool:
    return isinstance(value, Mapping) and "_target_" in value


def _kind_fault(key: str, value: Any) -> str:
    """What is wrong with a value that stands where a node must; "" if nothing is."""
    if key in SETTINGS and not isinstance(value, Mapping):
        return f"{key} is {value!r}; it must be a node of settings"
    if key in (*OBJECTS, *MAY_BE_NULL) and not is_object(value) and not (key in MAY_BE_NULL and value is None):
        return f"{key} is {value!r}; it must be an object, LazyCall(...)(...)"
    return ""


def _call_fault(key: str, node: Mapping[str, Any]) -> str:
    """What is wrong with a node of an object; "" if it can be called."""
    maker = located(node["_target_"])
    if not callable(maker):
        return f"{key}._target_ is {node['_target_']!r}, which is no class or function that can be imported"
    known, name = arguments(maker), getattr(maker, "__name__", str(maker))
    given = [argument for argument in node if argument != "_target_"]
    unknown = [argument for argument in given if argument not in known]
    if key == "model" and unknown and unknown[0] in OF_STUDENTS:
        return (
            f"model._target_ {name} is a plain detector and takes no {unknown[0]!r}: set it to "
            f"d2kd.meta_arch.Distill{name}, or delete model.{', model.'.join(OF_STUDENTS)} to train without a teacher"
        )
    if unknown and not takes_any(maker):
        return f"{key} has no {unknown[0]!r}, {name} takes {', '.join(known)}{nearest(str(unknown[0]), known)}"
    for argument, parameter in known.items():
        full = f"{key}.{argument}"
        if argument not in node and parameter.default is ANY and full not in FILLED_IN:
            return f"{full} is missing, and {name} needs it"
        if argument in node and not _is_valid(node[argument], parameter):
            return f"{full} is {node[argument]!r}; {name} takes {_words(parameter)} there"
    return ""


def located(target: Any) -> Any:
    """The class or function that a ``_target_`` names; None if there is none."""
    if not isinstance(target, str):
        return target
    try:
        return locate(target)
    except (ImportError, ValueError):
        return None


def _is_valid(value: Any, parameter: inspect.Parameter) -> bool:
    default = parameter.default
    if value is None and default is None:
        return True
    if parameter.name in PARTS:
        return is_object(value)
    if parameter.name == "norm" and isinstance(value, str):
        return value in NORMS
    wanted = _type_of(parameter)
    return fits(value, wanted) and (wanted is not ANY or is_object(value) or not isinstance(value, Mapping))


def _type_of(parameter: inspect.Parameter) -> Any:
    """The annotation of an argument, or the type of its default if that is a plain value."""
    if parameter.annotation is not ANY:
        return parameter.annotation
    return ANY if parameter.default is None or is_object(parameter.default) else type(parameter.default)


def _words(parameter: inspect.Parameter) -> str:
    if parameter.name in PARTS:
        return "an object"
    if parameter.name == "norm":
        return f"a function or one of {', '.join(map(repr, NORMS))}"
    if _type_of(parameter) is ANY:
        return "a plain value or an object"
    return inspect.formatannotation(_type_of(parameter)).replace("typing.", "")
