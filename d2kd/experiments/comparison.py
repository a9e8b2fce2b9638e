"""Comparison of distillation methods with the same teacher, student, seeds and iterations for all."""

import csv
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence

from ..errors import check_choice
from .series import Run, prepare_data, run_all, table

# Rows of the table, and their config keys under MODEL.DISTILL. Weights are those published for the detector, if there
# are any. The necks of the demo's teacher and student differ (as their backbones do), so only the head is inherited.
METHODS: Dict[str, Dict[str, Any]] = {
    "plain": {},
    "ResponseKD": {"METHODS": "('ResponseKD',)"},
    "CrossKD": {"METHODS": "('CrossKD',)"},
    "PKD": {"METHODS": "('PKD',)"},
    "FGD": {"METHODS": "('FGD',)"},
    "FGD, inherited head": {"METHODS": "('FGD',)", "INHERIT": "('head',)"},
    "MGD": {"METHODS": "('MGD',)"},
    "CWD": {"METHODS": "('CWD',)"},
    "FitNet": {"METHODS": "('FitNet',)"},
    # LD is a sum over the images of a worker: 0.25 is published for 2 images, and the demo has 8.
    "LD": {"METHODS": "('LD',)", "LD.WEIGHT": 0.0625},
    "CrossKD + PKD": {"METHODS": "('CrossKD', 'PKD')"},
}
PKD_WEIGHTS = {"retinanet": 2.0, "gfl": 6.0, "atss": 1.0, "fcos": 2.0}
#: Methods that only work with some detectors.
DETECTORS = {"LD": ("gfl",)}


class Comparison(NamedTuple):
    """The settings of a comparison, and its steps.

    Attributes:
        detector: "retinanet", "gfl", "atss" or "fcos".
        methods: keys of :data:`METHODS`; empty for all that work with the detector.
        data: "blood_cells" or "bccd".
        bccd: folder with the original BCCD data set, if it is not prepared yet.
        seeds: number of seeds of each method.
        iterations: length of each run.
        jobs: number of runs at a time.
        output: folder of the results; "" for a default in ``output``.
    """

    detector: str = "retinanet"
    methods: Sequence[str] = ()
    data: str = "blood_cells"
    bccd: str = ""
    seeds: int = 3
    iterations: int = 200
    jobs: int = 1
    output: str = ""

    @property
    def folder(self) -> Path:
        """The folder of the results."""
        return Path(self.output or f"output/compare_{self.data}_{self.detector}").absolute()

    def run(self) -> None:
        """Executes the runs that are not done yet and prints the table.

        Raises:
            D2kdError: a method is unknown, a run failed, or a folder belongs to a different run.
        """
        for method in self.methods:
            check_choice("--methods", method, METHODS)
        prepare_data(self.data, self.bccd)
        runs = self._make_runs()
        run_all(runs[:1], total=len(runs))
        run_all(runs[1:], self.jobs, total=len(runs), before=1, after_each=lambda: self._write_results(runs))
        print(f"\n{self._write_results(runs)}\n\nwrote {self.folder / 'table.md'}\nwrote {self.folder / 'runs.csv'}")

    def _make_runs(self) -> List[Run]:
        """Creates the teacher's run and those of all methods, seed by seed, so that partial results are comparable."""
        methods = self.methods or [m for m in METHODS if self.detector in DETECTORS.get(m, PKD_WEIGHTS)]
        return [self._teacher, *(self._make_run(label, seed) for seed in range(1, self.seeds + 1) for label in methods)]

    @property
    def _teacher(self) -> Run:
        return Run("teacher", self._config("teacher"), self.folder / "teacher", 1, self.iterations, self.data)

    def _make_run(self, label: str, seed: int) -> Run:
        name = label.lower().replace(", ", "_").replace(" + ", "_").replace(" ", "_")
        config = self._config("crosskd" if METHODS[label] else "student")
        run = Run(label, config, self.folder / f"{name}_seed{seed}", seed, self.iterations, self.data)
        if METHODS[label]:
            options = {
                **METHODS[label],
                "TEACHER.WEIGHTS": self._teacher.checkpoint,
                "PKD.WEIGHT": PKD_WEIGHTS[self.detector],
            }
            run.overrides = {f"MODEL.DISTILL.{key}": value for key, value in options.items()}
        return run

    def _config(self, kind: str) -> str:
        prefix = "demo" if self.detector == "retinanet" else f"demo_{self.detector}"
        return f"configs/{prefix}_{kind}.yaml"

    def _write_results(self, runs: List[Run]) -> str:
        """Writes the rows of all finished runs and their table; returns the table."""
        finished = [run for run in runs if run.done]
        rows = [{"method": run.label, "seed": run.seed, **run.row()} for run in finished]
        with (self.folder / "runs.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        text = table(finished)
        (self.folder / "table.md").write_text(text + "\n")
        return text
