"""Training from YAML configs: detectron2's DefaultTrainer, also on CPU in several processes, with COCO evaluation."""

import os
from contextlib import contextmanager
from typing import Any, Iterator

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, create_ddp_model, defaults
from detectron2.evaluation import COCOEvaluator
from detectron2.solver import build_optimizer
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import nn

from ..errors import D2kdError, nearest

OPTIMIZERS = ("SGD", "AdamW")


def wrap_ddp(model: nn.Module, **options: Any) -> nn.Module:
    """detectron2's ``create_ddp_model``, which otherwise cannot wrap a model on the CPU."""
    if next(model.parameters()).device.type == "cpu":
        options["device_ids"] = None
    return create_ddp_model(model, **options)


@contextmanager
def _ddp_on_cpu() -> Iterator[None]:
    """DefaultTrainer's constructor calls its module's ``create_ddp_model`` and offers no other way in."""
    original, defaults.create_ddp_model = defaults.create_ddp_model, wrap_ddp
    try:
        yield
    finally:
        defaults.create_ddp_model = original


class Trainer(DefaultTrainer):
    """Trains teachers, plain baselines and students alike.

    Args:
        cfg: with d2kd's keys.
    """

    def __init__(self, cfg: CfgNode) -> None:
        with _ddp_on_cpu():
            super().__init__(cfg)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        return COCOEvaluator(dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name))

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Builds ``SOLVER.OPTIMIZER``: detectron2's own SGD, or AdamW with the same treatment of norms and biases."""
        solver = cfg.SOLVER
        if solver.OPTIMIZER == "SGD":
            return build_optimizer(cfg, model)
        if solver.OPTIMIZER != "AdamW":
            raise D2kdError(
                f"SOLVER.OPTIMIZER {solver.OPTIMIZER!r} is none of {', '.join(OPTIMIZERS)}"
                f"{nearest(solver.OPTIMIZER, OPTIMIZERS)}"
            )
        params = get_default_optimizer_params(
            model,
            base_lr=solver.BASE_LR,
            weight_decay_norm=solver.WEIGHT_DECAY_NORM,
            bias_lr_factor=solver.BIAS_LR_FACTOR,
            weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        )
        adamw = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
        return adamw(params, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY)
