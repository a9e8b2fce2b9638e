"""LazyConfigs."""

import ast
import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import build_detection_train_loader
from detectron2.evaluation import DatasetEvaluator
from detectron2.solver import LRMultiplier
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from ...config import AMP_DTYPE, PREFLIGHT_IMAGES, drop_teacher, find_config, read_lazy
from ...data.bad_images import EvaluationMapper
from ...data.evaluators import build_evaluator
from ...data.loader import build_train_loader
from ...data.own import OwnData
from ...data.randomness import seeded
from ...errors import D2kdError
from ...nodes import check_nodes, located, resolved
from ...overrides import apply_override
from ...signatures import arguments
from ...teacher import teacher_opts
from ...wiring import check_wiring
from ..devices import usable_device
from ..recipe import Recipe

# What d2kd reads beside detectron2's own keys of ``train``.
TRAIN_DEFAULTS = {
    **{"seed": -1, "accumulate": 1, "ema_decay": 0.0},
    **{"preflight": PREFLIGHT_IMAGES, "skip_bad_images": False},
}
PARTS = ("model", "train", "dataloader", "optimizer", "lr_multiplier")
# What a data set is called whose names the config does not tell.
UNNAMED = "test"


class LazyRecipe(Recipe):
    """The recipe of a LazyConfig, which has what detectron2's tools/lazyconfig_train_net.py reads.

    Args:
        config: the config; d2kd's defaults are added to a copy.
        config_file: where it comes from, for :meth:`rates`; "" if it was made in Python.
    """

    is_lazy = True
    may_change = (
        *("train.output_dir", "train.device", "train.eval_period", "train.log_period", "train.checkpointer.*"),
        *("train.ddp.*", "train.preflight", "dataloader.train.num_workers", "dataloader.test.*"),
        *("dataloader.evaluator.*", "model.teacher.weights", "model.test_*", "model.max_detections_per_image"),
        "train.skip_bad_images",
        "train.accumulate",  # micro-batches are as good as processes, whose number may change too
    )

    def __init__(self, config: DictConfig, config_file: str = "") -> None:
        super().__init__(with_defaults(config))
        self._config_file = config_file

    def _nested(self) -> Mapping:
        return resolved(self.config)

    def changed(self, name: str, value: Any) -> "LazyRecipe":
        config = copy.deepcopy(self.config)
        OmegaConf.update(config, self.key(name), value)
        return LazyRecipe(config, self._config_file)

    @property
    def train_sets(self) -> Sequence[str]:
        return names_in(self.config.dataloader.train)

    @property
    def test_sets(self) -> Sequence[str]:
        loader = self.config.dataloader.get("test")
        return (names_in(loader) or [UNNAMED]) if loader else []

    @property
    def num_classes(self) -> Optional[Tuple[str, int]]:
        number = OmegaConf.select(self.config, "model.num_classes")
        return None if number is None else ("model.num_classes", number)

    @property
    def ddp_options(self) -> Dict[str, Any]:
        return {**super().ddp_options, **self.config.train.get("ddp", {})}

    def rates(self) -> List[Tuple[float, int]]:
        in_files = list(rates_in(Path(self._config_file))) if self._config_file else []
        return [*in_files, *_rate(self.config)]

    def build_model(self) -> nn.Module:
        model = instantiate(self.config.model)
        check_wiring(model)
        return model.to(self.config.train.device)

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        node = copy.deepcopy(self.config).optimizer
        node.params.model = model
        return instantiate(node)

    def build_lr_scheduler(self, optimizer: torch.optim.Optimizer) -> LRScheduler:
        return LRMultiplier(optimizer, instantiate(self.config.lr_multiplier), self.options.max_iter)

    def build_train_loader(self) -> Iterable[Any]:
        """Makes the config's loader: d2kd's resumable one in place of detectron2's own."""
        node = copy.deepcopy(self.config).dataloader.train
        if located(node._target_) is build_detection_train_loader:
            node._target_, node.seed = build_train_loader, self.config.train.seed
            node.skip_bad_images = self.config.train.skip_bad_images
            node.accumulate = self.config.train.accumulate
        with seeded(self.options.seed):  # samplers draw their own seeds
            return instantiate(node)

    def build_test_loader(self, name: str) -> Iterable[Any]:
        """Makes the config's loader of one data set; its mapper names images that cannot be read."""
        node = self._evaluating(name).test
        own = {"mapper": EvaluationMapper(instantiate(node.mapper))} if "mapper" in node else {}
        return instantiate({**node, **own})

    def build_evaluator(self, name: str) -> DatasetEvaluator:
        """Makes the config's evaluator, or the one that fits the data set; predictions go into the run's folder."""
        node = self._evaluating(name).get("evaluator")
        if node is None:
            return build_evaluator(name, self.evaluation_folder(name))
        if node.get("output_dir") is None and "output_dir" in arguments(located(node._target_)):
            node.output_dir = self.evaluation_folder(name)
        return instantiate(node)

    def _evaluating(self, name: str) -> DictConfig:
        """The config's data loaders, of one data set."""
        loaders = copy.deepcopy(self.config).dataloader
        if name != UNNAMED:
            loaders.test.dataset.names = name
        return loaders


