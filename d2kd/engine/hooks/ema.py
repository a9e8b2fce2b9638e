"""The exponential moving average of the student's weights."""

import os
from typing import Dict

from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ...checkpoint import files
from ...checkpoint.run_checkpoints import report_write_errors
from ...errors import D2kdError
from ...keys import key


class EMA(HookBase):
    """An exponential moving average of the student's weights: ``average``, saved as model_ema_final.pth at the end.

    It starts as a copy of the weights after the first iteration. Buffers (statistics of BatchNorm) are copied. The
    running state is part of every checkpoint of the run.

    Args:
        model: the student, not wrapped.
        decay: how much of the average stays in each iteration, above 0 and below 1.
        folder: of the run.

    Raises:
        D2kdError: the decay is out of range.
    """

    def __init__(self, model: nn.Module, decay: float, folder: str) -> None:
        if not 0.0 < decay < 1.0:
            raise D2kdError(f"{key('SOLVER.EMA_DECAY')} is {decay}; set it between 0 and 1, or to 0 for no average")
        self.model = model
        self.path = os.path.join(folder, "model_ema_final.pth")
        self._averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)).eval().requires_grad_(False)

    @property
    def average(self) -> nn.Module:
        """The averaged student, in eval mode."""
        return self._averaged.module

    def after_step(self) -> None:
        self._averaged.update_parameters(self.model)
        if comm.is_main_process() and self.trainer.iter + 1 >= self.trainer.max_iter:
            with report_write_errors(self.path):
                files.write(self.path, {"model": self.average.state_dict()})

    def state_dict(self) -> Dict[str, Tensor]:
        return self._averaged.state_dict()

    def load_state_dict(self, state_dict: Dict[str, Tensor]) -> None:
        self._averaged.load_state_dict(state_dict)
