#!/usr/bin/env python3
"""Times the parts of a distilled training step, with random weights and random images.

`floor` is the minimum cost of a step: the plain student's step, the teacher's forward, and for methods that cross heads
the cross head's forward and backward. `ratio` is the distilled step divided by it.
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
        names = cfg.MODEL.DISTILL.METHODS
        options = ["MODEL.DEVICE", args.device, "MODEL.WEIGHTS", ""]
        teacher_opts = [*cfg.MODEL.DISTILL.TEACHER.OPTS, *options]
        teacher_cfg = load_config(cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE, teacher_opts, with_teacher=False)
        cfg.merge_from_list(options)
        drop_teacher(cfg)
        student = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
        parts = student.from_config(cfg)
        parts["teacher"] = Teacher(build_model(teacher_cfg), teacher_cfg.INPUT.FORMAT)
        parts["methods"] = [
            build_method(name, **{k.lower(): v for k, v in cfg.MODEL.DISTILL[name.upper()].items()}) for name in names
        ]
        self.model = student(**parts).to(args.device).train()
        self.batch = random_batch(args, self.model.num_classes)

    def median(self, function: Callable[[], Any]) -> float:
        """Median time of a call in milliseconds, after a first one to warm up."""
        times = []
        for _ in range(self.args.repeats + 1):
            self.synchronize()
            start = time.perf_counter()
            function()
            self.synchronize()
            times.append(1000 * (time.perf_counter() - start))
        return statistics.median(times[1:])

    def synchronize(self) -> None:
        import torch

        if self.args.device == "cuda":
            torch.cuda.synchronize()

    def autocast(self) -> Any:
        import torch

        kind = {"fp32": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16}[self.args.precision]
        return torch.autocast(self.args.device, kind, enabled=self.args.precision != "fp32")

    def step(self) -> None:
        """Forward and backward of the whole model."""
        self.model.zero_grad()
        with self.autocast():
            losses = self.model(self.batch)
        sum(losses.values()).backward()

    def plain_step(self) -> None:
        """The same without teacher and methods."""
        from torch import nn

        kept, self.model.distill = self.model.distill, nn.ModuleDict()
        try:
            self.step()
        finally:
            self.model.distill = kept

    def run(self) -> dict[str, float]:
        """Times every part: milliseconds, the ratio, and MiB of memory."""
        import torch

        from d2kd.dense import DenseOutputs
        from d2kd.methods import CrossKD

        model = self.model
        result = {"plain student step": self.median(self.plain_step)}

        def teach() -> None:
            with self.autocast():
                model.run_teacher(self.batch)

        result["teacher forward"] = self.median(teach)
        with self.autocast():
            observation = model.observe(self.batch)
        student, theirs, targets = observation.student, observation.teacher, observation.targets
        anchors = student.anchors_per_level
        result["assignment"] = self.median(lambda: model.label_anchors(anchors, targets.instances))
        floor = result["plain student step"] + result["teacher forward"]
        for method in model.methods:
            name = type(method).__name__
            if isinstance(method, CrossKD):
                result["cross head forward"] = self.median(lambda method=method: self.cross(method, student, theirs))
                both = self.median(lambda method=method: self.cross(method, student, theirs, backward=True))
                result["cross head forward and backward"] = both
                floor += both

            def losses(method: Any = method) -> None:
                fresh = [DenseOutputs(o.detector, o.features, o.predictions, o.taps) for o in (student, theirs)]
                with self.autocast():
                    method(*fresh, targets)

            result[f"{name} losses, forward"] = self.median(losses)
            result[f"{name} losses, kept for the backward (MiB)"] = kept_memory(losses)
        if self.args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        result["distilled step"] = self.median(self.step)
        result["floor"] = floor
        result["ratio"] = result["distilled step"] / floor
        result["peak memory (MiB)"] = self.peak_memory()
        return result

    def cross(self, method: CrossKD, student: DenseOutputs, teacher: DenseOutputs, backward: bool = False) -> None:
        import torch

        with self.autocast():
            crossed = method.cross(student, teacher)
        if backward:
            leaves = [f for tower in student.towers(method.cut) for f in tower]
            total = sum(level.float().sum() for output in crossed.predictions for level in output)
            torch.autograd.grad(total, leaves)

    def peak_memory(self) -> float:
        """Peak memory in MiB: of the distilled step on CUDA, of the whole process on the CPU."""
        import torch

        if self.args.device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def kept_memory(function: Callable[[], Any]) -> float:
    """MiB of distinct storages that autograd keeps for the backward of a call, including inputs and parameters."""
    import torch

    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
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
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is a GPU")
    parser.add_argument(
        "--precision", default="fp32", choices=["fp32", "bf16", "fp16"], help="fp32 is without autocast"
    )
    parser.add_argument("--repeats", type=int, default=5, help="number of timed runs (default: 5)")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers to this file")
    parser.add_argument("opts", nargs="*", default=[], help="config overrides KEY VALUE ..., after --")
    args = parser.parse_args()
    from d2kd.errors import exit_status
    from d2kd.quiet import quiet_known_warnings

    quiet_known_warnings()
    return exit_status(lambda: benchmark(args))


def benchmark(args: argparse.Namespace) -> None:
    """Times the parts, prints a table and writes the numbers if asked to."""
    import torch
    from detectron2.utils.events import EventStorage
    from tabulate import tabulate

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with EventStorage():
        result = Benchmark(args).run()
    rows = [[name, f"{value:.2f}" if name == "ratio" else f"{value:.0f}"] for name, value in result.items()]
    print(tabulate(rows, headers=["part", "ms (median)"], tablefmt="github", disable_numparse=True))
    if args.json:
        Path(args.json).write_text(json.dumps({"settings": vars(args), "result": result}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
