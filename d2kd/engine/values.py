"""Checks of single values of a config, before anything is built."""

import logging
import math
import os
from typing import Any, Callable, Dict, Sequence, Tuple

from ..errors import D2kdError
from .recipe import Recipe


def _all(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda values: len(values) > 0 and all(test(value) for value in values)


def _positive(value: float) -> bool:
    return 0 < value < math.inf


def _triple(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda values: len(values) == 3 and _all(test)(values)


# Settings by YAML key, what their values must be, and the same in words.
VALUES: Dict[str, Tuple[Callable[[Any], bool], str]] = {
    "SOLVER.MAX_ITER": (_positive, "1 or more"),
    "SOLVER.IMS_PER_BATCH": (_positive, "1 or more"),
    "SOLVER.BASE_LR": (_positive, "above 0"),
    "SOLVER.CHECKPOINT_PERIOD": (_positive, "1 or more"),
    "SOLVER.EMA_DECAY": (lambda value: 0 <= value < 1, "between 0 (no average) and 1"),
    "SOLVER.STEPS": (lambda steps: list(steps) == sorted(set(steps)), "ascending iterations"),
    "TEST.EVAL_PERIOD": (lambda value: value >= 0, "0 (only at the end) or more"),
    "TEST.DETECTIONS_PER_IMAGE": (_positive, "1 or more"),
    "DATASETS.TRAIN": (bool, "one data set or more"),
    "DATALOADER.NUM_WORKERS": (lambda value: value >= 0, "0 or more"),
    "INPUT.MIN_SIZE_TRAIN": (_all(_positive), "lengths above 0"),
    "INPUT.MAX_SIZE_TRAIN": (_positive, "a length above 0"),
    "INPUT.FORMAT": (lambda value: value in ("BGR", "RGB"), "BGR or RGB"),
    "MODEL.PIXEL_MEAN": (_triple(math.isfinite), "three finite numbers"),
    "MODEL.PIXEL_STD": (_triple(_positive), "three numbers above 0"),
    "MODEL.DISTILL.PREFLIGHT": (lambda value: value >= 0, "0 (no check) or more images"),
}
# detectron2's own default of these is None.
MAY_BE_NONE = ("SOLVER.WEIGHT_DECAY_BIAS",)


def check_values(recipe: Recipe) -> None:
    """Raises D2kdError for a value with which no run is possible; names key, value and range."""
    if not recipe.is_lazy:  # in a LazyConfig, None is a value like any other
        empty = [key for key, value in recipe.values.items() if value is None and key not in MAY_BE_NONE]
        if empty:  # yacs takes None for any type
            raise D2kdError(f"{', '.join(empty)}: a value is missing; write one, or leave the key out for its default")
    for name, (is_valid, words) in VALUES.items():
        if recipe.key(name) not in recipe.values:
            continue
        value = recipe.get(name)
        try:
            valid = is_valid(value)
        except TypeError:  # it is no number, or an element of a list is none
            valid = False
        if not valid:
            raise D2kdError(f"{recipe.key(name)} is {value!r}; it must be {words}")


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
    if not settings:
        return
    chosen_for = settings[0][1]
    for (before, _), (rate, batch) in zip(settings, settings[1:]):
        chosen_for = chosen_for if rate == before else batch
    rate, batch = settings[-1]
    if batch != chosen_for and rate:
        logging.getLogger(__name__).warning(
            "%s %g was set for batches of %d images; with %d the linear rule (arXiv 1706.02677) gives %g",
            *(key, rate, chosen_for, batch, rate * batch / chosen_for),
        )
