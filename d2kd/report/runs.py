"""What a report reads of a run: the files in its folder."""

import json
import math
import os
import re
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

from ..diagnose.gradients import GRADIENT
from ..engine.main import parser
from ..errors import D2kdError
from ..experiments.pictures import detection_loss, read_metrics

RESULTS = "coco_instances_results.json"
Points = List[Tuple[float, float]]
_SEED = re.compile(r"_seed\d+$")


@dataclass
class ReportRun:
    """A run in a report.

    Attributes:
        label: its name; runs with the same label are repetitions with other seeds.
        folder: where it wrote.
    """

    label: str
    folder: Path

    @cached_property
    def records(self) -> List[Dict[str, Any]]:
        """The metrics that it logged, in order of iterations."""
        return read_metrics(self.folder)

    @cached_property
    def values(self) -> Dict[str, Any]:
        """Its config, flat; empty if run.json is missing."""
        file = self.folder / "run.json"
        return json.loads(file.read_text()) if file.exists() else {}

    @property
    def commands(self) -> str:
        """The commands that started and resumed it; empty for runs of older versions."""
        file = self.folder / "commands.txt"
        return file.read_text() if file.exists() else ""

    @cached_property
    def config(self) -> Tuple[str, List[str]]:
        """The config that makes its model again, and overrides: what the folder keeps, or a LazyConfig's own file."""
        words = shlex.split(self.commands.splitlines()[-1], comments=True) if self.commands else []
        if "MODEL.META_ARCHITECTURE" in self.values or words[:1] != ["cd"]:
            return str(self.folder / "config.yaml"), []
        # A user's own script may take arguments that train_net.py does not know.
        arguments = parser().parse_known_args(words[words.index("&&") + 3 :])[0]
        classes = self.values.get("model.num_classes")  # --train-data may have set them
        opts = [] if classes is None else [f"model.num_classes={classes}"]
        return os.path.join(words[1], arguments.config_file), [*arguments.opts, *opts]

    @property
    def methods(self) -> List[str]:
        """Names of its distillation methods."""
        found = self.values.get("MODEL.DISTILL.METHODS") or self.values.get("model.methods") or []
        return [x if isinstance(x, str) else str(x.get("_target_", "")).rsplit(".", 1)[-1] for x in found]

    @property
    def detections(self) -> Dict[str, Path]:
        """The detections of its last evaluation, by name of the test set."""
        return {file.parent.name: file for file in sorted(self.folder.glob(f"inference/*/{RESULTS}"))}

    @cached_property
    def evaluations(self) -> List[Dict[str, Any]]:
        """The records with an AP."""
        return [record for record in self.records if is_number(record.get("bbox/AP"))]

    def curve(self, key: str) -> Points:
        """A metric over iterations, without values that are missing or not finite."""
        return [(r["iteration"], r[key]) for r in self.records if is_number(r.get(key))]

    def own_loss(self) -> Points:
        """The detector's own losses together, over iterations."""
        return [(r["iteration"], detection_loss(r)) for r in self.records if is_number(r.get("total_loss"))]

    def losses(self) -> Dict[str, Points]:
        """Each loss over iterations."""
        names = dict.fromkeys(k for record in self.records for k in record if k.startswith("loss_"))
        return {name: self.curve(name) for name in names}

    def gradients(self) -> Dict[str, Points]:
        """How strongly each loss pulls at the FPN, relative to the detector's own losses; logged by GRADIENT_PERIOD."""
        names = dict.fromkeys(k for record in self.records for k in record if k.startswith(GRADIENT))
        return {name[len(GRADIENT) :]: self.curve(name) for name in names}

    def seconds(self, points: Points) -> Points:
        """Puts the seconds of training, without evaluation, in place of iterations."""
        clock, now, last = [(-1.0, 0.0)], 0.0, -1.0
        for iteration, step in self.curve("time"):
            now, last = now + (iteration - last) * step, iteration
            clock.append((last, now))
        return [(interpolate(clock, x), y) for x, y in points] if len(clock) > 1 else []


def interpolate(clock: Points, x: float) -> float:
    """Piecewise linear, and constant beyond both ends."""
    for (x0, y0), (x1, y1) in zip(clock, clock[1:]):
        if x <= x1:
            return y0 + (y1 - y0) * max(x - x0, 0.0) / max(x1 - x0, 1e-12)
    return clock[-1][1]


def is_number(value: Any) -> bool:
    """Whether a logged value is a finite number."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def find_runs(folders: Sequence[str]) -> List[Tuple[str, Path]]:
    """Finds runs for :func:`write_report`.

    Args:
        folders: each a run's, or one that holds runs, as ``make demo`` and ``tools/compare.py`` write them, or
            ``<label>=<folder>``. A run's label is the name of its folder without ``_seed<n>``.

    Raises:
        D2kdError: there is no run in one of them.
    """
    found = []
    for entry in folders:
        label, path = ("", Path(entry)) if Path(entry).exists() else _split(entry)
        runs = [path] if (path / "metrics.json").exists() else sorted(f.parent for f in path.glob("*/metrics.json"))
        if not runs:
            raise D2kdError(f"{path} holds no run: there is no metrics.json in it; name the folder of a training run")
        found += [(label or _SEED.sub("", run.resolve().name), run) for run in runs]
    return sorted(found, key=_rank)


def _rank(run: Tuple[str, Path]) -> int:
    """Teachers first, then plain students: the order in which a reader compares."""
    return 0 if run[0] == "teacher" else 1 + bool(ReportRun(*run).methods)


def _split(entry: str) -> Tuple[str, Path]:
    label, _, path = entry.rpartition("=")
    return label, Path(path)
