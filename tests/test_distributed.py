"""Several processes: the same as one, no communication for the teacher, and what happens when one of them dies."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from typing import Any, Dict, NamedTuple, Sequence

import pytest
import torch
from detectron2.engine import HookBase, SimpleTrainer
from messages import rows_of
from runs import made_once
from small import CONFIGS, batch, build, distill_config, save_teacher, step
from torch import distributed
from torch.multiprocessing import spawn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from d2kd.checkpoint import files
from d2kd.checkpoint.run_checkpoints import checkpoints_in
from d2kd.engine import launch
from d2kd.engine.accumulate import accumulate, normalizers_of
from d2kd.engine.devices import wrap_ddp
from d2kd.engine.hooks import Reproducible
from d2kd.engine.precision import Autocast
from d2kd.methods import method_defaults, method_names

ROOT = CONFIGS.parent
STEPS, RATE, SEED = 2, 3e-4, 3
# Of 2 processes and of 3, the last has images without ground truth only.
BOXES = (2, 3, 2, 0, 0, 0)
DETECTORS = ("GFL", "RetinaNet", "FCOS", "ATSS")
WIDER = ("MODEL.FPN.OUT_CHANNELS", "64")
EXP = ("MODEL.FCOS.BOX_EXP", "True")


class Case(NamedTuple):
    """A student and its method."""

    detector: str
    method: str
    options: Dict[str, Any] = {}
    opts: Sequence[str] = ()
    teacher_opts: Sequence[str] = ()
    boxes: Sequence[int] = BOXES


# What is the same for any number of processes only with these options; SYNC is set where a method has it.
INDEPENDENT = {
    "LD": {"per_image": True, "vlr_weight": 0.5, "cls_weight": 10.0},
    "MGD": {"mask_ratio": 0.0, "weight": 1e-3},  # each process draws masks of its own
}
CASES = {f"{name} on GFL": Case("GFL", name, INDEPENDENT.get(name, {})) for name in method_names()}
CASES.update({f"CrossKD on {name}": Case(name, "CrossKD") for name in DETECTORS})
PUBLISHED = Case("FCOS", "CrossKD", {"normalizer": "centerness"}, (*EXP, "MODEL.FCOS.LOSS_NORMALIZER", "batch"), EXP)
CASES["CrossKD on FCOS as published"] = PUBLISHED
# Without positive anchors the losses are divided by 1.
FAINT = {**PUBLISHED.options, "cls_weight": 1e-3, "box_weight": 1e-3}
CASES["no ground truth at all"] = PUBLISHED._replace(options=FAINT, boxes=(0,) * len(BOXES))
CASES["FitNet, background"] = Case("GFL", "FitNet", {"region": "boxes", "background_weight": 1.0})
CASES["FitNet, finegrained, adapters"] = Case("GFL", "FitNet", {"region": "finegrained"}, teacher_opts=WIDER)
CASES["FitNet, gibox"] = Case("GFL", "FitNet", {"region": "gibox"})
CASES["CrossKD, adapters"] = Case("GFL", "CrossKD", teacher_opts=(*WIDER, "MODEL.GFL.NUM_CONVS", "3"))
ADAPTED, RECOMPUTED = "CrossKD, adapters", "CrossKD, adapters, recomputed"
CASES[RECOMPUTED] = CASES[ADAPTED]._replace(opts=("MODEL.DISTILL.RECOMPUTE", "True"))
CASES["fast losses"] = Case("RetinaNet", "CrossKD", opts=("MODEL.DISTILL.FAST_LOSSES", "True"))
# With micro-batches: each kind of average, of normalizer and of random number.
ACCUMULATED = {
    "plain RetinaNet": Case("RetinaNet", ""),
    "RetinaNet": Case("RetinaNet", "CrossKD"),
    "RetinaNet, synced": Case("RetinaNet", "ResponseKD"),
    "GFL": Case("GFL", "CrossKD", teacher_opts=WIDER),
    "FCOS": Case("FCOS", "CrossKD"),
    "FCOS as published": PUBLISHED,
    "MGD": Case("GFL", "MGD", {"weight": 1e-3}),
    "LD": CASES["LD on GFL"],
}
# As 2 workers, which are 2 processes or 2 micro-batches of one; and as 6 workers.
ACCUMULATED_RUNS = [(2, name) for name in ACCUMULATED] + [(6, "RetinaNet"), (6, "GFL")]
# All-reduces of one number that methods without adapters add to a step of GFL: N+; and the sum of confidences by which
# distributions of boxes are divided.
REDUCED = {"CWD": 1, "FitNet": 1, "LD": 1, "PKD": 1, "CrossKD": 2, "ResponseKD": 2}


def teacher_path(folder, case):
    return folder / f"{case.detector}{len(case.teacher_opts)}.pth"


def teacher_options(case):
    return ["MODEL.META_ARCHITECTURE", case.detector, *case.teacher_opts]


def options_of(method):
    return method_defaults(method) if method else {}


def student(folder, case, methods, synced):
    """A new student with a teacher of its own kind."""
    options = {**case.options, **({"sync": True} if synced and "sync" in options_of(case.method) else {})}
    opts = [x for key, value in options.items() for x in (f"MODEL.DISTILL.{case.method.upper()}.{key.upper()}", value)]
    opts += ["MODEL.META_ARCHITECTURE", f"Distill{case.detector}", "MODEL.DISTILL.SYNC_NORMALIZER", synced, *case.opts]
    return build(distill_config(teacher_path(folder, case), *opts, methods=methods, teacher_opts=teacher_options(case)))


class Sent(TorchDispatchMode):
    """Notes all collectives of this process, DDP's own too: name and bytes."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
            self.calls.append((func._opname, sum(x.numel() * x.element_size() for x in tensors)))
        return func(*args, **(kwargs or {}))


