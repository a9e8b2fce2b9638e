"""The whole way on a user's own data: plan, teacher, plain and distilled student, comparison, export."""

import importlib.util
import json
import math
import socket
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from ..config import detector_node, find_config, load_config
from ..data.checks import check_datasets
from ..data.own import OwnData, prepare_own_data
from ..engine.estimate import Measured, duration
from ..engine.logs import log_remarks
from ..errors import D2kdError, check_choice
from ..report import write_report
from .costs import costs_of
from .pictures import draw_curves, draw_grid
from .plan import FACTORS, Anchors, Images, choose_anchors, image_size, measure, read_sizes, write_config
from .series import ROOT, TEACHER, Run, run_all, table

LABELS = {TEACHER: TEACHER, "student": "student", "distilled": "student + CrossKD"}
EVALUATIONS = 4
# Seconds after which a server that does not answer counts as missing.
NETWORK_SECONDS = 20.0
# Seconds that a run takes before its first and after its last iteration.
STARTING = 15


class Models(NamedTuple):
    """A teacher and a student to train.

    Attributes:
        teacher: name of the teacher's config, with ``{}`` for the detector.
        student: of the student's.
        distilled: of the distilled student's.
        image_size: the largest default.
        iterations: the least that training takes by default.
        summary: in words.
    """

    teacher: str
    student: str
    distilled: str
    image_size: int
    iterations: int
    summary: str

    def config(self, kind: str, detector: str) -> str:
        """Path of a shipped config."""
        name = getattr(self, kind).format(detector).replace("demo_retinanet_", "demo_")
        return str(ROOT / "configs" / f"{name}.yaml")