def load_lazy(config_file: str, opts: Sequence[str], eval_only: bool, data: Optional[OwnData] = None) -> LazyRecipe:
    """Loads a config with overrides ``path.key=value``; without its teacher to evaluate only.

    Args:
        config_file: path of the config.
        opts: the overrides.
        eval_only: whether the teacher is dropped.
        data: own data, which the overrides come after.
    """
    path = find_config(config_file)
    config = with_defaults(read_lazy(path))
    if data:
        _set_data(config, data)
    for override in opts:
        config = apply_override(config, override)
    missing = [part for part in PARTS if part not in config]
    if missing:
        raise D2kdError(f"{config_file} defines no {', '.join(missing)}; see configs/lazy/retinanet_R50.py")
    check_nodes(config)
    recipe = LazyRecipe(config, path)
    config.train.device = usable_device(recipe.options.device)
    if eval_only:
        drop_teacher(config)
    elif data:
        _set_teacher_classes(config.model, len(data.classes))
    return LazyRecipe(config, path)


def _set_data(config: DictConfig, data: OwnData) -> None:
    """Sets a config's data sets and number of classes for own data."""
    train, val = data.names
    loaders = config.get("dataloader", {})
    if train and OmegaConf.select(loaders, "train.dataset") is not None:
        loaders.train.dataset.names = train
    if val and OmegaConf.select(loaders, "test.dataset") is not None:
        loaders.test.dataset.names = val
    elif not val:
        loaders.test = loaders.evaluator = None  # the evaluator's names are the loader's
    if OmegaConf.select(config, "model.num_classes") is not None:
        config.model.num_classes = len(data.classes)


def _set_teacher_classes(model: DictConfig, num_classes: int) -> None:
    """Gives the teacher the student's number of classes, unless a map says which of its own are the same."""
    teacher = model.get("teacher")
    if isinstance(teacher, DictConfig) and "config_file" in teacher and not model.get("class_map"):
        teacher.opts = teacher_opts(teacher.config_file, teacher.get("opts") or [], num_classes)


def with_defaults(config: DictConfig) -> DictConfig:
    """A copy that has what d2kd reads beside detectron2's own keys."""
    config = copy.deepcopy(config)
    if isinstance(config.get("train"), DictConfig):
        config.train = {**TRAIN_DEFAULTS, **config.train}
        if isinstance(config.train.get("amp", {}), Mapping):
            config.train.amp = {"enabled": False, "dtype": AMP_DTYPE, **config.train.get("amp", {})}
    return config


def names_in(loader: DictConfig) -> List[str]:
    """Names of the data sets of a loader; empty where it does not name them."""
    dataset = loader.get("dataset")
    names = dataset.get("names") if isinstance(dataset, DictConfig) else None
    return [names] if isinstance(names, str) else list(names or [])


def rates_in(path: Path) -> Iterator[Tuple[float, int]]:
    """Yields learning rate and images per batch of a config file, after those of the files that it builds on."""
    imports = (x for x in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(x, ast.ImportFrom) and x.level)
    for node in imports:
        base = path.parents[node.level - 1] / f"{(node.module or '').replace('.', '/')}.py"
        if base.is_file() and {"optimizer", "dataloader"} & {x.name for x in node.names}:
            yield from rates_in(base)
    yield from _rate(LazyConfig.load(str(path)))


def _rate(config: DictConfig) -> List[Tuple[float, int]]:
    rate, batch = (OmegaConf.select(config, key) for key in ("optimizer.lr", "dataloader.train.total_batch_size"))
    return [] if rate is None or batch is None else [(rate, batch)]