def train(model, inputs, bfloat16=False):
    """Losses of each step, the weights before and after, and what was sent to make DDP and in the last step."""
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    with Sent() as wrapping:
        wrapped = wrap_ddp(model, broadcast_buffers=False)
    assert not getattr(wrapped, "find_unused_parameters", False)
    wrapped = Autocast(wrapped) if bfloat16 else wrapped
    history = []
    for _ in range(STEPS):
        with Sent() as stepping:
            losses = step(wrapped, inputs)
            optimizer.zero_grad()
            sum(losses.values()).backward()
        optimizer.step()
        history.append({key: loss.item() for key, loss in losses.items()})
    return {
        "losses": history,
        "start": start,
        "weights": {name: p.detach() for name, p in model.named_parameters()},
        "sent": (wrapping.calls, stepping.calls),
    }


class Logged(HookBase):
    """Keeps what the first process logs of each step's losses."""

    def __init__(self):
        self.steps = []

    def after_step(self):
        self.steps.append({key: value for key, (value, _) in self.trainer.storage.latest().items() if "loss" in key})


def train_accumulating(model, inputs, count):
    """Logged losses and weights after steps of so many micro-batches."""
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    trainer = SimpleTrainer(wrap_ddp(model, broadcast_buffers=False), [inputs] * STEPS, optimizer)
    if count > 1:
        accumulate(trainer, count, SEED)
    logged = Logged()
    trainer.register_hooks([Reproducible([], SEED), logged])
    trainer.train(0, STEPS)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return {"losses": logged.steps, "start": start, "weights": weights, "normalizers": normalizers_of(trainer.model)}


def images(boxes):
    """Of one size, so that padding does not depend on the number of processes."""
    return batch([(96, 128)] * len(boxes), boxes)


def smooth_activations():
    """Replaces ReLUs in this process: where batches are split, sums are rounded otherwise, which can flip a ReLU."""
    torch.nn.functional.relu = torch.nn.functional.relu_ = torch.nn.functional.silu
    torch.nn.ReLU.forward = lambda self, x: torch.nn.functional.silu(x)


