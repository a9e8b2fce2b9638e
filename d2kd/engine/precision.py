"""Automatic mixed precision: float16 with a gradient scaler on a GPU, or bfloat16 anywhere."""

import logging
from typing import Any, Dict

import torch
from detectron2.engine import AMPTrainer, SimpleTrainer
from torch import nn

from ..errors import check_choice
from ..keys import key

DTYPES = ("float16", "bfloat16")


class Autocast(nn.Module):
    """Runs a model in bfloat16 while it trains, and as it is otherwise.

    Args:
        module: a model, possibly in DDP.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any) -> Any:
        """What the model gives."""
        device = next(self.module.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.training):
            return self.module(*inputs)


def amp_trainer(model: nn.Module, data_loader: Any, optimizer: torch.optim.Optimizer, dtype: str) -> SimpleTrainer:
    """Builds the trainer for mixed precision.

    float16 is detectron2's own, which scales gradients against underflow. bfloat16 has float32's range and needs no
    scaling; it is what CPUs have.

    Args:
        model: possibly in DDP.
        data_loader: gives batches.
        optimizer: of the model.
        dtype: one of :data:`DTYPES`; on the CPU it is always bfloat16.

    Raises:
        D2kdError: the type is none of these.
    """
    check_choice(key("SOLVER.AMP.DTYPE"), dtype, DTYPES)
    on_cpu = next(model.parameters()).device.type == "cpu"
    if dtype == "float16" and not on_cpu:
        return AMPTrainer(model, data_loader, optimizer)
    logging.getLogger(__name__).info("Mixed precision: bfloat16%s", ", as always on the CPU" if on_cpu else "")
    return SimpleTrainer(Autocast(model), data_loader, optimizer)


def with_scaler_state(trainer: SimpleTrainer, state: Dict[str, Any]) -> Dict[str, Any]:
    """The state of a checkpoint for a trainer, whose mixed precision may have been another one at that time.

    Args:
        trainer: from :func:`amp_trainer`, or without mixed precision.
        state: of the trainer that wrote the checkpoint.

    Returns:
        The state; where the trainer has a gradient scaler and it has none, with the trainer's own.
    """
    scaler = getattr(trainer, "grad_scaler", None)
    saved = state.get("grad_scaler")
    if scaler is None and saved:
        logging.getLogger(__name__).warning("The run continues without the checkpoint's gradient scaler.")
    if scaler is None or saved:
        return state
    logging.getLogger(__name__).warning(
        "The checkpoint has no gradient scaler, as it was written without float16: a new one starts at scale %g.",
        scaler.get_scale(),
    )
    return {**state, "grad_scaler": scaler.state_dict()}
