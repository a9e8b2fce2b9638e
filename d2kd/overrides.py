"""Overrides of LazyConfigs, ``path.key=value``."""

from typing import Any, Dict, List, Set

from detectron2.config import LazyConfig
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .errors import D2kdError, nearest
from .signatures import arguments

try:
    from hydra.errors import HydraException
except ImportError:  # detectron2 can do without

    class HydraException(Exception):  # type: ignore[no-redef]
        """Stands for hydra's."""


# Settings that may be switched off, though nothing in a signature says so.
MAY_BE_NULL = ("dataloader.test", "dataloader.evaluator", "model.teacher")
# Names of arguments that take a value or a list of such values.
ONE_OR_MANY = ("names", "short_edge_length")
MISSING = object()

BOOL, INTEGER, NUMBER, TEXT = "true or false", "an integer", "a number", "text"
LIST, NODE, NULL, OBJECT = "a list", "a node", "null", "an object"
# In this order, since True is an int.
KINDS = (
    (bool, BOOL),
    (int, INTEGER),
    (float, NUMBER),
    (str, TEXT),
    ((list, tuple, ListConfig), LIST),
    ((dict, DictConfig), NODE),
    (type(None), NULL),
)
# Sample values of annotations.
OF_TYPE: Dict[Any, Any] = {bool: True, int: 0, float: 0.0, str: ""}


def apply_override(config: DictConfig, override: str) -> DictConfig:
    """Applies an override to a config.

    Returns:
        The config.

    Raises:
        D2kdError: it cannot be read, names an unknown key, or gives a value of another kind than the key has.
    """
    check_override(config, override)
    key = _key_of(override)
    before = OmegaConf.select(config, key, default=MISSING)
    kinds, keys = kinds_of(config, key), set(known_keys(before))
    try:
        config = LazyConfig.apply_overrides(config, [override])
        after = OmegaConf.select(config, key)
        OmegaConf.to_container(config, resolve=True)
    except (HydraException, OmegaConfBaseException, NotImplementedError, KeyError, ValueError, SyntaxError) as error:
        reason = str(error.args[0] if error.args else error).strip().split("\n")[0].rstrip(".")
        raise D2kdError(f"override {override!r} cannot be applied: {reason}") from error
    if not _fits(after, kinds):
        raise D2kdError(f"override {override!r}: {key} must be {' or '.join(sorted(kinds))}")
    if not _elements_fit(before, after):
        raise D2kdError(f"override {override!r}: the elements of {key} must be of the kind that they were")
    unknown = [name for name in after if name not in keys] if isinstance(after, DictConfig) else []
    if unknown and before is not MISSING:
        raise D2kdError(f"override {override!r}: {key} has no {unknown[0]!r}{nearest(str(unknown[0]), keys)}")
    return config


def check_override(config: DictConfig, override: str) -> None:
    """Raises D2kdError if ``path.key=value`` names a key that neither exists nor is an argument of its object."""
    _, equals, _ = override.partition("=")
    if not equals:
        raise D2kdError(f"override {override!r}: a LazyConfig takes path.key=value")
    key = _key_of(override)
    parent, _, leaf = key.rpartition(".")
    if OmegaConf.select(config, key, default=MISSING) is not MISSING:
        return
    known = known_keys(OmegaConf.select(config, parent) if parent else config)
    if leaf not in known:
        raise D2kdError(f"override {override!r}: {parent or 'the config'} has no {leaf!r}{nearest(leaf, known)}")


def known_keys(node: Any) -> List[str]:
    """Keys of a config node, with all arguments of the object that it makes."""
    if isinstance(node, ListConfig):
        return [str(i) for i in range(len(node))]
    if not isinstance(node, DictConfig):
        return []
    return [str(key) for key in node] + (list(arguments(located(node))) if "_target_" in node else [])


def located(node: DictConfig) -> Any:
    """The class or function that a node calls."""
    target = node._target_
    return locate(target) if isinstance(target, str) else target


def kinds_of(config: DictConfig, key: str) -> Set[str]:
    """Kinds of values that a setting may have, in words: those of its argument and of its present value.

    Args:
        config: the config.
        key: of the setting; it may be an argument that the config does not set.

    Returns:
        Empty if it may have any.
    """
    parent, _, leaf = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    known = arguments(located(node)) if isinstance(node, DictConfig) and "_target_" in node else {}
    samples = [OmegaConf.select(config, key, default=None)]
    if leaf in known:
        argument = known[leaf]
        samples = [OF_TYPE[argument.annotation]] if argument.annotation in OF_TYPE else samples
        samples += [argument.default] if argument.default is not argument.empty else []
    kinds = set().union(*(_kinds(sample) for sample in samples if sample is not None))
    if leaf == "_target_" or not kinds or OBJECT in kinds:
        return set()
    kinds |= {LIST, TEXT if leaf == "names" else INTEGER} if leaf in ONE_OR_MANY else set()
    optional = key in MAY_BE_NULL or (leaf in known and known[leaf].default is None)
    return kinds - ({INTEGER} if NUMBER in kinds else set()) | ({NULL} if optional else set())


def _kinds(value: Any) -> Set[str]:
    """The narrowest kind of a value."""
    return {next((kind for types, kind in KINDS if isinstance(value, types)), OBJECT)}


def _elements_fit(before: Any, after: Any) -> bool:
    """Whether the elements of a list are of a kind that they were; numbers may become lists of numbers."""
    if not (isinstance(before, ListConfig) and isinstance(after, ListConfig) and before):
        return True
    kinds = set().union(*(_kinds(value) for value in before))
    if kinds & {INTEGER, NUMBER}:
        kinds |= {NUMBER, LIST}
    return all(_fits(value, kinds) for value in after)


def _fits(value: Any, kinds: Set[str]) -> bool:
    return not kinds or bool(kinds & (_kinds(value) | ({NUMBER} if _kinds(value) == {INTEGER} else set())))


def _key_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")
