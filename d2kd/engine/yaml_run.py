"""One run from a YAML config."""

import argparse
from typing import Any, Dict

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode

from ..checkpoint import load_strict
from ..config import detector_node, load_config
from ..errors import D2kdError
from .checks import check_datasets, check_weights_file, usable_device
from .trainer import Trainer


def prepare(args: argparse.Namespace) -> CfgNode:
    """Loads and checks the config of a run.

    Raises:
        D2kdError: something is wrong that can be seen before any training.
    """
    cfg = load_config(args.config_file, args.opts)
    cfg.MODEL.DEVICE = usable_device(cfg.MODEL.DEVICE)
    names = cfg.DATASETS.TEST
    if args.eval_only:
        cfg.MODEL.DISTILL.METHODS = ()  # evaluation neither builds nor needs the teacher
    else:
        names = (*cfg.DATASETS.TRAIN, *names)
        check_weights_file(cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS")
    node = detector_node(cfg)
    if node is not None:
        check_datasets(names, cfg.MODEL[node].NUM_CLASSES, f"MODEL.{node}.NUM_CLASSES")
    cfg.freeze()
    return cfg


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
    saved = DetectionCheckpointer(model, cfg.OUTPUT_DIR)
    weights = saved.get_checkpoint_file() if args.resume and saved.has_checkpoint() else cfg.MODEL.WEIGHTS
    if not weights:
        raise D2kdError("--eval-only needs weights: append MODEL.WEIGHTS <file>, or use --resume with OUTPUT_DIR <run>")
    load_strict(model, weights)
    return Trainer.test(cfg, model)
