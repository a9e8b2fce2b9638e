"""Detections in images, folders and videos, and of several detectors side by side."""

from ..export import split_label
from .compare import compare
from .inputs import find_inputs
from .predictor import Predictor, describe_export, open_predictor
from .write import write_predictions

__all__ = [
    "Predictor",
    "compare",
    "describe_export",
    "find_inputs",
    "open_predictor",
    "split_label",
    "write_predictions",
]
