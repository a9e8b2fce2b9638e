"""Training from YAML configs: detectron2's DefaultTrainer, also on CPU in several processes, with COCO evaluation."""

import os
from contextlib import contextmanager
from functools import partial
from typing import Any, Dict, Iterator, List

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase, create_ddp_model, defaults, hooks
from detectron2.evaluation import COCOEvaluator
from detectron2.solver import build_optimizer
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.utils import comm
from torch import nn
from torch.utils.data import DataLoader

from ..checkpoint.run_checkpoints import RunCheckpointer
from ..data.bad_images import EvaluationMapper
from ..data.loader import build_train_loader
from ..data.randomness import seeded
from ..errors import D2kdError, nearest
from .hooks import EMA, FiniteLosses, run_hooks
from .precision import amp_trainer

OPTIMIZERS = ("SGD", "AdamW")


def wrap_ddp(model: nn.Module, **options: Any) -> nn.Module:
    """detectron2's ``create_ddp_model``, which otherwise cannot wrap a model on the CPU."""
    if next(model.parameters()).device.type == "cpu":
        options["device_ids"] = None
    return create_ddp_model(model, **options)


@contextmanager
def _parts_of_ours(cfg: CfgNode) -> Iterator[None]:
    """DefaultTrainer's constructor takes these parts from its module and offers no other way in."""
    ours = {
        "create_ddp_model": wrap_ddp,
        "DetectionCheckpointer": RunCheckpointer,
        "AMPTrainer": partial(amp_trainer, dtype=cfg.SOLVER.AMP.DTYPE),
    }
    originals = {name: getattr(defaults, name) for name in ours}
    try:
        vars(defaults).update(ours)
        yield
    finally:
        vars(defaults).update(originals)


class Trainer(DefaultTrainer):
    """Trains teachers, plain baselines and students alike; a resumed run ends with the weights of an unbroken one.

    Args:
        cfg: with d2kd's keys. A negative SEED stands for a random one.
    """

    def __init__(self, cfg: CfgNode) -> None:
        if cfg.SEED < 0:
            cfg = cfg.clone()
            cfg.merge_from_list(["SEED", comm.shared_random_seed()])
        with _parts_of_ours(cfg):
            super().__init__(cfg)
        self.losses = FiniteLosses(self._trainer)

    def build_hooks(self) -> List[HookBase]:
        """DefaultTrainer's hooks with d2kd's saving instead of its own, and the EMA's evaluation."""
        cfg, model = self.cfg, self.checkpointer.model
        ema = EMA(model, cfg.SOLVER.EMA_DECAY, cfg.OUTPUT_DIR) if cfg.SOLVER.EMA_DECAY else None
        built = [hook for hook in super().build_hooks() if hook and not isinstance(hook, hooks.PeriodicCheckpointer)]
        place = next(i for i, hook in enumerate(built) if isinstance(hook, hooks.EvalHook))
        if ema:
            evaluate_ema = hooks.EvalHook(cfg.TEST.EVAL_PERIOD, lambda: {"ema": self._test_ema(ema.average)})
            built.insert(place + 1, evaluate_ema)
        loader = self._trainer.data_loader
        built[place:place] = run_hooks(self.checkpointer, loader, cfg.SEED, ema, period=cfg.SOLVER.CHECKPOINT_PERIOD)
        return built

    def _test_ema(self, average: nn.Module) -> Dict[str, Any]:
        cfg = self.cfg.clone()
        cfg.merge_from_list(["OUTPUT_DIR", os.path.join(cfg.OUTPUT_DIR, "ema")])
        return self.test(cfg, average)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> DataLoader:
        with seeded(cfg.SEED):  # samplers draw their own seeds
            return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        mapper = EvaluationMapper(DatasetMapper(cfg, is_train=False))
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

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
