"""Each iteration as a function of the state it starts from."""

from contextlib import ExitStack
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

from ...data.loader import start_at
from ...data.randomness import ITERATIONS, seed_all


class Reproducible(HookBase):
    """Makes each iteration a function of the state it starts from, no matter when the process was started.

    The loader continues with the batch of the first iteration, and random numbers are seeded in each iteration. On the
    CPU the scripted losses run unoptimized: the optimizer, which starts at their second call, changes the last bits.

    Args:
        loader: the training loader.
        seed: of the run, not negative.
    """

    def __init__(self, loader: Any, seed: int) -> None:
        self.loader = loader
        self.seed = seed
        self._training = ExitStack()

    def before_train(self) -> None:
        start_at(self.loader, self.trainer.start_iter)
        if not torch.cuda.is_available():
            self._training.enter_context(torch.jit.optimized_execution(False))

    def before_step(self) -> None:
        seed_all(self.seed, ITERATIONS, self.trainer.iter, comm.get_rank())

    def after_train(self) -> None:
        self._training.close()
