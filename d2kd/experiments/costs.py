"""What the detectors of a comparison cost to run."""

import json
from pathlib import Path
from typing import Any, Callable, Dict, Sequence

import torch

from ..complexity import measure
from ..export import evaluation_size, export_torchscript, load_detector, median_ms
from .series import TEACHER, Run

SECONDS = 3.0


def costs_of(runs: Sequence[Run], folder: Path) -> Dict[str, Dict[str, str]]:
    """Columns of each label's detector: the teacher's, and the student's, which is the same for all other labels.

    Args:
        runs: finished runs.
        folder: keeps what was measured, so that it is measured once.
    """
    costs = {}
    for run in runs:
        if run.label not in costs:
            cache = folder / f"costs_{TEACHER if run.label == TEACHER else 'student'}.json"
            costs[run.label] = cost_columns(str(run.folder / "config.yaml"), run.checkpoint, cache)
    return costs


def cost_columns(config: str, weights: Path, cache: Path) -> Dict[str, str]:
    """MACs, parameters and latency of a detector, at the size of its evaluation; measured once.

    Args:
        config: of the detector.
        weights: its checkpoint.
        cache: a JSON file, written if it is missing.
    """
    costs = _cached(cache, lambda: measure_costs(config, weights, cache.with_suffix(".ts")))
    return {
        "GMACs": f"{costs['macs'] / 1e9:.2f}",
        "params": f"{costs['parameters'] / 1e6:.2f} M",
        "latency ms": f"{costs['latency_ms']:.0f}",
    }


def measure_costs(config: str, weights: Path, file: Path) -> Dict[str, Any]:
    """Counts MACs and parameters, and times the TorchScript file of a detector on the CPU.

    Args:
        config: of the detector.
        weights: its checkpoint.
        file: where the exported file is written.

    Returns:
        ``macs`` and ``parameters``; ``latency_ms``, the median for one image; ``size``, height and width of the image
        in pixels; ``threads`` of the CPU.
    """
    size = evaluation_size(config)
    detector = load_detector(config, str(weights))
    found = measure(detector, size)
    latency = median_ms(export_torchscript(detector, file, size), detector.device, size, SECONDS)
    return {**found._asdict(), "latency_ms": latency, "size": size, "threads": torch.get_num_threads()}


def _cached(file: Path, make: Callable[[], Dict[str, Any]]) -> Dict[str, Any]:
    if not file.exists():
        file.write_text(json.dumps(make()))
    return json.loads(file.read_text())
