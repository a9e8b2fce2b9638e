"""One run from a LazyConfig."""

import argparse
from functools import partial
from typing import Any, Dict, List, Tuple

from detectron2.config import LazyConfig, instantiate
from detectron2.data import build_detection_train_loader
from detectron2.engine import SimpleTrainer, default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from ..checkpoint import load_strict
from ..checkpoint.run_checkpoints import RunCheckpointer
from ..config import AMP_DTYPE, PREFLIGHT_IMAGES, drop_teacher, find_config
from ..data.bad_images import EvaluationMapper
from ..data.loader import build_train_loader
from ..data.randomness import seeded
from ..diagnose.preflight import check_teacher
from ..errors import D2kdError, nearest
from ..signatures import arguments
from .checks import check_datasets, check_learning_rate, check_weights_file, tell_datasets, usable_device
from .hooks import EMA, FiniteLosses, run_hooks
from .precision import amp_trainer
from .run_folder import RunFolder, flatten
from .trainer import wrap_ddp

# What d2kd reads beside detectron2's own keys of ``train``.
TRAIN_DEFAULTS = {"seed": -1, "ema_decay": 0.0, "preflight": PREFLIGHT_IMAGES, "skip_bad_images": False}
# What a resumed run may change; see the list of yaml_run.
MAY_CHANGE = (
    *("train.output_dir", "train.device", "train.eval_period", "train.log_period", "train.checkpointer.*"),
    *("train.ddp.*", "train.preflight", "dataloader.train.num_workers", "dataloader.test.*", "dataloader.evaluator.*"),
    *("model.teacher.weights", "model.test_*", "model.max_detections_per_image", "train.skip_bad_images"),
)


def prepare(args: argparse.Namespace) -> DictConfig:
    """Loads and checks the config of a run.

    Raises:
        D2kdError: something is wrong that can be seen before any training.
    """
    cfg = LazyConfig.load(find_config(args.config_file))
    if "train" in cfg:
        cfg.train = {**TRAIN_DEFAULTS, **cfg.train}
        cfg.train.amp = {"enabled": False, "dtype": AMP_DTYPE, **cfg.train.get("amp", {})}
    for override in args.opts:
        check_override(cfg, override)
    cfg = LazyConfig.apply_overrides(cfg, args.opts)
    for part in ("model", "train", "dataloader", "optimizer", "lr_multiplier"):
        if part not in cfg:
            raise D2kdError(f"{args.config_file} defines no {part}; see configs/lazy/retinanet_R50.py")
    cfg.train.device = usable_device(cfg.train.device)
    if args.eval_only:
        drop_teacher(cfg)
    else:
        check_weights_file(cfg.train.init_checkpoint, "train.init_checkpoint")
    evaluated = names_in(cfg.dataloader.test)
    check_datasets(dataset_names(args, cfg), cfg.model.num_classes, "model.num_classes", evaluated)
    return cfg


def dataset_names(args: argparse.Namespace, cfg: DictConfig) -> List[str]:
    """The data sets that a run reads."""
    return [*([] if args.eval_only else names_in(cfg.dataloader.train)), *names_in(cfg.dataloader.test)]


def names_in(loader: DictConfig) -> List[str]:
    """The data sets of a loader."""
    names = loader.dataset.names
    return [names] if isinstance(names, str) else list(names)


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
    return [str(key) for key in node] + (list(arguments(target)) if target else [])


def run_folder(cfg: DictConfig) -> RunFolder:
    """Where the run lies, and what has to stay when it is resumed."""
    return RunFolder(
        path=cfg.train.output_dir,
        path_key="train.output_dir",
        config=flatten(OmegaConf.to_container(cfg, resolve=True)),
        seed_key="train.seed",
        teacher=OmegaConf.select(cfg, "model.teacher.weights") or "",
        may_change=MAY_CHANGE,
        same_keys=True,
    )


def set_seed(cfg: DictConfig, seed: int) -> None:
    """Sets the seed of the run, in place."""
    cfg.train.seed = seed