def work(rank, folder):
    """Trains each case in groups of 2 and 3 processes; the third process trains alone while the others are two."""
    torch.set_num_threads(1)
    smooth_activations()
    for workers in (1 if rank == 2 else 2, 3):
        place, share = rank % workers, len(BOXES) // workers
        own = slice(place * share, (place + 1) * share)
        if workers > 1:
            distributed.init_process_group(
                "gloo", init_method=f"file://{folder}/meet{workers}", rank=place, world_size=workers
            )
        found = {
            name: train(student(folder, case, [case.method], True), images(case.boxes)[own])
            for name, case in CASES.items()
        }
        case = CASES["CrossKD on GFL"]
        found["bfloat16"] = train(student(folder, case, [case.method], True), images(BOXES)[own], bfloat16=True)
        for total, name in ACCUMULATED_RUNS if workers < 3 else ():
            case = ACCUMULATED[name]
            model = student(folder, case, [case.method] if case.method else [], name.endswith("synced"))
            inputs = images(BOXES)[place::workers] if total == 6 else images(BOXES)[own]
            found[total, name] = train_accumulating(model, inputs, total // workers)
        if workers == 2:
            found["plain"] = train(student(folder, case, [], False), images(BOXES)[own])
            found.update(
                {name: train(student(folder, Case("GFL", name), [name], False), images(BOXES)[own]) for name in REDUCED}
            )
        torch.save(found, folder / f"{workers}_{place}.pth")
        if workers > 1:
            distributed.destroy_process_group()


def start_all(folder):
    """Runs all cases; what each process found is in a file of its own."""
    cases = (*CASES.values(), *ACCUMULATED.values())
    for path, options in {(teacher_path(folder, case), tuple(teacher_options(case))) for case in cases}:
        save_teacher(path, *options)
    spawn(work, (folder,), nprocs=3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By number of processes, what each of them found."""
    folder = made_once(tmp_path_factory, "runs", start_all)
    return {
        workers: [torch.load(folder / f"{workers}_{place}.pth") for place in range(workers)] for workers in (1, 2, 3)
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_any_number_of_processes_gives_the_same(runs, case):
    one = runs[1][0][case]
    for workers in (2, 3):
        ranks = [found[case] for found in runs[workers]]
        for i, losses in enumerate(one["losses"]):
            for key, loss in losses.items():
                mean = sum(rank["losses"][i][key] for rank in ranks) / workers
                # A divergence of near distributions is a small difference of large terms, which are rounded.
                rounding = 1e-9 if key == "loss_ld_main" else 0
                assert mean == pytest.approx(loss, rel=1e-6, abs=rounding), (workers, i, key)
        for name, weight in one["weights"].items():
            assert all(torch.equal(rank["weights"][name], ranks[0]["weights"][name]) for rank in ranks)
            torch.testing.assert_close(ranks[0]["weights"][name], weight, rtol=0, atol=1e-6)
    moved = max((weight - one["start"][name]).abs().max() for name, weight in one["weights"].items())
    assert moved > 5e-4


@pytest.mark.slow
def test_recomputing_changes_nothing_in_several_processes(runs):
    for found in (rank for ranks in runs.values() for rank in ranks):
        kept, recomputed = found[ADAPTED], found[RECOMPUTED]
        assert recomputed["losses"] == kept["losses"]
        for name, weight in kept["weights"].items():
            assert torch.equal(recomputed["weights"][name], weight), name


@pytest.mark.slow
@pytest.mark.parametrize("run", ACCUMULATED_RUNS, ids=str)
def test_micro_batches_are_as_good_as_processes(runs, run):
    """What is logged, weights and running normalizers; with options as published, and random masks."""
    one, two = ([rank[run] for rank in runs[processes]] for processes in (1, 2))
    assert one[0]["losses"]
    for losses, expected in zip(one[0]["losses"], two[0]["losses"]):
        assert losses == pytest.approx(expected, rel=1e-6, abs=0)
    for name, weight in one[0]["weights"].items():
        torch.testing.assert_close(weight, two[0]["weights"][name], rtol=0, atol=1e-6)
    normalizers = [value for micro_batch in zip(*(rank["normalizers"] for rank in two)) for value in micro_batch]
    assert normalizers == one[0]["normalizers"]
    assert max((weight - one[0]["start"][name]).abs().max() for name, weight in one[0]["weights"].items()) > 1e-5


@pytest.mark.slow
def test_mixed_precision_in_several_processes(runs):
    exact = runs[1][0]["CrossKD on GFL"]["losses"][-1]
    for workers, found in runs.items():
        ranks = [rank["bfloat16"] for rank in found]
        for key, loss in exact.items():
            mean = sum(rank["losses"][-1][key] for rank in ranks) / workers
            assert mean == pytest.approx(loss, rel=0.05)
            assert mean != loss
        assert all(torch.equal(weight, ranks[-1]["weights"][name]) for name, weight in ranks[0]["weights"].items())


@pytest.mark.slow
@pytest.mark.parametrize("method", REDUCED)
def test_the_teacher_sends_nothing(runs, method):
    """Each collective of each process, when DDP wraps the model and in a step, with a teacher and without."""
    for found in runs[2]:
        (plain_wrapping, plain_step), (wrapping, stepping) = found["plain"]["sent"], found[method]["sent"]
        assert sum(size for _, size in plain_step) > sum(p.numel() * 4 for p in found["plain"]["weights"].values())
        assert len(plain_wrapping) > 0
        assert wrapping == plain_wrapping
        assert Counter(stepping) - Counter(plain_step) == {("allreduce_", 4): REDUCED[method]}
        assert not Counter(plain_step) - Counter(stepping)


SCRIPT = """
import os, signal, sys, time
from pathlib import Path

from detectron2.engine import SimpleTrainer
from detectron2.utils import comm

from d2kd.engine import launch, main

run_step = SimpleTrainer.run_step
attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def watched(self):
    if {dies} and attempt == 0 and comm.get_rank() == 1 and self.iter == 3:
        Path(__file__).with_suffix(".ended").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    run_step(self)


SimpleTrainer.run_step = watched
if __name__ == "__main__":
    if attempt > 0 and os.environ["RANK"] == "1":
        time.sleep(2)  # so that the other looks for its address before it is there
    sys.exit(main())
"""
RUN = ["SEED", "5", "SOLVER.MAX_ITER", "6", "SOLVER.CHECKPOINT_PERIOD", "2", "DATASETS.TEST", "()"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]


@pytest.fixture
def start(tmp_path, blood_cells):
    """Starts a run of 2 processes, the second of which may die at the beginning of iteration 3."""
    teacher = save_teacher(tmp_path / "teacher.pth")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    running = []

    def run(folder, dies, launcher=(), flags=()):
        script = tmp_path / f"{folder}.py"
        script.write_text(SCRIPT.replace("{dies}", str(dies)))
        run = ["MODEL.DISTILL.TEACHER.WEIGHTS", str(teacher), "OUTPUT_DIR", str(tmp_path / folder), *RUN]
        command = [sys.executable, *launcher, script, "--config-file", CONFIGS / "quick_crosskd_retinanet.yaml", *flags]
        process = subprocess.Popen(
            [str(part) for part in (*command, *run)],
            env=environment,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process

    yield run
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(path):
    deadline = time.time() + 240
    while not path.exists() and time.time() < deadline:
        time.sleep(0.05)
    assert path.exists()


@pytest.mark.slow
def test_a_process_that_dies_ends_all_with_one_sentence(start, tmp_path):
    process = start("run", True, flags=["--num-gpus", "2"])
    wait_for(tmp_path / "run.ended")
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    last = errors.strip().splitlines()[-1]
    assert last == (
        "error: process 1 terminated with signal SIGKILL; the same command with --resume continues from the last "
        "checkpoint"
    )
    assert rows_of(last)
    assert "Traceback" not in errors
    assert checkpoints_in(str(tmp_path / "run"))


def test_processes_that_hang_are_killed_after_sigterm(monkeypatch):
    """One that is stopped stands for one in a collective: no handler runs in either."""
    monkeypatch.setattr(launch, "LEAVE_WITHIN", 1)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)]
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    child.start()
    os.kill(child.pid, signal.SIGSTOP)
    os.waitpid(child.pid, os.WUNTRACED)  # until it is stopped
    with launch.sigterm_for_children():
        os.kill(os.getpid(), signal.SIGTERM)
        child.join(30)
    assert child.exitcode == -signal.SIGKILL
    assert signal.alarm(0) == 0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)] == before


@pytest.mark.slow
def test_torchrun_restarts_a_run_where_a_process_died(start, tmp_path):
    """From the last checkpoint, to the very weights of an unbroken run."""
    broken, unbroken = start("broken", True, TORCHRUN), start("unbroken", False, TORCHRUN)
    for process in (broken, unbroken):
        errors = process.communicate(timeout=240)[1]
        assert process.returncode == 0, errors
    assert (tmp_path / "broken.ended").exists()
    assert "Starting training from iteration 2" in (tmp_path / "broken" / "log.txt").read_text()
    one, two = (files.read(str(tmp_path / name / "model_final.pth"))["model"] for name in ("unbroken", "broken"))
    for key, value in one.items():
        assert torch.equal(value, two[key]), key
