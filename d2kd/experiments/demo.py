"""The demo: a teacher, a plain student and distilled students, trained on small images and compared."""

from pathlib import Path
from statistics import mean
from typing import List, NamedTuple

from ..data import dataset_root
from ..report import write_report
from .costs import costs_of
from .pictures import draw_curves, draw_grid
from .series import TEACHER, Run, prepare_data, run_all, table

LABELS = {
    TEACHER: TEACHER,
    "student": "student",
    "crosskd": "student + CrossKD",
    "ld": "student + LD",
    "longer": "student, same time",
}
DISTILLED = {"retinanet": ("crosskd",), "gfl": ("crosskd", "ld"), "atss": ("crosskd",), "fcos": ("crosskd",)}


class Demo(NamedTuple):
    """The settings of a demo, and its steps.

    Attributes:
        detector: "retinanet", "gfl", "atss" or "fcos".
        data: "blood_cells" or "bccd".
        bccd: folder with the original BCCD data set, if it is not prepared yet.
        seeds: number of seeds of each student.
        iterations: length of each run.
        same_time: also train a plain student for as long as CrossKD's training takes.
        output: folder of the results; "" for a default in ``output``.
    """

    detector: str = "retinanet"
    data: str = "blood_cells"
    bccd: str = ""
    seeds: int = 1
    iterations: int = 200
    same_time: bool = False
    output: str = ""

    @property
    def folder(self) -> Path:
        """The folder of the results."""
        suffix = "" if self.detector == "retinanet" else f"_{self.detector}"
        return Path(self.output or f"output/demo_{self.data}{suffix}").absolute()

    def run(self) -> None:
        """Prepares the data, executes the runs that are not done yet, and reports.

        Raises:
            D2kdError: a run failed, or a folder belongs to a different run.
        """
        prepare_data(self.data, self.bccd)
        seeds = range(1, self.seeds + 1)
        runs = [self._make_run("teacher", 1, self.iterations)]
        for kind in ("student", *DISTILLED[self.detector]):
            runs += [self._make_run(kind, seed, self.iterations) for seed in seeds]
        total = len(runs) + (self.seeds if self.same_time else 0)
        run_all(runs, total=total)
        if self.same_time:
            iterations = self._iterations_in_the_same_time(runs)
            longer = [self._make_run("longer", seed, iterations) for seed in seeds]
            run_all(longer, total=total, before=len(runs))
            runs += longer
        self._report(runs)

    def _make_run(self, kind: str, seed: int, iterations: int) -> Run:
        """Creates one run of the demo. The names of RetinaNet's configs do not include the detector."""
        prefix = "demo" if self.detector == "retinanet" else f"demo_{self.detector}"
        config = f"configs/{prefix}_{'student' if kind == 'longer' else kind}.yaml"
        folder = self.folder / (kind if kind == "teacher" else f"{kind}_seed{seed}")
        run = Run(LABELS[kind], config, folder, seed, iterations, self.data)
        if kind in DISTILLED[self.detector]:
            run.overrides["MODEL.DISTILL.TEACHER.WEIGHTS"] = self.folder / "teacher" / "model_final.pth"
        return run

    def _iterations_in_the_same_time(self, runs: List[Run]) -> int:
        """Returns how many iterations the plain student can do in the time of CrossKD's training."""
        plain, distilled = (
            mean(run.step_seconds() for run in runs if run.label == LABELS[kind]) for kind in ("student", "crosskd")
        )
        return round(self.iterations * distilled / plain)

    def _report(self, runs: List[Run]) -> None:
        """Writes the table and the pictures, and prints where they are and what to do next."""
        text = table(runs, costs_of(runs, self.folder))
        print(f"\n{text}\n")
        (self.folder / "table.md").write_text(text + "\n")
        first = {run.label: run for run in reversed(runs)}  # the first seed of each
        first = {label: first[label] for label in LABELS.values() if label in first}
        draw_curves({label: run.folder for label, run in first.items()}, self.folder / "curves.png")
        data = dataset_root() / self.data
        results = Path("inference") / f"{self.data}_val" / "coco_instances_results.json"
        detections = {label: run.folder / results for label, run in first.items() if label != LABELS["longer"]}
        draw_grid(data / "instances_val.json", data / "images", detections, self.folder / "detections.png")
        for name in ("table.md", "curves.png", "detections.png"):
            print(f"wrote {self.folder / name}")
        pages = [(run.label, run.folder) for run in runs]
        print(f"wrote {write_report(pages, self.folder / 'report.html', f'Demo: {self.detector} on {self.data}')}")
        checkpoint = first[LABELS["crosskd"]].checkpoint
        print(f"the distilled student, a plain detector: {checkpoint}")
        print("\nnext, use your own data (docs/custom_data.md), or evaluate the student:")
        evaluation = f"python train_net.py --config-file {first[LABELS['student']].config} --eval-only"
        print(f"  {evaluation} DATASETS.TEST \"('{self.data}_val',)\" MODEL.WEIGHTS {checkpoint}")
