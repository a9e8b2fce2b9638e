"""Keeps tests apart: fixed seeds, and everything that a test changes in the process is put back."""

import logging
import os
import random
import signal
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import logger as detectron2_logger

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGUSR1)


def seed_everything() -> None:
    """Seeds the generators of Python, numpy and torch."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@contextmanager
def restored_process() -> Iterator[None]:
    """Restores what belongs to the process as a whole when the block ends: logging, signals, torch, environment."""
    with _restored_logging(), _restored_signals(), _restored_torch():
        folder, environment = os.getcwd(), dict(os.environ)
        try:
            yield
        finally:
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(environment)


@contextmanager
def restored_catalogs() -> Iterator[None]:
    """Restores detectron2's catalogs of data sets: names and metadata."""
    names = dict(DatasetCatalog.data)
    metadata = {name: dict(value.__dict__) for name, value in MetadataCatalog.data.items()}
    try:
        yield
    finally:
        DatasetCatalog.data = names
        for name in [name for name in MetadataCatalog.data if name not in metadata]:
            del MetadataCatalog.data[name]
        for name, attributes in metadata.items():
            MetadataCatalog.data[name].__dict__.clear()
            MetadataCatalog.data[name].__dict__.update(attributes)


def _loggers() -> List[logging.Logger]:
    known = [x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger)]
    return [logging.root, *known]


def _state(logger: logging.Logger) -> Dict[str, Any]:
    lists = {"handlers": list(logger.handlers), "filters": list(logger.filters)}
    return {**lists, "propagate": logger.propagate, "disabled": logger.disabled}


@contextmanager
def _restored_logging() -> Iterator[None]:
    """Also clears the caches of detectron2's ``setup_logger``, which does nothing when called again."""
    fresh = _state(logging.Logger("fresh"))
    before = {logger: (_state(logger), logger.level) for logger in _loggers()}
    try:
        yield
    finally:
        for logger in _loggers():
            state, level = before.get(logger, (fresh, logging.NOTSET))
            for handler in set(logger.handlers) - set(state["handlers"]):
                handler.close()
            vars(logger).update({k: list(v) if isinstance(v, list) else v for k, v in state.items()})
            if logger.level != level:  # setting it walks through all loggers
                logger.setLevel(level)
        detectron2_logger.setup_logger.cache_clear()
        detectron2_logger._cached_log_stream.cache_clear()


@contextmanager
def _restored_signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)


@contextmanager
def _restored_torch() -> Iterator[None]:
    dtype, threads, cudnn = torch.get_default_dtype(), torch.get_num_threads(), torch.backends.cudnn
    flags = (cudnn.benchmark, cudnn.deterministic)
    deterministic = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        cudnn.benchmark, cudnn.deterministic = flags
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
