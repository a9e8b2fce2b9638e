"""Checks of single values of a config, before anything is built."""

import logging
import os
from typing import Sequence, Tuple

from ..data.loader import images_per_worker
from ..errors import D2kdError
from ..ranges import is_count, is_number
from ..relations import check_config
from .recipe import Recipe


def check_values(recipe: Recipe) -> None:
    """Raises D2kdError for a value with which no run is possible; names key, value and range."""
    check_config(recipe.values, recipe.is_lazy)


def check_batch(recipe: Recipe, processes: int) -> None:
    """Raises D2kdError if a batch cannot be divided by the number of processes."""
    batch = recipe.for_workers(processes).get("SOLVER.IMS_PER_BATCH")
    if batch:  # a LazyConfig's own loader may have none
        images_per_worker(batch, processes, recipe.options.accumulate)


def check_weights_file(recipe: Recipe) -> None:
    """Raises D2kdError if a run is to start from a local file that is not there; URLs are left to their handlers."""
    path = recipe.options.weights
    if path and "://" not in path and not os.path.isfile(path):
        raise D2kdError(f"{recipe.key('MODEL.WEIGHTS')}: there is no file {path}")


def warn_of_learning_rate(settings: Sequence[Tuple[float, int]], key: str) -> None:
    """Warns where the batch was changed and the learning rate was not, with the value by the linear rule.

    Args:
        settings: learning rate and images per batch, from the first config to the last override.
        key: of the learning rate.
    """
    settings = [(rate, batch) for rate, batch in settings if is_number(rate) and is_count(batch)]  # files may be wrong
    if not settings:
        return
    chosen_for = settings[0][1]
    for (before, _), (rate, batch) in zip(settings, settings[1:]):
        chosen_for = chosen_for if rate == before else batch
    rate, batch = settings[-1]
    if batch != chosen_for:
        logging.getLogger(__name__).warning(
            "%s %g was set for batches of %d images; with %d the linear rule (arXiv 1706.02677) gives %g",
            *(key, rate, chosen_for, batch, rate * batch / chosen_for),
        )
