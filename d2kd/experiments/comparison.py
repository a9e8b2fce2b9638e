"""Comparison of distillation methods with the same teacher, student, data, seeds and iterations for all."""

import argparse
import csv
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any, Dict, List, Sequence

from ..config import find_config, load_config
from ..data import dataset_root
from ..errors import D2kdError
from .costs import costs_of
from .pictures import draw_comparison
from .pseudo_labels import write_pseudo_labels
from .rows import PLAIN, PSEUDO_LABELS, SAME_TIME, Row, parse_row
from .series import ROOT, TEACHER, Run, evaluate, prepare_data, run_all, table

METHODS = ("plain", "ResponseKD", "CrossKD", "PKD", "FGD", "FGD INHERIT=head", "MGD", "CWD", "FitNet", "CrossKD+PKD")
DETECTORS = ("retinanet", "gfl", "atss", "fcos")
# Of the demo: published weights, where there are any. The necks of its teacher and student differ (as their backbones
# do), so only the head is inherited. LD is a sum over the images of a worker: 0.25 is published for 2 images, and the
# demo has 8.
PKD_WEIGHTS = {"retinanet": 2.0, "gfl": 6.0, "atss": 1.0, "fcos": 2.0}
LD = "LD LD.WEIGHT=0.0625"


@dataclass
class Comparison:
    """The settings of a comparison, and its steps.

    Attributes:
        student: YAML config of the student, plain or distilling; what it says under MODEL.DISTILL holds for all rows.
        teacher: YAML config of the teacher.
        train: "annotations.json:images" to train on.
        val: the same, to evaluate on.
        weights: the teacher's; "" trains it, on the same data and for as long.
        methods: rows, see :func:`parse_row`.
        student_opts: overrides of the student's config.
        teacher_opts: overrides of the teacher's config.
        distill_opts: keys under MODEL.DISTILL and their values, for all rows with methods.
        seeds: number of seeds of each row.
        iterations: length of each run.
        evaluations: how often each run is evaluated.
        jobs: number of runs at a time.
        output: folder of the results.
    """

    student: str
    teacher: str
    train: str
    val: str
    weights: str = ""
    methods: Sequence[str] = METHODS
    student_opts: Sequence[str] = ()
    teacher_opts: Sequence[str] = ()
    distill_opts: Sequence[str] = ()
    seeds: int = 3
    iterations: int = 200
    evaluations: int = 4
    jobs: int = 1
    output: str = "output/comparison"

    @property
    def folder(self) -> Path:
        """The folder of the results."""
        return Path(self.output).absolute()

    @cached_property
    def rows(self) -> List[Row]:
        """The rows of the table, without the teacher's; plain first, since others are compared with it."""
        return sorted((parse_row(text) for text in self.methods), key=lambda row: row.label != PLAIN)

    @cached_property
    def detector(self) -> str:
        """The student's plain meta architecture."""
        return load_config(self.student, self.student_opts, with_teacher=False).MODEL.META_ARCHITECTURE.removeprefix(
            "Distill"
        )

    def run(self) -> None:
        """Executes the runs that are not done yet and prints the table.

        Raises:
            D2kdError: a row is unknown, a run failed, or a folder belongs to a different run.
        """
        self._check()
        self.folder.mkdir(parents=True, exist_ok=True)
        first = [] if self.weights else [self._teacher_run]
        runs = [*first, *self._runs([row for row in self.rows if row.label != SAME_TIME])]
        longer = [row for row in self.rows if row.label == SAME_TIME]
        total = len(runs) + len(longer) * self.seeds
        run_all(first, total=total)
        if any(row.label == PSEUDO_LABELS for row in self.rows):
            self._write_pseudo_labels()
        run_all(runs[len(first) :], self.jobs, total, len(first), lambda: self._write_results(runs))
        if longer:
            before, runs = len(runs), [*runs, *self._runs(longer, self._iterations_in_the_same_time(runs))]
            run_all(runs[before:], self.jobs, total, before, lambda: self._write_results(runs))
        print(f"\n{self._write_results(runs, with_costs=True)}\n")
        for name in ("table.md", "runs.csv", "curves.png"):
            print(f"wrote {self.folder / name}")

    def _check(self) -> None:
        """Raises D2kdError for what would end a run later."""
        for config in (self.student, self.teacher):
            if not find_config(config).endswith(".yaml"):
                raise D2kdError(f"{config}: a comparison takes YAML configs; name one")
        if self.weights and not Path(self.weights).is_file() and "://" not in self.weights:
            raise D2kdError(f"--teacher: {self.weights} is no file; leave out the weights to train the teacher")
        needs_methods = any(row.label == SAME_TIME for row in self.rows)
        if needs_methods and not (any(r.distills for r in self.rows) and any(r.label == PLAIN for r in self.rows)):
            raise D2kdError("--methods same-time needs the rows plain and one with methods, whose time it gets")

    @property
    def _teacher_run(self) -> Run:
        return self._make_run(TEACHER, self.teacher, 1, self.iterations, _pairs(self.teacher_opts))

    @property
    def _teacher_weights(self) -> str:
        return self.weights or str(self._teacher_run.checkpoint)

    def _runs(self, rows: Sequence[Row], iterations: int = 0) -> List[Run]:
        """Creates the runs of rows, seed by seed, so that partial results are comparable."""
        length = iterations or self.iterations
        return [self._student_run(row, seed, length) for seed in range(1, self.seeds + 1) for row in rows]

    def _student_run(self, row: Row, seed: int, iterations: int) -> Run:
        overrides = {**_pairs(self.student_opts), **self._distillation(row)}
        run = self._make_run(row.label, self.student, seed, iterations, overrides, f"{row.folder}_seed{seed}")
        if row.label == PSEUDO_LABELS:
            run.own_data = (f"{self._pseudo_labels}:{self.train.partition(':')[2]}", self.val)
        return run

    def _distillation(self, row: Row) -> Dict[str, Any]:
        """The keys that make the student distill, or keep it from it."""
        if not row.distills:
            return {
                "MODEL.META_ARCHITECTURE": self.detector,
                "MODEL.DISTILL.METHODS": "()",
                "MODEL.DISTILL.INHERIT": "()",
            }
        teacher = {
            "TEACHER.CONFIG_FILE": find_config(self.teacher),
            "TEACHER.WEIGHTS": self._teacher_weights,
            "TEACHER.OPTS": list(self.teacher_opts),
        }
        options = {**teacher, **_pairs(self.distill_opts), **row.options}
        found = {f"MODEL.DISTILL.{key}": value for key, value in options.items()}
        return {"MODEL.META_ARCHITECTURE": f"Distill{self.detector}", **found}

    def _make_run(
        self, label: str, config: str, seed: int, iterations: int, overrides: Dict[str, Any], folder: str = TEACHER
    ) -> Run:
        return Run(
            *(label, find_config(config), self.folder / folder, seed, iterations, ""),
            overrides=overrides,
            own_data=(self.train, self.val),
            evaluations=self.evaluations,
        )

    @property
    def _pseudo_labels(self) -> Path:
        return self.folder / "pseudo_labels.json"

    def _write_pseudo_labels(self) -> None:
        """Adds the teacher's detections on the training images to their labels."""
        if self._pseudo_labels.exists():
            return
        overrides = {**_pairs(self.teacher_opts), "MODEL.WEIGHTS": self._teacher_weights}
        results = evaluate(find_config(self.teacher), self.train, self.folder / "teacher_on_train", overrides)
        count = write_pseudo_labels(Path(self.train.partition(":")[0]), results, self._pseudo_labels)
        print(f"{count} detections of the teacher are pseudo-labels: {self._pseudo_labels}", flush=True)

    def _iterations_in_the_same_time(self, runs: List[Run]) -> int:
        """How many iterations the plain student can do in the time of the first row with methods."""
        label = next(row.label for row in self.rows if row.distills)
        distilled, plain = (mean(r.step_seconds() for r in runs if r.label == name) for name in (label, PLAIN))
        return round(self.iterations * distilled / plain)

    def _write_results(self, runs: List[Run], with_costs: bool = False) -> str:
        """Writes the rows of all finished runs, their table and curves; returns the table."""
        finished = [run for run in runs if run.done]
        rows = [{"method": run.label, "seed": run.seed, "iterations": run.iterations, **run.row()} for run in finished]
        with (self.folder / "runs.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        text = table(finished, costs_of(finished, self.folder) if with_costs else {}, PLAIN)
        (self.folder / "table.md").write_text(text + "\n")
        draw_comparison(
            {label: [r.folder for r in finished if r.label == label] for label in _labels(finished)},
            self.folder / "curves.png",
        )
        return text


def _labels(runs: Sequence[Run]) -> List[str]:
    return list(dict.fromkeys(run.label for run in runs))


def _pairs(opts: Sequence[str]) -> Dict[str, Any]:
    """Overrides KEY VALUE ... as a dict.

    Raises:
        D2kdError: a value is missing.
    """
    if len(opts) % 2:
        raise D2kdError(f"overrides come in pairs KEY VALUE, but there are {len(opts)}: {' '.join(map(str, opts))}")
    return dict(zip(opts[::2], opts[1::2]))


def of_the_demo(detector: str, data: str, bccd: str, **settings: Any) -> Comparison:
    """The comparison of the demo's small detectors on its data.

    Args:
        detector: one of :data:`DETECTORS`.
        data: "blood_cells" or "bccd".
        bccd: folder with the original BCCD data set, if it is not prepared yet.
        settings: further attributes of the comparison.
    """
    prepare_data(data, bccd)
    prefix = ROOT / "configs" / ("demo" if detector == "retinanet" else f"demo_{detector}")
    folder = (dataset_root() / data).absolute()
    found = {
        "methods": (*METHODS, LD) if detector == "gfl" else METHODS,
        "output": f"output/compare_{data}_{detector}",
        "distill_opts": ["PKD.WEIGHT", str(PKD_WEIGHTS[detector])],
        **settings,
    }
    train, val = (f"{folder / f'instances_{split}.json'}:{folder / 'images'}" for split in ("train", "val"))
    return Comparison(f"{prefix}_crosskd.yaml", f"{prefix}_teacher.yaml", train, val, **found)


def from_arguments(args: argparse.Namespace) -> Comparison:
    """The comparison that the command line of tools/compare.py asks for.

    Raises:
        D2kdError: the arguments do not fit together.
    """
    shared = (
        "methods",
        "student_opts",
        "teacher_opts",
        "distill_opts",
        "seeds",
        "iterations",
        "evaluations",
        "jobs",
        "output",
    )
    settings = {name: value for name, value in vars(args).items() if name in shared and value}
    if not args.student:
        if args.teacher or len(args.data) != 1 or args.data[0] not in ("blood_cells", "bccd"):
            raise D2kdError(
                "without --student there are only the demo's detectors and --data blood_cells or bccd; name a config"
            )
        return of_the_demo(args.detector, args.data[0], args.bccd, **settings)
    sets = dict(text.split("=", 1) for text in args.data if "=" in text)
    if set(sets) != {"train", "val"} or not all(":" in text for text in sets.values()):
        raise D2kdError("--data takes train=annotations.json:images val=annotations.json:images; name both")
    if not args.teacher:
        raise D2kdError("--student needs a --teacher to compare methods with; name its config")
    teacher, _, weights = args.teacher.partition(":")
    # The runs start in d2kd's folder, wherever this command does.
    train, val = (":".join(os.path.abspath(part) for part in sets[split].split(":", 1)) for split in ("train", "val"))
    weights = os.path.abspath(weights) if os.path.isfile(weights) else weights
    return Comparison(args.student, teacher, train, val, weights, **settings)
