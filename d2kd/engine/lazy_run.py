"""One run from a LazyConfig."""

import argparse
import inspect
from typing import Any, Dict, List

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import AMPTrainer, SimpleTrainer, default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from ..checkpoint import load_strict
from ..config import find_config
from ..errors import D2kdError, nearest
from .checks import check_datasets, check_weights_file, usable_device
from .trainer import wrap_ddp


def prepare(args: argparse.Namespace) -> DictConfig:
    """Loads and checks the config of a run.

    Raises:
        D2kdError: something is wrong that can be seen before any training.
    """
    cfg = LazyConfig.load(find_config(args.config_file))
    for override in args.opts:
        check_override(cfg, override)
    cfg = LazyConfig.apply_overrides(cfg, args.opts)
    for part in ("model", "train", "dataloader", "optimizer", "lr_multiplier"):
        if part not in cfg:
            raise D2kdError(f"{args.config_file} defines no {part}; see configs/lazy/retinanet_R50.py")
    cfg.train.device = usable_device(cfg.train.device)
    loaders = [cfg.dataloader.test]
    if args.eval_only:
        if "methods" in cfg.model:
            cfg.model.methods, cfg.model.teacher = [], None  # evaluation neither builds nor needs the teacher
    else:
        loaders.append(cfg.dataloader.train)
        check_weights_file(cfg.train.init_checkpoint, "train.init_checkpoint")
    for loader in loaders:
        names = loader.dataset.names
        check_datasets([names] if isinstance(names, str) else names, cfg.model.num_classes, "model.num_classes")
    return cfg


def check_override(cfg: DictConfig, override: str) -> None:
    """Raises D2kdError if ``path.key=value`` names a key that neither exists nor is an argument of its object."""
    key, equals, _ = override.partition("=")
    key = key.lstrip("+~")
    if not equals:
        raise D2kdError(f"override {override!r}: a LazyConfig takes path.key=value")
    parent, _, leaf = key.rpartition(".")
    missing = object()
    if OmegaConf.select(cfg, key, default=missing) is not missing:
        return
    node = OmegaConf.select(cfg, parent) if parent else cfg
    known = known_keys(node)
    if leaf not in known:
        raise D2kdError(f"override {override!r}: {parent or 'the config'} has no {leaf!r}{nearest(leaf, known)}")


def known_keys(node: Any) -> List[str]:
    """Keys of a config node, with all arguments of the object that it makes."""
    if isinstance(node, ListConfig):
        return [str(i) for i in range(len(node))]
    if not isinstance(node, DictConfig):
        return []
    target = node.get("_target_")
    target = locate(target) if isinstance(target, str) else target
    return [str(key) for key in node] + (list(inspect.signature(target).parameters) if target else [])


def run(args: argparse.Namespace, cfg: DictConfig) -> Dict[str, Any]:
    """Trains, or evaluates with ``--eval-only``; returns the evaluation's results."""
    model = instantiate(cfg.model).to(cfg.train.device)
    if args.eval_only:
        saved = DetectionCheckpointer(model, cfg.train.output_dir)
        weights = saved.get_checkpoint_file() if args.resume and saved.has_checkpoint() else cfg.train.init_checkpoint
        if not weights:
            raise D2kdError("--eval-only needs weights: append train.init_checkpoint=<file>, or use --resume")
        load_strict(model, weights)
        return test(cfg, model)
    return train(args, cfg, model)


def test(cfg: DictConfig, model: nn.Module) -> Dict[str, Any]:
    """Evaluates a model on the config's test set."""
    results = inference_on_dataset(model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator))
    if comm.is_main_process():
        print_csv_format(results)
    return results


def train(args: argparse.Namespace, cfg: DictConfig, model: nn.Module) -> Dict[str, Any]:
    """Trains as ``cfg.train`` says."""
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    model = wrap_ddp(model, **cfg.train.ddp)
    trainer_class = AMPTrainer if cfg.train.amp.enabled else SimpleTrainer
    trainer = trainer_class(model, instantiate(cfg.dataloader.train), optimizer)
    checkpointer = DetectionCheckpointer(model, cfg.train.output_dir, trainer=trainer)
    results: Dict[str, Any] = {}

    def evaluate() -> Dict[str, Any]:
        results.update(test(cfg, model))
        return results

    on_main = comm.is_main_process()
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer) if on_main else None,
            hooks.EvalHook(cfg.train.eval_period, evaluate),
            hooks.PeriodicWriter(default_writers(cfg.train.output_dir, cfg.train.max_iter), cfg.train.log_period)
            if on_main
            else None,
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
    start = trainer.iter + 1 if args.resume and checkpointer.has_checkpoint() else 0
    trainer.train(start, cfg.train.max_iter)
    return results
