"""YAML configs."""

from collections.abc import Mapping
from typing import Any, List, Optional, Sequence, Tuple

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_test_loader
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from ...config import detector_node, load_config, rates_and_batches
from ...data.bad_images import EvaluationMapper
from ...data.evaluators import build_evaluator
from ...data.loader import build_train_loader
from ...data.own import OwnData
from ...data.randomness import seeded
from ...errors import check_choice
from ...teacher import teacher_opts
from ..devices import usable_device
from ..recipe import Recipe

OPTIMIZERS = ("SGD", "AdamW")


class YamlRecipe(Recipe):
    """The recipe of a ``CfgNode`` with d2kd's keys.

    Args:
        config: the config.
        config_file: where it comes from, for :meth:`rates`; "" if it was made in Python.
        opts: the overrides that were applied to that file.
    """

    is_lazy = False
    # How a run is executed, evaluated and saved. The teacher's file may move: its SHA-256 is compared instead.
    may_change = (
        *("OUTPUT_DIR", "VERSION", "VIS_PERIOD", "CUDNN_BENCHMARK", "DATALOADER.NUM_WORKERS"),
        *("SOLVER.CHECKPOINT_PERIOD", "MODEL.DEVICE", "MODEL.DISTILL.TEACHER.WEIGHTS", "MODEL.DISTILL.PREFLIGHT"),
        *("DATASETS.TEST", "TEST.*", "*_TEST"),
        "DATALOADER.SKIP_BAD_IMAGES",  # where it matters, a run without it has ended
        "SOLVER.ACCUMULATE",  # micro-batches are as good as processes, whose number may change too
    )

    def __init__(self, config: CfgNode, config_file: str = "", opts: Sequence[str] = ()) -> None:
        super().__init__(config)
        self._config_file, self._opts = config_file, opts

    def _nested(self) -> Mapping:
        return yaml.safe_load(self.config.dump())

    def changed(self, name: str, value: Any) -> "YamlRecipe":
        config = self.config.clone()
        config.merge_from_list([name, value])
        return YamlRecipe(config, self._config_file, self._opts)

    def for_workers(self, num_workers: int) -> "YamlRecipe":
        return YamlRecipe(DefaultTrainer.auto_scale_workers(self.config, num_workers), self._config_file, self._opts)

    @property
    def train_sets(self) -> Sequence[str]:
        return self.config.DATASETS.TRAIN

    @property
    def test_sets(self) -> Sequence[str]:
        return self.config.DATASETS.TEST

    @property
    def num_classes(self) -> Optional[Tuple[str, int]]:
        node = detector_node(self.config)
        return (f"MODEL.{node}.NUM_CLASSES", self.config.MODEL[node].NUM_CLASSES) if node else None

    def rates(self) -> List[Tuple[float, int]]:
        return list(rates_and_batches(self._config_file, self._opts)) if self._config_file else []

    def build_model(self) -> nn.Module:
        return build_model(self.config)

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Makes ``SOLVER.OPTIMIZER``: detectron2's own SGD, or AdamW with the same treatment of norms and biases."""
        solver = self.config.SOLVER
        check_choice("SOLVER.OPTIMIZER", solver.OPTIMIZER, OPTIMIZERS)
        if solver.OPTIMIZER == "SGD":
            return build_optimizer(self.config, model)
        params = get_default_optimizer_params(
            model,
            base_lr=solver.BASE_LR,
            weight_decay_norm=solver.WEIGHT_DECAY_NORM,
            bias_lr_factor=solver.BIAS_LR_FACTOR,
            weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        )
        adamw = maybe_add_gradient_clipping(self.config, torch.optim.AdamW)
        return adamw(params, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY)

    def build_lr_scheduler(self, optimizer: torch.optim.Optimizer) -> LRScheduler:
        return build_lr_scheduler(self.config, optimizer)

    def build_train_loader(self) -> DataLoader:
        with seeded(self.options.seed):  # samplers draw their own seeds
            return build_train_loader(self.config)

    def build_test_loader(self, name: str) -> DataLoader:
        mapper = EvaluationMapper(DatasetMapper(self.config, is_train=False))
        return build_detection_test_loader(self.config, name, mapper=mapper)

    def build_evaluator(self, name: str) -> DatasetEvaluator:
        return build_evaluator(name, self.evaluation_folder(name))


def load_yaml(config_file: str, opts: Sequence[str], eval_only: bool, data: Optional[OwnData] = None) -> YamlRecipe:
    """Loads a config with overrides ``KEY value``; without its teacher to evaluate only.

    Args:
        config_file: path of the config.
        opts: the overrides.
        eval_only: whether the teacher is dropped.
        data: own data, which the overrides come after.
    """
    config = load_config(config_file, opts, with_teacher=not eval_only)
    if data:
        opts = [*_overrides(config, data), *opts]
        config = load_config(config_file, opts, with_teacher=not eval_only)
        distill = config.MODEL.DISTILL
        if (distill.METHODS or distill.INHERIT) and not distill.CLASS_MAP:
            distill.TEACHER.OPTS = teacher_opts(distill.TEACHER.CONFIG_FILE, distill.TEACHER.OPTS, len(data.classes))
    config.MODEL.DEVICE = usable_device(config.MODEL.DEVICE)
    config.freeze()
    return YamlRecipe(config, config_file, opts)


def _overrides(config: CfgNode, data: OwnData) -> List[str]:
    """A config's data sets and number of classes for own data, as overrides."""
    train, val = map(repr, map(tuple, data.names))
    node = detector_node(config)
    classes = [f"MODEL.{node}.NUM_CLASSES", str(len(data.classes))] if node else []
    return ["DATASETS.TEST", val, *(["DATASETS.TRAIN", train] if data.train else []), *classes]
