"""One run from a YAML config."""

import argparse
from typing import Any, Dict

import yaml
from detectron2.config import CfgNode

from ..checkpoint import load_strict
from ..config import detector_node, drop_teacher, load_config
from ..errors import D2kdError
from .checkpointing import RunCheckpointer
from .checks import check_datasets, check_weights_file, usable_device
from .run_folder import RunFolder, flatten
from .trainer import Trainer

# What a resumed run may change: how it is run, evaluated and saved, but nothing that changes an iteration.
# The teacher's file may have moved: its SHA-256 is compared instead.
MAY_CHANGE = (
    *("OUTPUT_DIR", "VERSION", "VIS_PERIOD", "CUDNN_BENCHMARK", "DATALOADER.NUM_WORKERS", "SOLVER.CHECKPOINT_PERIOD"),
    *("MODEL.DEVICE", "MODEL.DISTILL.TEACHER.WEIGHTS", "DATASETS.TEST", "TEST.*", "*_TEST"),
)


def prepare(args: argparse.Namespace) -> CfgNode:
    """Loads and checks the config of a run.

    Raises:
        D2kdError: something is wrong that can be seen before any training.
    """
    cfg = load_config(args.config_file, args.opts)
    cfg.MODEL.DEVICE = usable_device(cfg.MODEL.DEVICE)
    names = cfg.DATASETS.TEST
    if args.eval_only:
        drop_teacher(cfg)
    else:
        names = (*cfg.DATASETS.TRAIN, *names)
        check_weights_file(cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS")
    node = detector_node(cfg)
    if node is not None:
        check_datasets(names, cfg.MODEL[node].NUM_CLASSES, f"MODEL.{node}.NUM_CLASSES")
    cfg.freeze()
    return cfg


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


def run(args: argparse.Namespace, cfg: CfgNode) -> Dict[str, Any]:
    """Trains, or evaluates with ``--eval-only``; returns the evaluation's results."""
    if args.eval_only:
        return evaluate(args, cfg)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
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
