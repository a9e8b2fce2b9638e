"""Overrides of LazyConfigs, ``path.key=value``."""

from typing import Any, List

from detectron2.config import LazyConfig
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .errors import D2kdError, nearest
from .nodes import located, resolved
from .signatures import arguments

try:
    from hydra.errors import HydraException
except ImportError:  # detectron2 can do without

    class HydraException(Exception):  # type: ignore[no-redef]
        """Stands for hydra's."""


MISSING = object()
#: What hydra and OmegaConf raise for text that is no override, or that does not fit the config.
NOT_APPLICABLE = (HydraException, OmegaConfBaseException, NotImplementedError, KeyError, ValueError, SyntaxError)


def apply_override(config: DictConfig, override: str) -> DictConfig:
    """Applies an override to a config.

    Returns:
        The config.

    Raises:
        D2kdError: it cannot be read, or names an unknown key.
    """
    key = _key_of(override)
    try:
        check_override(config, override)
        before = OmegaConf.select(config, key, default=MISSING)
        keys = known_keys(before)
        config = LazyConfig.apply_overrides(config, [override])
        after = OmegaConf.select(config, key)
        resolved(config)
    except D2kdError:
        raise
    except NOT_APPLICABLE as error:
        reason = str(error.args[0] if error.args else error).strip().split("\n")[0].rstrip(".")
        raise D2kdError(f"override {override!r} cannot be applied: {reason}") from error
    unknown = [name for name in after if name not in keys] if isinstance(after, DictConfig) else []
    if unknown and isinstance(before, DictConfig):
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
    maker = located(node.get("_target_"))
    return [str(key) for key in node] + (list(arguments(maker)) if callable(maker) else [])


def _key_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")
