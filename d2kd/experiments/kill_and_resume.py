"""Kills a training run again and again, resumes it, and compares its end with an unbroken run's, bit for bit."""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Iterator, List

import torch

from ..checkpoint import files
from ..checkpoint.run_checkpoints import checkpoints_in
from ..data import write_blood_cells
from .series import ROOT

LOG = "Starting training from iteration"
TIMEOUT = 300.0


class Runs:
    """Starts train_net.py on a set of drawn images.

    Args:
        folder: where everything lies.
        args: of the command line.
    """

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder = folder
        self.processes = args.num_gpus
        self.environment = {**os.environ, "DETECTRON2_DATASETS": str(folder / "data")}
        self.environment.setdefault("OMP_NUM_THREADS", "1")
        for split, count in (("train", 24), ("val", 4)):
            write_blood_cells(folder / "data" / "blood_cells", split, num_images=count, seed=1)
        self.options = ["SEED", "1", "SOLVER.MAX_ITER", str(args.iterations), "DATASETS.TEST", "()"]
        self.options += ["SOLVER.CHECKPOINT_PERIOD", str(args.period), "INPUT.CROP.ENABLED", "True"]
        self.options += ["SOLVER.EMA_DECAY", "0.9", "DATALOADER.NUM_WORKERS", str(args.workers)]

    def start(self, name: str, config: str, *options: str) -> subprocess.Popen:
        """Starts or resumes a run in its own folder and process group; its output goes to <name>.log."""
        command = [sys.executable, "train_net.py", "--config-file", f"configs/{config}.yaml", "--resume"]
        command += ["--num-gpus", str(self.processes), "--dist-url", "auto", *self.options]
        with open(self.log(name), "a") as log:
            return subprocess.Popen(
                [*command, *options, "OUTPUT_DIR", str(self.folder / name)],
                cwd=ROOT,
                env=self.environment,
                start_new_session=True,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def start_student(self, name: str) -> subprocess.Popen:
        teacher = str(self.folder / "teacher" / "model_final.pth")
        return self.start(name, "quick_crosskd_retinanet", "MODEL.DISTILL.TEACHER.WEIGHTS", teacher)

    def finish(self, name: str, process: subprocess.Popen) -> None:
        """Waits for the end of a run.

        Raises:
            SystemExit: it failed.
        """
        if process.wait() != 0:
            sys.exit(f"{name} failed:\n" + self.log(name).read_text()[-3000:])

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def starts(self, name: str) -> int:
        """How often the run has begun to train."""
        log = self.log(name)
        return log.read_text().count(LOG) if log.exists() else 0


def kill_at_random(runs: Runs, name: str, longest: float, rng: random.Random) -> bool:
    """Starts or resumes a run and kills it at a random moment after it began to train.

    That is up to ``longest`` seconds after its start, or after its first, second or third new checkpoint.

    Returns:
        Whether it was killed; it may have ended before.
    """
    folder = str(runs.folder / name)
    starts = runs.starts(name) + 1
    checkpoints = len(checkpoints_in(folder)) + rng.randrange(4)
    process = runs.start_student(name)
    deadline = time.monotonic() + TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        if runs.starts(name) >= starts and len(checkpoints_in(folder)) >= checkpoints:
            break
        time.sleep(0.01)
    try:
        process.wait(rng.uniform(0.0, longest))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
    runs.finish(name, process)
    return False


def differences(one: Any, two: Any, where: str = "") -> Iterator[str]:
    """Where two checkpoints differ in any bit."""
    if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        for key in one:
            yield from differences(one[key], two[key], f"{where}/{key}")
    elif isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)) and len(one) == len(two):
        for i, pair in enumerate(zip(one, two)):
            yield from differences(*pair, f"{where}/{i}")
    elif isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        if not torch.equal(one, two):
            yield where
    elif one != two:
        yield where


def compare(folder: Path) -> List[str]:
    """Where the last checkpoints of both runs differ."""
    found = []
    for name in ("model_final.pth", "model_ema_final.pth"):
        one, two = (files.read(str(folder / run / name)) for run in ("unbroken", "killed"))
        found += [f"{name}{where}" for where in differences(one, two)]
    return found


def kill_and_resume(folder: Path, args: argparse.Namespace) -> int:
    """Runs everything; returns the exit status."""
    runs = Runs(folder, args)
    runs.finish("teacher", runs.start("teacher", "quick_retinanet", "SOLVER.MAX_ITER", "10"))
    started = time.monotonic()
    runs.finish("unbroken", runs.start_student("unbroken"))
    print(f"unbroken run: {args.iterations} iterations, {time.monotonic() - started:.0f} s", flush=True)
    rng, kills = random.Random(args.seed), 0
    while kills < args.kills and kill_at_random(runs, "killed", args.longest, rng):
        kills += 1
        pointer = folder / "killed" / "last_checkpoint"
        last = pointer.read_text() if pointer.exists() else "no checkpoint"
        print(f"killed {kills} of {args.kills}: {last}", flush=True)
    if kills < args.kills:
        print(f"the run ended after {kills} kills; raise --iterations or lower --longest")
        return 2
    runs.finish("killed", runs.start_student("killed"))
    found = compare(folder)
    print(f"after {kills} kills: " + ("the same, bit for bit" if not found else f"different: {', '.join(found[:5])}"))
    return 1 if found else 0
