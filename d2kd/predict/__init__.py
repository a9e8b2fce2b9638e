"""Detections in images, folders and videos, and of several detectors side by side."""

from ..export import split_label
from .calibration import calibration_images, find_calibration
from .compare import compare, evaluate
from .data_sets import find_data
from .inputs import find_inputs
from .predictor import Predictor, describe_export, open_predictor, predictor_of
from .write import write_predictions

__all__ = [
    "Predictor",
    "calibration_images",
    "compare",
    "describe_export",
    "evaluate",
    "find_calibration",
    "find_data",
    "find_inputs",
    "open_predictor",
    "predictor_of",
    "split_label",
    "write_predictions",
]
