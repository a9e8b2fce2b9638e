"""What a training takes, from a few measured steps: seconds of an iteration and of an evaluation, and memory."""

import resource
import sys
import time
from statistics import median
from typing import Any, Callable, Iterator, List, NamedTuple

import torch
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import nn

from .recipe import Recipe
from .trainer import make_loop

# Steps that are timed after the first one, which also starts processes and allocates memory; a single one if two take
# longer than these seconds.
STEPS, SECONDS = 3, 30.0
# Images whose detection is timed, after the first one.
IMAGES = 3
MEGABYTE = 1e6


class Measured(NamedTuple):
    """What a few training steps took.

    Attributes:
        step: seconds of a training step.
        forward: seconds of detecting the objects of one image.
        memory: largest memory in use, in megabytes: of the GPU if there is one, else of the process.
    """

    step: float
    forward: float
    memory: float


def measure_training(recipe: Recipe, model: nn.Module, batches: Iterator[Any]) -> Measured:
    """Runs a few training steps with a learning rate of 0, which leave the weights as they are, and a few detections.

    Args:
        recipe: of the run.
        model: in training mode.
        batches: of training images.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    optimizer = recipe.build_optimizer(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    loop = make_loop(recipe.options, model, batches, optimizer)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    times: List[float] = []
    with EventStorage():
        while len(times) < 2 or (len(times) <= STEPS and sum(times) < SECONDS):
            loop.iter = len(times)
            times.append(_seconds(loop.run_step))
    step, memory = median(times[1:]), peak_memory()
    model.eval()
    with torch.no_grad():
        images = [_seconds(lambda x=image: model([x])) for image in next(batches)[: IMAGES + 1]]  # type: ignore[misc]
    model.train()
    return Measured(step, median(images[1:] or images), memory)


def peak_memory() -> float:
    """Largest memory that was in use, in megabytes: of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / MEGABYTE
    units = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * units / MEGABYTE


def training_table(recipe: Recipe, measured: Measured, images: int, processes: "Processes") -> str:
    """A table of what the whole training takes.

    Args:
        recipe: of the run.
        measured: by one process, with its part of a batch.
        images: number of images to evaluate on.
        processes: that train.
    """
    options = recipe.options
    evaluations = num_evaluations(options.max_iter, options.eval_period) * (2 if options.ema_decay else 1)
    training = options.max_iter * measured.step
    evaluating = evaluations * images / processes.devices * measured.forward
    batch = recipe.get("SOLVER.IMS_PER_BATCH")  # a LazyConfig's own loader may have none
    where = "of the GPU" if torch.cuda.is_available() else "of the process, without those that load images"
    rows = [
        ["an iteration", f"{measured.step:.2g} s{f', {batch} images' if batch else ''}{processes}"],
        [f"{options.max_iter} iterations", duration(training)],
    ]
    if images:
        rows.append([f"{evaluations} x {images} images evaluated", duration(evaluating)])
        rows.append(["together", duration(training + evaluating)])
    rows.append(["memory", f"{measured.memory / 1000:.1f} GB {where}"])
    return tabulate(rows, headers=["training takes about", ""], tablefmt="simple", disable_numparse=True)


class Processes(NamedTuple):
    """The processes of a training.

    Attributes:
        total: of all machines together.
        machines: number of machines.
    """

    total: int = 1
    machines: int = 1

    @property
    def devices(self) -> int:
        """Among how many devices a batch is divided; the processes of a machine share its CPU."""
        return self.total if torch.cuda.is_available() else self.machines

    def __str__(self) -> str:
        if self.total == 1:
            return ""
        shared = "" if self.devices > 1 else ", which share this CPU"
        return f" by {self.total} processes{shared}; what they exchange is not measured"

    def part(self, recipe: Recipe) -> Recipe:
        """The recipe in which a batch is what one device gets of it."""
        batch = recipe.get("SOLVER.IMS_PER_BATCH")
        return recipe.changed("SOLVER.IMS_PER_BATCH", batch // self.devices) if batch and self.devices > 1 else recipe


ONE_PROCESS = Processes()


def num_evaluations(iterations: int, period: int) -> int:
    """Number of evaluations of a run: periodic ones and the one at its end."""
    return 1 + ((iterations - 1) // period if period > 0 else 0)


def duration(seconds: float) -> str:
    """A time in words."""
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _seconds(run: Callable[[], Any]) -> float:
    """How long a call takes, with what it starts on the GPU."""
    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
