"""What a run is made of, whichever config style describes it."""

import dataclasses
import inspect
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Dict, Iterable, List, Optional, Sequence, Tuple, Union

import torch
from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from ..errors import D2kdError
from ..keys import LAZY
from ..signatures import fits

Config = Union[CfgNode, DictConfig]


def option(key: str, **default: Any) -> Any:
    """A field of :class:`RunOptions`: the YAML key that sets it, and what holds where a config has no such key."""
    return field(metadata={"key": key}, **default)


@dataclass(frozen=True)
class RunOptions:
    """How a run trains, evaluates and saves, by the keys that set it.

    Attributes:
        output_dir: folder of the run.
        weights: checkpoint to start from, "" for none.
        device: "cuda" or "cpu".
        seed: negative for any.
        max_iter: iterations.
        eval_period: iterations between evaluations; 0 evaluates at the end.
        log_period: iterations between lines of the log.
        checkpoint_period: iterations between checkpoints.
        max_to_keep: how many of these stay; None for all.
        accumulate: micro-batches of a step.
        ema_decay: of the average of weights, 0 for none.
        amp: whether to train in mixed precision.
        amp_dtype: "float16" or "bfloat16".
        preflight: on how many images the teacher is checked.
        precise_bn: whether statistics of BatchNorm are measured anew before each evaluation.
        precise_bn_iterations: on how many batches.
    """

    output_dir: str = option("OUTPUT_DIR")
    weights: str = option("MODEL.WEIGHTS")
    device: str = option("MODEL.DEVICE")
    seed: int = option("SEED")
    max_iter: int = option("SOLVER.MAX_ITER")
    eval_period: int = option("TEST.EVAL_PERIOD")
    checkpoint_period: int = option("SOLVER.CHECKPOINT_PERIOD")
    accumulate: int = option("SOLVER.ACCUMULATE")
    ema_decay: float = option("SOLVER.EMA_DECAY")
    amp: bool = option("SOLVER.AMP.ENABLED")
    amp_dtype: str = option("SOLVER.AMP.DTYPE")
    preflight: int = option("MODEL.DISTILL.PREFLIGHT")
    log_period: int = option("train.log_period", default=20)
    precise_bn: bool = option("TEST.PRECISE_BN.ENABLED", default=False)
    precise_bn_iterations: int = option("TEST.PRECISE_BN.NUM_ITER", default=0)
    max_to_keep: Optional[int] = option("train.checkpointer.max_to_keep", default=None)


class Recipe(ABC):
    """A run: the makers of its parts, its options, and what the user calls them. Each config style has its own.

    Args:
        config: the user's config, as the methods of a :class:`Trainer` get it.
    """

    #: Whether the config is a LazyConfig, and so which keys the user knows.
    is_lazy: ClassVar[bool]
    #: Patterns of keys that a resumed run may change, since they change no iteration.
    may_change: ClassVar[Sequence[str]]

    def __init__(self, config: Config) -> None:
        self.config = config

    @cached_property
    def values(self) -> Dict[str, Any]:
        """Every value of the config by dotted key; see :func:`flatten`."""
        return flatten(self._nested())

    @cached_property
    def options(self) -> RunOptions:
        """How the run trains, evaluates and saves.

        Raises:
            D2kdError: an option is missing, or not of its type.
        """
        found = {}
        for x in dataclasses.fields(RunOptions):
            found[x.name] = value = self.get(x.metadata["key"], x.default)
            if value is dataclasses.MISSING:
                raise D2kdError(f"the config has no {self.key(x.metadata['key'])}; set it")
            if not fits(value, x.type):
                kind = inspect.formatannotation(x.type).replace("typing.", "")
                raise D2kdError(f"{self.key(x.metadata['key'])} is {value!r}; it must be of the type {kind}")
        return RunOptions(**found)

    def get(self, name: str, default: Any = None) -> Any:
        """Value of a setting.

        Args:
            name: its YAML key, or the LazyConfig key of what YAML does not have.
            default: for a config without it.
        """
        return self.values.get(self.key(name), default)

    def key(self, name: str) -> str:
        """The user's name of a setting; see :data:`d2kd.keys.LAZY`."""
        return LAZY.get(name, name) if self.is_lazy else name

    def with_seed(self, otherwise: int = -1) -> "Recipe":
        """The recipe with a seed that is not negative: its own, or ``otherwise``, or a random one for all processes."""
        if self.options.seed >= 0:
            return self
        return self.changed("SEED", otherwise if otherwise >= 0 else comm.shared_random_seed())

    def for_workers(self, num_workers: int) -> "Recipe":
        """The recipe as a number of processes runs it; see :meth:`DefaultTrainer.auto_scale_workers`."""
        return self

    @abstractmethod
    def changed(self, name: str, value: Any) -> "Recipe":
        """A copy in which the setting of a YAML key has another value."""

    @abstractmethod
    def _nested(self) -> Mapping: ...

    @property
    @abstractmethod
    def train_sets(self) -> Sequence[str]:
        """Names of the data sets to train on."""

    @property
    @abstractmethod
    def test_sets(self) -> Sequence[str]:
        """Names of the data sets to evaluate on."""

    @property
    @abstractmethod
    def num_classes(self) -> Optional[Tuple[str, int]]:
        """The key that sets the model's number of classes, and its value; None where they are unknown."""

    @property
    def teacher(self) -> str:
        """The teacher's weights; "" without a teacher."""
        wanted = self.get("MODEL.DISTILL.METHODS") or self.get("MODEL.DISTILL.INHERIT")
        return (self.get("MODEL.DISTILL.TEACHER.WEIGHTS") or "") if wanted else ""

    @property
    def ddp_options(self) -> Dict[str, Any]:
        """Options of DistributedDataParallel."""
        return {"broadcast_buffers": False}

    @abstractmethod
    def rates(self) -> List[Tuple[float, int]]:
        """Learning rate and images per batch, from the first config that sets them to the last override."""

    @abstractmethod
    def build_model(self) -> nn.Module:
        """Makes the model, on its device."""

    @abstractmethod
    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Makes the optimizer of a model."""

    @abstractmethod
    def build_lr_scheduler(self, optimizer: torch.optim.Optimizer) -> LRScheduler:
        """Makes the learning-rate schedule of an optimizer."""

    @abstractmethod
    def build_train_loader(self) -> Iterable[Any]:
        """Makes the loader of training batches, without end."""

    @abstractmethod
    def build_test_loader(self, name: str) -> Iterable[Any]:
        """Makes the loader of a data set for evaluation."""

    @abstractmethod
    def build_evaluator(self, name: str) -> DatasetEvaluator:
        """Makes the evaluator of a data set; it writes below the run's folder."""

    def evaluation_folder(self, name: str) -> str:
        """Where the evaluation of a data set writes."""
        return os.path.join(self.options.output_dir, "inference", name)


def flatten(node: Any, prefix: str = "") -> Dict[str, Any]:
    """Every value of nested mappings by dotted key, as JSON gives it back; lists are values."""
    if not isinstance(node, Mapping):
        return {prefix: json.loads(json.dumps(node, default=_name))}
    prefix = f"{prefix}." if prefix else ""
    return {key: value for child in node for key, value in flatten(node[child], f"{prefix}{child}").items()}


def _name(value: Any) -> str:
    """For what JSON has no form for: classes and functions by their full names."""
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))