def model_and_batch(cfg: DictConfig) -> Tuple[nn.Module, List[Dict[str, Any]]]:
    """The model as training starts with it, and one batch of the training set."""
    set_seed(cfg, max(cfg.train.seed, 0))
    model = instantiate(cfg.model).to(cfg.train.device)
    RunCheckpointer(model, save_to_disk=False).load(cfg.train.init_checkpoint)
    return model.train(), next(iter(train_loader(cfg)))


def run(args: argparse.Namespace, cfg: DictConfig) -> Dict[str, Any]:
    """Trains, or evaluates with ``--eval-only``; returns the evaluation's results."""
    tell_datasets(dataset_names(args, cfg))
    model = instantiate(cfg.model).to(cfg.train.device)
    if args.eval_only:
        saved = RunCheckpointer(model, cfg.train.output_dir).newest_readable() if args.resume else ""
        weights = saved or cfg.train.init_checkpoint
        if not weights:
            raise D2kdError("--eval-only needs weights: append train.init_checkpoint=<file>, or use --resume")
        load_strict(model, weights)
        return test(cfg, model)
    return train(args, cfg, model)


def test(cfg: DictConfig, model: nn.Module) -> Dict[str, Any]:
    """Evaluates a model on the config's test set."""
    results = inference_on_dataset(model, test_loader(cfg), instantiate(cfg.dataloader.evaluator))
    if comm.is_main_process():
        print_csv_format(results)
    return results


def train(args: argparse.Namespace, cfg: DictConfig, model: nn.Module) -> Dict[str, Any]:
    """Trains as ``cfg.train`` says."""
    original = LazyConfig.load(find_config(args.config_file))
    check_learning_rate([rate_and_batch(original), rate_and_batch(cfg)], "optimizer.lr")
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    model = wrap_ddp(model, **cfg.train.ddp)
    make_trainer = partial(amp_trainer, dtype=cfg.train.amp.dtype) if cfg.train.amp.enabled else SimpleTrainer
    trainer = make_trainer(model, train_loader(cfg), optimizer)
    checkpointer = RunCheckpointer(model, cfg.train.output_dir, trainer=trainer)
    decay = cfg.train.ema_decay
    ema = EMA(checkpointer.model, decay, cfg.train.output_dir) if decay else None
    results: Dict[str, Any] = {}

    def evaluate() -> Dict[str, Any]:
        results.update(test(cfg, model))
        return {**results, "ema": test(cfg, ema.average)} if ema else results

    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            *run_hooks(checkpointer, trainer.data_loader, cfg.train.seed, ema, **cfg.train.checkpointer),
            hooks.EvalHook(cfg.train.eval_period, evaluate),
            hooks.PeriodicWriter(default_writers(cfg.train.output_dir, cfg.train.max_iter), cfg.train.log_period)
            if comm.is_main_process()
            else None,
        ]
    )
    losses = FiniteLosses(trainer)
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
    start = trainer.iter + 1 if args.resume and checkpointer.has_checkpoint() else 0
    check_teacher(checkpointer.model, trainer.data_loader, cfg.train.preflight if start == 0 else 0)
    with run_folder(cfg).telling(losses.iteration):
        trainer.train(start, cfg.train.max_iter)
    return results


def rate_and_batch(cfg: DictConfig) -> Tuple[float, int]:
    """Learning rate and images per batch."""
    return cfg.optimizer.lr, cfg.dataloader.train.total_batch_size


def test_loader(cfg: DictConfig) -> Any:
    """Builds the config's test loader; its mapper names images that cannot be read."""
    node = cfg.dataloader.test
    own = {"mapper": EvaluationMapper(instantiate(node.mapper))} if "mapper" in node else {}
    return instantiate({**node, **own})


def train_loader(cfg: DictConfig) -> Any:
    """Builds the config's training loader: d2kd's resumable one in the place of detectron2's own."""
    node = cfg.dataloader.train
    target = node._target_
    if (locate(target) if isinstance(target, str) else target) is build_detection_train_loader:
        node._target_, node.seed = build_train_loader, cfg.train.seed
        node.skip_bad_images = cfg.train.skip_bad_images
    with seeded(cfg.train.seed):  # samplers draw their own seeds
        return instantiate(node)
