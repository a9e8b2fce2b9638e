"""A table of what the recipes' detectors cost to run, which users choose from."""

from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from tabulate import tabulate

from ..complexity import COCO_SIZE, Complexity, cpu_milliseconds, measure
from ..config import OWN_CONFIGS, load_config

# Half configs, and detectors for small images.
NOT_RECIPES = ("Base-", "demo_", "quick_")


def recipes() -> List[Path]:
    """The published recipes among d2kd's own configs."""
    return [path for path in sorted(OWN_CONFIGS.glob("*.yaml")) if not path.name.startswith(NOT_RECIPES)]


def detectors(configs: Sequence[Path]) -> Iterator[Tuple[str, DenseDetector]]:
    """Builds the detector of each config, with random weights, on the CPU and without a teacher."""
    for path in configs:
        cfg = load_config(str(path), ["MODEL.DEVICE", "cpu"], with_teacher=False)
        yield path.stem, build_model(cfg).eval()


def costs_table(configs: Sequence[Path], repeats: int = 0, size: Tuple[int, int] = COCO_SIZE) -> str:
    """Makes a Markdown table of detectors and their costs; configs of the same detector share a row.

    Args:
        configs: YAML configs, plain or distilling.
        repeats: how often the CPU time is measured; 0 leaves it out.
        size: height and width of the image in pixels.
    """
    names: Dict[Tuple[str, Complexity], List[str]] = {}
    times: Dict[Tuple[str, Complexity], float] = {}
    for name, detector in detectors(configs):
        found = (type(detector).__name__.removeprefix("Distill"), measure(detector, size))
        names.setdefault(found, []).append(name)
        if repeats and found not in times:
            times[found] = cpu_milliseconds(detector, size, repeats)
    rows = [_row(names[found], found[1], times.get(found)) for found in sorted(names, key=_order)]
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def _order(found: Tuple[str, Complexity]) -> Tuple[str, int]:
    return found[0], -found[1].macs


def _row(names: Sequence[str], found: Complexity, milliseconds: Optional[float]) -> Dict[str, str]:
    row = {
        "configs": ", ".join(f"`{name}`" for name in names),
        "GMACs": f"{found.macs / 1e9:.1f}",
        "parameters": f"{found.parameters / 1e6:.2f} M",
    }
    return row if milliseconds is None else {**row, "CPU time (s)": f"{milliseconds / 1e3:.2f}"}
