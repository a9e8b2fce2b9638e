"""The two config styles. Each makes a :class:`Recipe` of its configs; everything else is the same for both."""

import argparse

from detectron2.config import CfgNode

from ..recipe import Config, Recipe
from .lazy_style import LazyRecipe, load_lazy
from .yaml_style import YamlRecipe, load_yaml


def is_lazy(config_file: str) -> bool:
    """Whether a config file is a LazyConfig."""
    return config_file.endswith(".py")


def load_recipe(args: argparse.Namespace) -> Recipe:
    """Loads the config that ``--config-file`` names, with its overrides.

    Raises:
        D2kdError: there is no such config, or it is not valid.
    """
    load = load_lazy if is_lazy(args.config_file) else load_yaml
    return load(args.config_file, args.opts, args.eval_only)


def to_recipe(config: Config) -> Recipe:
    """The recipe of a config of either style."""
    return YamlRecipe(config) if isinstance(config, CfgNode) else LazyRecipe(config)


__all__ = ["LazyRecipe", "YamlRecipe", "is_lazy", "load_recipe", "to_recipe"]