MODELS = {
    "small": Models(
        *("demo_{}_teacher", "demo_{}_student", "demo_{}_crosskd", 192, 300),
        "a small ResNet and one of a sixth of its size, from scratch: for a CPU, without downloads",
    ),
    "standard": Models(
        *("{}_R50", "{}_R18", "crosskd_{}_R18", 800, 5000),
        "ResNet-50 and ResNet-18 that start from ImageNet: for a GPU",
    ),
}


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Within it, connections that take longer fail; by default they wait as long as the system does."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@dataclass(frozen=True)
class OwnDistillation:
    """The settings of the whole way, and its steps.

    Attributes:
        train_data: data to train on, as ``--train-data`` of train_net.py takes them.
        val_data: data to evaluate on; by default those of the same folder, or a part of ``train_data``.
        val_split: the part of ``train_data`` to evaluate on, where there is no ``val_data``.
        detector: "retinanet", "gfl", "atss" or "fcos".
        models: key of :data:`MODELS`; "" for "standard" if there is a GPU, else "small".
        teacher_config: config of a teacher that is trained already; its anchors are kept.
        teacher_weights: its weights.
        start: weights that the models start from in place of those that the configs name, by "teacher" and "student".
        epochs: passes over the images; 0 for as many as make enough iterations.
        batch_size: images per iteration; 0 for the config's.
        image_size: shorter side in pixels; 0 for the images' own, up to a limit.
        seeds: number of students of each kind.
        output: folder of the results.
        plan_only: whether to stop before training.
    """

    train_data: str
    val_data: str = ""
    val_split: float = 0.2
    detector: str = "retinanet"
    models: str = ""
    teacher_config: str = ""
    teacher_weights: str = ""
    start: Dict[str, str] = field(default_factory=dict)
    epochs: int = 0
    batch_size: int = 0
    image_size: int = 0
    seeds: int = 1
    output: str = "output/own"
    plan_only: bool = False

    @property
    def folder(self) -> Path:
        """The folder of the results."""
        return Path(self.output).absolute()

    def run(self) -> None:
        """Does all steps that are not done yet.

        Raises:
            D2kdError: the data or settings cannot be used, or a run failed.
        """
        self._check()
        print("\n".join(self._plan_lines()), flush=True)
        self._check_plan()
        self._write_configs()
        runs = self._runs()
        if self.plan_only or not all(run.done for run in runs):
            print(f"\n{self._time_and_memory(runs)}\n", flush=True)
        if self.plan_only:
            return
        run_all(runs)
        self._report(runs)
        self._export(runs)

    def _check(self) -> None:
        check_choice("--detector", self.detector, ("retinanet", "gfl", "atss", "fcos"))
        check_choice("--models", self._models_name, MODELS)
        if bool(self.teacher_config) != bool(self.teacher_weights):
            raise D2kdError("--teacher-config and --teacher-weights go together; name both, or none to train a teacher")
        for name in ("epochs", "batch_size", "image_size"):
            if getattr(self, name) < 0:
                raise D2kdError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be above 0")
        if self.seeds < 1:
            raise D2kdError(f"--seeds is {self.seeds}; it must be 1 or more")
        self._data.register()
        sets = [*self._data.names[0], *self._data.names[1]]
        log_remarks(check_datasets(sets, None, evaluated=self._data.names[1]))
        for kind in ("student", *([] if self.teacher_weights else ["teacher"])):
            self._check_start(kind)

    def _check_start(self, kind: str) -> None:
        """Fetches the weights that a model starts from, so that a missing network shows now, and within seconds."""
        weights = self.start.get(kind) or self._config(kind).MODEL.WEIGHTS
        if not weights:
            return
        try:
            with patience(NETWORK_SECONDS), open(PathManager.get_local_path(weights), "rb"):
                pass
        except Exception as error:  # whatever the handler of the address raises
            raise D2kdError(
                f"the weights that the {kind} starts from cannot be fetched ({weights}: {error}); without a network, "
                f"name a local file with --{kind}-start, or use --models small, which starts from scratch"
            ) from error

    @property
    def _models_name(self) -> str:
        return self.models or ("standard" if torch.cuda.is_available() else "small")

    @property
    def _models(self) -> Models:
        return MODELS[self._models_name]

    @cached_property
    def _data(self) -> OwnData:
        """The data; those of a folder that has images to evaluate on are not divided."""
        split = 0.0 if self.val_data else self.val_split
        if split:
            whole = prepare_own_data([self.train_data], [], 0.0, self.folder / "data")
            if whole.val:
                return whole
        val = [self.val_data] if self.val_data else []
        return prepare_own_data([self.train_data], val, split, self.folder / "data")

    @property
    def _pair(self) -> Tuple[str, str]:
        """The data to train and to evaluate on, as COCO files that are there by now."""
        if not self._data.val:
            raise D2kdError("there is nothing to evaluate on; name --val-data, or a --val-split above 0")
        train, val = (f"{x.json_file}:{x.image_root}" for x in (self._data.train[0], self._data.val[0]))
        return train, val

    @cached_property
    def _images(self) -> Images:
        return read_sizes(self._data.train[0].json_file)

    def _config(self, kind: str) -> CfgNode:
        """The shipped config of a kind, or that of a given teacher."""
        if kind == "teacher" and self.teacher_config:
            return load_config(self.teacher_config, with_teacher=False)
        return load_config(self._models.config(kind, self.detector), with_teacher=False)

    @cached_property
    def _size(self) -> int:
        return self.image_size or image_size(self._images, self._models.image_size)

    @cached_property
    def _anchors(self) -> Anchors:
        boxes = self._images.boxes_at(self._size, 2 * self._size)
        return choose_anchors(self._config("teacher"), boxes, (1.0,) if self.teacher_config else FACTORS)

    @property
    def _batch(self) -> int:
        return min(self.batch_size or self._config("student").SOLVER.IMS_PER_BATCH, len(self._images.shorter))

    @property
    def _epoch(self) -> int:
        """Iterations of an epoch."""
        return math.ceil(len(self._images.shorter) / self._batch)

    @property
    def _num_epochs(self) -> int:
        return self.epochs or max(12, math.ceil(self._models.iterations / self._epoch))

    @property
    def _iterations(self) -> int:
        return self._num_epochs * self._epoch

    @cached_property
    def _settings(self) -> Dict[str, Any]:
        """What all models share, beside the anchors."""
        solver = self._config("student").SOLVER
        size, iterations = self._size, self._iterations
        return {
            "MODEL.DEVICE": "cuda" if torch.cuda.is_available() else "cpu",
            "INPUT.MIN_SIZE_TRAIN": [size],
            "INPUT.MIN_SIZE_TEST": size,
            "INPUT.MAX_SIZE_TRAIN": 2 * size,
            "INPUT.MAX_SIZE_TEST": 2 * size,
            "SOLVER.IMS_PER_BATCH": self._batch,
            "SOLVER.BASE_LR": solver.BASE_LR * self._batch / solver.IMS_PER_BATCH,
            "SOLVER.MAX_ITER": iterations,
            "SOLVER.STEPS": [iterations * 2 // 3, iterations * 8 // 9],
            "SOLVER.WARMUP_ITERS": min(solver.WARMUP_ITERS, iterations // 10),
            "SOLVER.CHECKPOINT_PERIOD": max(iterations // 10, 1),
        }

    def _plan_lines(self) -> List[str]:
        """What was chosen and from what."""
        data, boxes = self._data, self._images.boxes_at(self._size, 2 * self._size)
        sides = torch.tensor(boxes).prod(dim=1).sqrt().quantile(torch.tensor([0.05, 0.5, 0.95]).double()).tolist()
        evaluated = sum(len(read_sizes(x.json_file).shorter) for x in data.val)
        lines = {
            "data": f"{len(self._images.shorter)} images with {len(boxes)} boxes to train on, {evaluated} images to "
            f"evaluate on; {len(data.classes)} class{'es'[: 2 * (len(data.classes) > 1)]}: {', '.join(data.classes)}",
            "models": f"{self.detector}, {self._models_name}: {self._models.summary}",
            "image size": f"{self._size} (the shorter side; of the images: {self._images.shorter.min():.0f} to "
            f"{self._images.shorter.max():.0f})",
            "boxes": f"{sides[0]:.0f} to {sides[2]:.0f} pixels at this size, half of them below {sides[1]:.0f}"
            + (": very small; a larger --image-size may help" if sides[1] < 12 else ""),
        }
        if self._anchors.settings:
            lines["anchors"] = (
                f"{self._anchors.smallest:.0f} to {self._anchors.largest:.0f} pixels, alike in teacher and student; "
                f"{self._anchors.covered:.0%} of the boxes fit one (IoU 0.5), of the config's own "
                f"{self._anchors.covered_before:.0%}"
            )
        lines["training"] = (
            f"{self._num_epochs} epochs of {self._epoch} iterations = {self._iterations}, {self._batch} images each, "
            f"learning rate {self._settings['SOLVER.BASE_LR']:g} (the config's, by the linear rule)"
        )
        return [f"{name + ':':<12} {text}" for name, text in lines.items()]

    def _check_plan(self) -> None:
        """Raises D2kdError if the folder holds the results of other settings; otherwise writes them there."""
        file = self.folder / "plan.json"
        settings = {key: value for key, value in asdict(self).items() if key not in ("output", "plan_only", "seeds")}
        plan = {**settings, **self._settings, **self._anchors.settings, **self._data.identity()}
        plan = json.loads(json.dumps(plan))
        if file.exists():
            before = json.loads(file.read_text())
            changed = [f"{k} was {before.get(k)} and is {v}" for k, v in plan.items() if before.get(k) != v]
            if changed and any(self.folder.glob("*/run.json")):
                raise D2kdError(
                    f"{self.folder} holds results of other settings ({'; '.join(changed)}); choose another --output, "
                    "or delete it"
                )
        file.write_text(json.dumps(plan, indent=1) + "\n")

    def _file(self, kind: str) -> str:
        if kind == "teacher" and self.teacher_config:
            return find_config(self.teacher_config)
        return str(self.folder / f"{kind}.yaml")

    def _write_configs(self) -> None:
        """Writes configs for these data: of teacher, student and distilled student."""
        teacher = self.teacher_weights or str(self.folder / "teacher" / "model_final.pth")
        for kind in LABELS:
            if kind == "teacher" and self.teacher_config:
                continue
            settings = {**self._settings, **self._anchors.settings}
            node = detector_node(self._config("student"))
            settings[f"MODEL.{node}.NUM_CLASSES"] = len(self._data.classes)
            start = self.start.get("teacher" if kind == "teacher" else "student")
            if start:
                settings["MODEL.WEIGHTS"] = str(Path(start).absolute()) if Path(start).exists() else start
            if kind == "distilled":
                settings["MODEL.DISTILL.TEACHER.CONFIG_FILE"] = self._file("teacher")
                settings["MODEL.DISTILL.TEACHER.WEIGHTS"] = str(Path(teacher).absolute())
            settings["OUTPUT_DIR"] = str(self.folder / kind)
            write_config(self.folder / f"{kind}.yaml", self._models.config(kind, self.detector), settings)

    def _runs(self) -> List[Run]:
        """The runs that the series is made of."""
        kinds = [("teacher", 1)] if not self.teacher_weights else []
        kinds += [(kind, seed) for kind in ("student", "distilled") for seed in range(1, self.seeds + 1)]
        return [self._run(kind, seed) for kind, seed in kinds]

    def _run(self, kind: str, seed: int) -> Run:
        folder = self.folder / (kind if kind == "teacher" else f"{kind}_seed{seed}")
        return Run(
            *(LABELS[kind], self._file(kind), folder, seed, self._iterations, ""),
            own_data=self._pair,
            evaluations=EVALUATIONS,
        )

    def _time_and_memory(self, runs: Sequence[Run]) -> str:
        """Measures a few steps and estimates what all runs that are not done take."""
        print("\nmeasuring a few training steps ...", flush=True)
        files = [self._file("student"), self._file("teacher")]
        student, teacher = measure(files, ["--train-data", self._pair[0], "--val-data", self._pair[1]])
        steps = {
            LABELS["teacher"]: teacher.step,
            LABELS["student"]: student.step,
            LABELS["distilled"]: student.step + self._batch * teacher.forward,
        }
        lines, total = [], 0.0
        left = [run for run in runs if not run.done]
        for label in dict.fromkeys(run.label for run in left):
            same = [run for run in left if run.label == label]
            iterations = sum(self._iterations - run.progress()[0] for run in same)
            seconds = iterations * steps[label] + len(same) * self._evaluating(teacher, student, label)
            total += seconds
            lines.append(f"{label:<20} {steps[label]:.2f} s per iteration, about {duration(seconds)}")
        memory = f"{max(student.memory, teacher.memory) / 1000:.1f} GB"
        return "\n".join([*lines, f"{'all that is left':<20} about {duration(total)}, with {memory} of memory"])

    def _evaluating(self, teacher: Measured, student: Measured, label: str) -> float:
        images = sum(len(read_sizes(x.json_file).shorter) for x in self._data.val)
        forward = (teacher if label == LABELS["teacher"] else student).forward
        return STARTING + EVALUATIONS * images * forward

    def _report(self, runs: Sequence[Run]) -> None:
        """Writes the table, the pictures and the page with everything."""
        text = table(runs, costs_of(runs, self.folder))
        print(f"\n{text}\n")
        (self.folder / "table.md").write_text(text + "\n")
        first = {run.label: run for run in reversed(runs)}
        first = {label: first[label] for label in LABELS.values() if label in first}
        draw_curves({label: run.folder for label, run in first.items()}, self.folder / "curves.png")
        shown = self._data.val[0]
        results = Path("inference") / shown.name / "coco_instances_results.json"
        found = {label: run.folder / results for label, run in first.items()}
        draw_grid(Path(shown.json_file), Path(shown.image_root), found, self.folder / "detections.png")
        for name in ("table.md", "curves.png", "detections.png"):
            print(f"wrote {self.folder / name}")
        pages = [(run.label, run.folder) for run in runs]
        title = f"Distillation on {self.train_data}"
        print(f"wrote {write_report(pages, self.folder / 'report.html', title)}")

    def _export(self, runs: Sequence[Run]) -> None:
        """Exports the first distilled student; ONNX too where its packages are installed."""
        run = next(run for run in runs if run.label == LABELS["distilled"])
        has_onnx = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime"))
        folder = self.folder / "export"
        if not (folder / "export.json").exists():
            command = [sys.executable, str(ROOT / "tools" / "export.py"), "--config-file", self._file("student")]
            command += ["--weights", str(run.checkpoint), "--output", str(folder)]
            command += ["--format", "both" if has_onnx else "torchscript", "--label", run.label]
            if subprocess.run(command, cwd=ROOT).returncode:
                print("not exported; everything else is done", file=sys.stderr)
        print(f"\nthe distilled student, a plain detector: {run.checkpoint}\nevaluate it again:")
        print(
            f"  python train_net.py --config-file {self._file('student')} --eval-only --val-data {self._pair[1]} "
            f"MODEL.WEIGHTS {run.checkpoint}"
        )
