"""The two config styles. Each makes a :class:`Recipe` of its configs; everything else is the same for both."""

import argparse
import tempfile
from pathlib import Path
from typing import Optional, Sequence

from detectron2.config import CfgNode

from ...data.own import OwnData, prepare_own_data
from ...errors import D2kdError
from ..recipe import Config, Recipe
from .lazy_style import LazyRecipe, load_lazy
from .yaml_style import YamlRecipe, load_yaml


def is_lazy(config_file: str) -> bool:
    """Whether a config file is a LazyConfig."""
    return config_file.endswith(".py")


def load_recipe(args: argparse.Namespace) -> Recipe:
    """Loads the config that ``--config-file`` names, with own data and with its overrides.

    Args:
        args: of the command line. Own data are registered; ``args.data`` keeps them, so that processes which get these
            arguments need not read them again.

    Raises:
        D2kdError: there is no such config, or it is not valid, or own data cannot be read.
    """
    load = load_lazy if is_lazy(args.config_file) else load_yaml
    recipe = load(args.config_file, args.opts, args.eval_only)
    args.data = args.data or _own_data(args, recipe)
    if args.data is None:
        return recipe
    args.data.register()
    return load(args.config_file, args.opts, args.eval_only, args.data)


def load_for_evaluation(config_file: str, opts: Sequence[str] = (), data: Optional[OwnData] = None) -> Recipe:
    """Loads a config without its teacher.

    Args:
        config_file: of either style.
        opts: overrides in its style.
        data: own data, registered.

    Raises:
        D2kdError: there is no such config, or it is not valid.
    """
    return (load_lazy if is_lazy(config_file) else load_yaml)(config_file, opts, True, data)


def _own_data(args: argparse.Namespace, recipe: Recipe) -> Optional[OwnData]:
    """Reads --train-data and --val-data; files that have to be written go into the run's folder."""
    if not (args.train_data or args.val_data or args.val_split):
        return None
    if not (args.train_data or args.eval_only):
        raise D2kdError("--val-data without --train-data is for --eval-only; name the images to train on as well")
    folder = tempfile.mkdtemp(prefix="d2kd_data_") if args.dry_run else recipe.options.output_dir
    return prepare_own_data(args.train_data, args.val_data, args.val_split, Path(folder, "data"))


def to_recipe(config: Config) -> Recipe:
    """The recipe of a config of either style."""
    return YamlRecipe(config) if isinstance(config, CfgNode) else LazyRecipe(config)


__all__ = ["LazyRecipe", "YamlRecipe", "is_lazy", "load_for_evaluation", "load_recipe", "to_recipe"]
