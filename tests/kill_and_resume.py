"""Kills a training run again and again with SIGKILL, resumes it, and compares its end with an unbroken run's.

Run it by hand: ``python tests/kill_and_resume.py --kills 30 --parent-kills 10 --num-gpus 2``. The run distills with
EMA and in mixed precision. It is killed up to --longest seconds after it began to train, or after its first, second or
third new checkpoint: all of its processes, or only the one that started the others, which must then end on their own.
Both runs must end with the same model, optimizer, schedule and running state, bit for bit. Everything is tiny and lies
in a temporary folder: a teacher of a few iterations, and drawn images.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Iterator, List

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from forked import start  # noqa: E402

from d2kd.checkpoint import files  # noqa: E402
from d2kd.checkpoint.run_checkpoints import checkpoints_in  # noqa: E402
from d2kd.data import write_blood_cells  # noqa: E402

LOG = "Starting training from iteration"
# Seconds in which processes end whose parent was killed.
ALONE = 30.0
TIMEOUT = 900.0


def ends(group: int) -> bool:
    """Whether all processes of a group end in time."""
    deadline = time.monotonic() + ALONE
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


class Runs:
    """Starts train_net.py on a set of drawn images.

    Args:
        folder: where everything lies.
        args: of the command line.
    """

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder = folder
        self.processes = args.num_gpus
        # Before the first process starts: they see the environment of that time.
        os.environ.update(DETECTRON2_DATASETS=str(folder / "data"), PYTHONPATH=str(ROOT))
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        for split, count in (("train", 24), ("val", 4)):
            write_blood_cells(folder / "data" / "blood_cells", split, num_images=count, seed=1)
        self.options = ["SEED", "1", "SOLVER.MAX_ITER", str(args.iterations), "DATASETS.TEST", "()"]
        self.options += ["SOLVER.CHECKPOINT_PERIOD", str(args.period), "INPUT.CROP.ENABLED", "True"]
        self.options += ["SOLVER.EMA_DECAY", "0.9", "DATALOADER.NUM_WORKERS", str(args.workers)]
        self.options += ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "bfloat16", *args.opts]

    def start(self, name: str, config: str, *options: str) -> BaseProcess:
        """Starts or resumes a run in its own folder and process group; its output goes to <name>.log."""
        command = ["--config-file", str(ROOT / "configs" / f"{config}.yaml"), "--resume"]
        command += ["--num-gpus", str(self.processes), *self.options, *options]
        return start([*command, "OUTPUT_DIR", str(self.folder / name)], self.log(name))

    def start_student(self, name: str) -> BaseProcess:
        teacher = str(self.folder / "teacher" / "model_final.pth")
        return self.start(name, "quick_crosskd_retinanet", "MODEL.DISTILL.TEACHER.WEIGHTS", teacher)

    def finish(self, name: str, process: BaseProcess) -> None:
        """Waits for the end of a run.

        Raises:
            SystemExit: it failed.
        """
        process.join()
        if process.exitcode != 0:
            sys.exit(f"{name} failed:\n" + self.log(name).read_text()[-3000:])

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def starts(self, name: str) -> int:
        """How often the run has begun to train."""
        log = self.log(name)
        return log.read_text().count(LOG) if log.exists() else 0


def kill_at_random(runs: Runs, name: str, longest: float, rng: random.Random, parent_only: bool) -> bool:
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
    while process.is_alive() and time.monotonic() < deadline:
        if runs.starts(name) >= starts and len(checkpoints_in(folder)) >= checkpoints:
            break
        time.sleep(0.01)
    process.join(rng.uniform(0.0, longest))
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL) if parent_only else os.killpg(process.pid, signal.SIGKILL)
        process.join()
        if not ends(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
            sys.exit(f"processes are left {ALONE:.0f} s after their parent was killed")
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
    rng = random.Random(args.seed)
    plan = [False] * args.kills + [True] * args.parent_kills
    rng.shuffle(plan)
    for number, parent_only in enumerate(plan, start=1):
        if not kill_at_random(runs, "killed", args.longest, rng, parent_only):
            print(f"the run ended after {number - 1} kills; raise --iterations or lower --longest")
            return 2
        pointer = folder / "killed" / "last_checkpoint"
        last = pointer.read_text() if pointer.exists() else "no checkpoint"
        print(f"killed {number} of {len(plan)}{', the parent alone' * parent_only}: {last}", flush=True)
    runs.finish("killed", runs.start_student("killed"))
    found = compare(folder)
    print(
        f"after {len(plan)} kills: " + ("the same, bit for bit" if not found else f"different: {', '.join(found[:5])}")
    )
    return 1 if found else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how often to kill all processes (default 20)")
    parser.add_argument("--parent-kills", type=int, default=0, help="how often to kill the parent alone (default 0)")
    parser.add_argument("--iterations", type=int, default=200, help="of the run (default 200)")
    parser.add_argument("--period", type=int, default=3, help="iterations between checkpoints (default 3)")
    parser.add_argument("--longest", type=float, default=1.0, help="see above, in seconds (default 1)")
    parser.add_argument("--workers", type=int, default=0, help="data loading processes (default 0)")
    parser.add_argument("--num-gpus", type=int, default=1, help="training processes, GPUs if there are any (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills (default 0)")
    parser.add_argument("opts", nargs="*", help="overrides of the student's config, KEY value")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill_and_resume_") as folder:
        return kill_and_resume(Path(folder), args)


if __name__ == "__main__":
    sys.exit(main())
