"""Exported files, TorchScript or ONNX, as models: with the interface of a detectron2 model."""

import json
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Tuple

import torch
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import nn

from .errors import D2kdError
from .export import Run, load_onnx, load_torchscript

#: Names of classes by category id, in the order of a detector's classes.
Categories = Dict[Any, str]

#: Suffixes of exported files, and what loads each.
LOADERS = {".ts": load_torchscript, ".torchscript": load_torchscript, ".onnx": load_onnx}
#: What tools/export.py writes beside the files.
REPORT = "export.json"


class ExportReport(NamedTuple):
    """What export.json says about the files beside it.

    Attributes:
        input_format: channel order, "BGR" or "RGB".
        edges: the shortest and the longest side in pixels that evaluation resizes images to; 0, 0 to leave them.
        score_threshold: of evaluation.
        categories: names of the classes by category id, in the order of the detector's classes; empty if unknown.
    """

    input_format: str
    edges: Tuple[int, int]
    score_threshold: float
    categories: Categories

    def to_json(self) -> Dict[str, Any]:
        """As it is written; category ids as a list of pairs, since JSON's keys are texts."""
        return {**self._asdict(), "categories": list(self.categories.items())}


def is_exported(weights: str) -> bool:
    """Whether a file is an exported detector, by its suffix."""
    return Path(weights).suffix in LOADERS


def read_report(weights: str) -> ExportReport:
    """Reads the export.json beside an exported file.

    Raises:
        D2kdError: there is none, or it is of an older version.
    """
    file = Path(weights).parent / REPORT
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        values = {name: content[name] for name in ExportReport._fields}
        return ExportReport(**{**values, "categories": dict(values["categories"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise D2kdError(
            f"{weights} does not tell how to resize images for it, and {file} cannot be read "
            f"({type(error).__name__}: {error}); keep the {REPORT} of tools/export.py beside it"
        ) from error


class ExportedDetector(nn.Module):
    """An exported file that takes and returns what detectron2's models do.

    Args:
        run: the file.
        score_threshold: lowest class score of a detection.
        device: where it runs.
    """

    def __init__(self, run: Run, score_threshold: float, device: str = "cpu") -> None:
        super().__init__()
        self.run = run
        self.device = torch.device(device)
        self.score_threshold = torch.tensor(score_threshold, device=device)

    @torch.no_grad()
    def forward(self, batched_inputs: List[Dict[str, Any]]) -> List[Dict[str, Instances]]:
        """Detects the objects in images, see :class:`~detectron2.modeling.RetinaNet`."""
        return [{"instances": self._detect(entry)} for entry in batched_inputs]

    def _detect(self, entry: Dict[str, Any]) -> Instances:
        image = entry["image"].to(self.device).float()
        boxes, scores, classes = self.run(image, self.score_threshold)
        height, width = image.shape[-2:]
        found = Instances((height, width), pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)
        return detector_postprocess(found, entry.get("height", height), entry.get("width", width))


def load_exported(weights: str, score_threshold: float, device: str = "cpu") -> ExportedDetector:
    """Loads an exported file; ONNX always runs on the CPU.

    Raises:
        D2kdError: there is no such file, or it is damaged.
    """
    load = LOADERS[Path(weights).suffix]
    device = "cpu" if load is load_onnx else device
    if not Path(weights).is_file():
        raise D2kdError(f"{weights}: no such file")
    try:
        return ExportedDetector(load(Path(weights), device), score_threshold, device)
    except D2kdError:
        raise
    except Exception as error:  # each runtime has its own
        reason = " ".join(str(error).split())[:200]
        raise D2kdError(f"{weights} is not a file that tools/export.py wrote ({reason}); export it again") from error
