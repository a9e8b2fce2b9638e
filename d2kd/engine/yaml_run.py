"""One run from a YAML config."""

import argparse
from typing import Any, Dict, List, Tuple

import yaml
from detectron2.config import CfgNode
from torch import nn

from ..checkpoint import load_strict
from ..checkpoint.run_checkpoints import RunCheckpointer
from ..config import detector_node, load_config, rates_and_batches
from ..diagnose.preflight import check_teacher
from ..errors import D2kdError
from .checks import check_datasets, check_learning_rate, check_values, check_weights_file, tell_datasets, usable_device
from .run_folder import RunFolder, flatten
from .trainer import Trainer

# What a resumed run may change: how it is run, evaluated and saved, but nothing that changes an iteration.
# The teacher's file may have moved: its SHA-256 is compared instead.
MAY_CHANGE = (
    *("OUTPUT_DIR", "VERSION", "VIS_PERIOD", "CUDNN_BENCHMARK", "DATALOADER.NUM_WORKERS", "SOLVER.CHECKPOINT_PERIOD"),
    *("MODEL.DEVICE", "MODEL.DISTILL.TEACHER.WEIGHTS", "MODEL.DISTILL.PREFLIGHT"),
    *("DATASETS.TEST", "TEST.*", "*_TEST"),
    "DATALOADER.SKIP_BAD_IMAGES",  # where it matters, a run without it has ended
)


def prepare(args: argparse.Namespace) -> CfgNode:
    """Loads and checks the config of a run.

    Raises:
        D2kdError: something is wrong that can be seen before any training.
    """
    cfg = load_config(args.config_file, args.opts, with_teacher=not args.eval_only)
    check_values(cfg)
    cfg.MODEL.DEVICE = usable_device(cfg.MODEL.DEVICE)
    if not args.eval_only:
        check_weights_file(cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS")
    node = detector_node(cfg)
    if node is not None:
        key = f"MODEL.{node}.NUM_CLASSES"
        check_datasets(dataset_names(args, cfg), cfg.MODEL[node].NUM_CLASSES, key, evaluated=cfg.DATASETS.TEST)
    cfg.freeze()
    return cfg


def dataset_names(args: argparse.Namespace, cfg: CfgNode) -> Tuple[str, ...]:
    """The data sets that a run reads."""
    return (*(() if args.eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST)


def run_folder(cfg: CfgNode) -> RunFolder:
    """Where the run lies, and what has to stay when it is resumed."""
    distill = cfg.MODEL.DISTILL
    return RunFolder(
        path=cfg.OUTPUT_DIR,
        path_key="OUTPUT_DIR",
        config=flatten(yaml.safe_load(cfg.dump())),
        seed_key="SEED",
        teacher=distill.TEACHER.WEIGHTS if distill.METHODS or distill.INHERIT else "",
        may_change=MAY_CHANGE,
        same_keys=False,  # all configs have all keys, but those of another version of the code
    )


def set_seed(cfg: CfgNode, seed: int) -> None:
    """Sets the seed of the run, in place."""
    cfg.merge_from_list(["SEED", seed])


def model_and_batch(cfg: CfgNode) -> Tuple[nn.Module, List[Dict[str, Any]]]:
    """The model as training starts with it, and one batch of the training set."""
    cfg = cfg.clone()
    set_seed(cfg, max(cfg.SEED, 0))
    model = Trainer.build_model(cfg)
    RunCheckpointer(model, save_to_disk=False).load(cfg.MODEL.WEIGHTS)
    return model.train(), next(iter(Trainer.build_train_loader(cfg)))


def run(args: argparse.Namespace, cfg: CfgNode) -> Dict[str, Any]:
    """Trains, or evaluates with ``--eval-only``; returns the evaluation's results."""
    tell_datasets(dataset_names(args, cfg))
    if args.eval_only:
        return evaluate(args, cfg)
    check_learning_rate(list(rates_and_batches(args.config_file, args.opts)), "SOLVER.BASE_LR")
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    images = cfg.MODEL.DISTILL.PREFLIGHT if trainer.start_iter == 0 else 0
    check_teacher(trainer.checkpointer.model, trainer._trainer.data_loader, images)
    with run_folder(cfg).telling(trainer.losses.iteration):
        return trainer.train() or getattr(trainer, "_last_eval_results", {})


def evaluate(args: argparse.Namespace, cfg: CfgNode) -> Dict[str, Any]:
    """Evaluates MODEL.WEIGHTS, or with ``--resume`` the last checkpoint of OUTPUT_DIR."""
    model = Trainer.build_model(cfg)
    saved = RunCheckpointer(model, cfg.OUTPUT_DIR).newest_readable() if args.resume else ""
    weights = saved or cfg.MODEL.WEIGHTS
    if not weights:
        raise D2kdError("--eval-only needs weights: append MODEL.WEIGHTS <file>, or use --resume with OUTPUT_DIR <run>")
    load_strict(model, weights)
    return Trainer.test(cfg, model)
