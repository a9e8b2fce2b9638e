"""Distillation methods, one file each. Importing a method registers it."""

from .base import (
    METHOD_REGISTRY,
    FeatureMethod,
    Method,
    build_method,
    check_method_names,
    check_unique,
    check_weights,
    method_defaults,
    method_names,
)
from .crosskd import CrossKD
from .cwd import CWD
from .fgd import FGD
from .fitnet import FitNet
from .ld import LD
from .mgd import MGD
from .pkd import PKD
from .response import ResponseKD
from .schedule import Schedule

__all__ = [
    "METHOD_REGISTRY",
    "CWD",
    "CrossKD",
    "FGD",
    "FeatureMethod",
    "FitNet",
    "LD",
    "MGD",
    "Method",
    "PKD",
    "ResponseKD",
    "Schedule",
    "build_method",
    "check_method_names",
    "check_unique",
    "check_weights",
    "method_defaults",
    "method_names",
]
