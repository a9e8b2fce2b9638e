#!/usr/bin/env python3
"""Times the parts of a distilled training step, with random weights and random images.

Times are medians, in milliseconds; on the CPU they are those of the process (CPU time) with one thread unless --threads
says otherwise, so that other work on the machine matters less. The plain and the distilled step are timed in turns.

`floor` is the minimum cost of a step: the plain student's step, the teacher's forward, and for methods that cross heads
the cross head's forward and backward. `step / floor` is the distilled step divided by it, `distilled / plain` the same
divided by the plain student's.

With random weights some gradients are denormal numbers, which a CPU multiplies slowly: they are flushed to zero.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

# The functions import torch and d2kd, which takes seconds: --help does not need them.
if TYPE_CHECKING:
    import torch

    from d2kd.dense import DenseOutputs
    from d2kd.methods import CrossKD

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "crosskd_retinanet_R18.yaml"
FRACTIONS = ("distilled / plain", "step / floor", "images per second")
GROWING = ("plain student step", "distilled step", "distilled / plain", "step / floor", "kept for distilling (MiB)")


class Benchmark:
    """A student with its teacher, a batch, and timers."""

    def __init__(self, args: argparse.Namespace) -> None:
        from detectron2.modeling import META_ARCH_REGISTRY, build_model

        from d2kd.config import drop_teacher, load_config
        from d2kd.methods import build_method
        from d2kd.teacher import Teacher

        self.args = args
        chosen = ["MODEL.DISTILL.METHODS", tuple(args.methods)] if args.methods else []
        cfg = load_config(args.config_file, [*chosen, *args.opts])
        kind = cfg.MODEL.META_ARCHITECTURE.removeprefix("Distill").upper()
        classes = [f"MODEL.{kind}.NUM_CLASSES", args.classes] if args.classes else []
        names = cfg.MODEL.DISTILL.METHODS
        options = ["MODEL.DEVICE", args.device, "MODEL.WEIGHTS", ""]
        theirs = cfg.MODEL.DISTILL.TEACHER
        teacher_opts = [*theirs.OPTS, *options, *classes]
        teacher_cfg = load_config(theirs.CONFIG_FILE, teacher_opts, with_teacher=False)
        cfg.merge_from_list([*options, *classes])
        drop_teacher(cfg)
        student = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
        parts = student.from_config(cfg)
        parts["teacher"] = Teacher(build_model(teacher_cfg), teacher_cfg.INPUT.FORMAT, **engine(theirs))
        parts["methods"] = [
            build_method(name, **{k.lower(): v for k, v in cfg.MODEL.DISTILL[name.upper()].items()}) for name in names
        ]
        self.model = student(**parts).to(args.device).train()
        self.batch = random_batch(args, self.model.num_classes)

    def timed(self, function: Callable[[], Any]) -> float:
        """Time of a call in milliseconds."""
        clock = time.perf_counter if self.args.device == "cuda" else time.process_time
        self.synchronize()
        start = clock()
        function()
        self.synchronize()
        return 1000 * (clock() - start)

    def medians(self, *functions: Callable[[], Any]) -> list[float]:
        """Median time of each of several calls in milliseconds, in turns, after a first one to warm up."""
        rounds = [[self.timed(function) for function in functions] for _ in range(self.args.repeats + 1)]
        return [statistics.median(times) for times in zip(*rounds[1:])]

    def synchronize(self) -> None:
        import torch

        if self.args.device == "cuda":
            torch.cuda.synchronize()

    def autocast(self) -> Any:
        import torch

        kind = {"fp32": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16}[self.args.precision]
        return torch.autocast(self.args.device, kind, enabled=self.args.precision != "fp32")

    def losses(self) -> torch.Tensor:
        """Sum of the losses of the whole model."""
        self.model.zero_grad()
        with self.autocast():
            losses = self.model(self.batch)
        return sum(losses.values())

    def step(self) -> None:
        """Forward and backward of the whole model."""
        self.losses().backward()

    def plain(self, function: Callable[[], Any]) -> Any:
        """Calls a function while the model has neither teacher nor methods."""
        from torch import nn

        kept, self.model.distill = self.model.distill, nn.ModuleDict()
        try:
            return function()
        finally:
            self.model.distill = kept

    def run(self) -> dict[str, float]:
        """Measures every part: milliseconds, fractions, and MiB of memory."""
        plain, distilled = self.medians(lambda: self.plain(self.step), self.step)
        result = {"plain student step": plain, "distilled step": distilled, "distilled / plain": distilled / plain}
        result["images per second"] = 1000 * self.args.batch / distilled
        floor = plain + self.run_parts(result)
        result["floor"] = floor
        result["step / floor"] = distilled / floor
        own, whole = (kept_memory(function) for function in (lambda: self.plain(self.losses), self.losses))
        result["kept by the plain step (MiB)"] = own
        result["kept for distilling (MiB)"] = whole - own
        result["peak of the plain step (MiB)"] = self.peak_memory(lambda: self.plain(self.step))
        result["peak of the distilled step (MiB)"] = self.peak_memory(self.step)
        return result

    def run_parts(self, result: dict[str, float]) -> float:
        """Adds what teacher, assignment and methods take, time and memory; returns what belongs to the floor."""
        from d2kd.dense import DenseOutputs
        from d2kd.methods import CrossKD

        model = self.model

        def teach() -> None:
            with self.autocast():
                model.run_teacher(self.batch)

        least = self.measure(result, "teacher forward", teach)
        with self.autocast():
            observation = model.observe(self.batch)
        student, theirs, targets = observation.student, observation.teacher, observation.targets
        anchors = student.anchors_per_level
        self.measure(result, "assignment", lambda: model.label_anchors(anchors, targets.instances))
        for method in model.methods:
            name = type(method).__name__
            if isinstance(method, CrossKD):
                cross = "cross head forward and backward"
                least += self.measure(result, cross, lambda method=method: self.cross(method, student, theirs))

            def losses(method: Any = method) -> torch.Tensor:
                fresh = [DenseOutputs(o.detector, o.features, o.predictions, o.taps) for o in (student, theirs)]
                with self.autocast():
                    return sum(method(*fresh, targets).values())

            self.measure(result, f"{name} losses, forward", losses)
            result[f"{name} losses, kept for the backward (MiB)"] = kept_memory(losses)
        return least

    def measure(self, result: dict[str, float], part: str, function: Callable[[], Any]) -> float:
        """Adds the time and the peak memory of a part; returns the time."""
        (result[part],) = self.medians(function)
        result[f"peak of {part} (MiB)"] = self.peak_memory(function)
        return result[part]

    def cross(self, method: CrossKD, student: DenseOutputs, teacher: DenseOutputs) -> None:
        import torch

        with self.autocast():
            crossed = method.cross(student, teacher)
        leaves = [f for tower in student.towers(method.cut) for f in tower]
        total = sum(level.float().sum() for output in crossed.predictions for level in output)
        torch.autograd.grad(total, leaves)

    def peak_memory(self, function: Callable[[], Any]) -> float:
        """Peak memory of a call in MiB: on CUDA that of its tensors, on the CPU the whole process's."""
        import torch

        if self.args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            function()
            return torch.cuda.max_memory_allocated() / 2**20
        status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
        if not reset.exists():  # not Linux: the peak since the process was started
            function()
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        reset.write_text("5")  # forgets the peak
        function()
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10


def engine(theirs: Any) -> dict[str, Any]:
    """How a config's teacher runs."""
    from d2kd.inference_copy import Engine

    return {"engine": Engine(theirs.DTYPE, theirs.FOLD_NORMS)}


def kept_memory(function: Callable[[], Any]) -> float:
    """MiB of distinct storages that autograd keeps for the backward of a call, including inputs and parameters."""
    import torch

    kept: dict[int, int] = {}
    alive = []  # so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive.append(function())
    return sum(kept.values()) / 2**20


def random_batch(args: argparse.Namespace, num_classes: int) -> list[dict[str, Any]]:
    """Random images with boxes of all sizes."""
    import torch
    from detectron2.structures import Boxes, Instances

    generator = torch.Generator().manual_seed(0)
    height, width = args.size
    batch = []
    for _ in range(args.batch):
        corners = torch.rand(args.boxes, 2, 2, generator=generator).sort(dim=1).values
        boxes = (corners * torch.tensor([width - 16.0, height - 16.0])).flatten(1)
        boxes[:, 2:] += 16
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.randint(num_classes, (args.boxes,), generator=generator)
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances})
    return batch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config-file", default=str(CONFIG), help="a distilling YAML (default: RetinaNet R18 from R50)"
    )
    parser.add_argument("--methods", nargs="*", help="default: those of the config")
    parser.add_argument("--size", nargs=2, type=int, default=(800, 1333), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=2, help="number of images (default: 2)")
    parser.add_argument("--boxes", type=int, default=20, help="ground-truth boxes per image (default: 20)")
    parser.add_argument("--classes", type=int, default=0, help="number of classes (default: the config's)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is a GPU")
    parser.add_argument(
        "--precision", default="fp32", choices=["fp32", "bf16", "fp16"], help="fp32 is without autocast"
    )
    parser.add_argument("--repeats", type=int, default=5, help="number of timed runs (default: 5)")
    parser.add_argument("--threads", type=int, default=1, help="threads on the CPU (default: 1)")
    parser.add_argument(
        "--growth",
        nargs="+",
        metavar="OPTION=N",
        help="measure again for each, such as classes=365 classes=1203 boxes=300, and show how the step grows",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the numbers to this file")
    parser.add_argument("--compare", metavar="FILE", help="show beside them the numbers that --json wrote before")
    parser.add_argument("opts", nargs="*", default=[], help="config overrides KEY VALUE ..., after --")
    args = parser.parse_args()
    from d2kd.errors import exit_status
    from d2kd.quiet import quiet_known_warnings

    quiet_known_warnings()
    return exit_status(lambda: benchmark(args))


def benchmark(args: argparse.Namespace) -> None:
    """Measures, prints tables and writes the numbers if asked to."""
    import torch
    from detectron2.utils.events import EventStorage

    before = read(args.compare) if args.compare else {}
    changes = [change(text) for text in args.growth or []]
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    with EventStorage():
        result = Benchmark(args).run()
        grown = {
            f"{name} {value}": Benchmark(argparse.Namespace(**{**vars(args), name: value})).run()
            for name, value in changes
        }
    print_table(result, before)
    if grown:
        print()
        print_growth({"as above": result, **grown})
    if args.json:
        content = {"settings": vars(args), "result": result, "growth": grown}
        Path(args.json).write_text(json.dumps(content, indent=1) + "\n")


def read(path: str) -> dict[str, float]:
    """The numbers of an earlier benchmark."""
    from d2kd.errors import D2kdError

    try:
        return dict(json.loads(Path(path).read_text())["result"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise D2kdError(
            f"--compare {path} is no file that --json wrote ({error}); run the benchmark with --json"
        ) from error


def change(text: str) -> tuple[str, int]:
    """A name and its value from "classes=365"."""
    from d2kd.errors import D2kdError

    name, _, value = text.partition("=")
    if name not in ("classes", "boxes", "batch") or not value.isdigit():
        raise D2kdError(f"--growth {text}: write classes=N, boxes=N or batch=N")
    return name, int(value)


def print_table(result: dict[str, float], before: dict[str, float]) -> None:
    """Prints numbers, and beside them those from before and by how much they have changed."""
    from tabulate import tabulate

    rows = [[name, written(name, value)] for name, value in result.items()]
    headers = ["part", "ms (median)"]
    if before:
        headers += ["before", "change"]
        for row, (name, value) in zip(rows, result.items()):
            old = before.get(name)
            row += ["", ""] if not old else [written(name, old), f"{100 * (value / old - 1):+.0f} %"]
    print(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))


def print_growth(results: dict[str, dict[str, float]]) -> None:
    """Prints how the most important numbers grow."""
    from tabulate import tabulate

    rows = [[label, *(written(name, result[name]) for name in GROWING)] for label, result in results.items()]
    print(tabulate(rows, headers=["", *GROWING], tablefmt="github", disable_numparse=True))


def written(name: str, value: float) -> str:
    """A number as it is shown."""
    return f"{value:.2f}" if name in FRACTIONS else f"{value:.0f}"


if __name__ == "__main__":
    sys.exit(main())
