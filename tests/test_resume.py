"""A run is never lost: killed, stopped or out of disk space, it resumes and ends with the very same weights."""

import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import time
from itertools import islice
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.utils import comm
from kill_and_resume import ends
from runs import (
    RANDOM_VIEWS,
    UNEQUAL,
    Killed,
    assert_same,
    assert_same_end,
    command,
    kill,
    last_error,
    lazy_command,
    resume,
    sigterm,
    train,
)
from small import save_teacher, small_config

from d2kd.checkpoint import files
from d2kd.checkpoint.run_checkpoints import checkpoints_in
from d2kd.data.loader import build_train_loader, start_at
from d2kd.engine.hooks import EXIT_PREEMPTED
from d2kd.experiments.pictures import read_metrics
from d2kd.methods import CrossKD


@pytest.fixture(scope="module")
def unbroken(teachers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    assert train(folder, teachers) == 0
    return folder


CASES = {
    "random views, EMA": ({}, [*RANDOM_VIEWS, "SOLVER.EMA_DECAY", "0.9"]),
    "two loading processes": ({}, [*RANDOM_VIEWS, "DATALOADER.NUM_WORKERS", "2"]),
    "adapters, random masks": (
        {"teacher": "wide.pth"},
        [*UNEQUAL, "SOLVER.OPTIMIZER", "SGD", "SOLVER.EMA_DECAY", "0.9"],
    ),
    "FCOS": ({}, ["MODEL.META_ARCHITECTURE", "FCOS", "MODEL.DISTILL.METHODS", "()"]),
    "LazyConfig": ({"make": lazy_command}, ["train.ema_decay=0.9"]),
    "accumulation": ({}, ["SOLVER.ACCUMULATE", "2"]),
    "mixed precision, EMA": ({}, ["SOLVER.AMP.ENABLED", "True", "SOLVER.EMA_DECAY", "0.9"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_equals_unbroken(case, teachers, tmp_path, at):
    """Weights, optimizer, schedule, EMA, adapters, running normalizer: all of the last checkpoint, bit for bit."""
    options, opts = CASES[case]
    assert train(tmp_path / "unbroken", teachers, *opts, **options) == 0
    broken = tmp_path / "broken"
    for iteration in (1, 4):  # before the first checkpoint, then between two
        at(iteration, kill)
        with pytest.raises(Killed):
            resume(broken, teachers, *opts, **options)
    assert [Path(path).name for path in checkpoints_in(broken)] == ["model_0000003.pth", "model_0000001.pth"]
    np.random.seed()  # what this process did before must not matter
    torch.seed()
    assert resume(broken, teachers, *opts, **options) == 0
    assert_same_end(tmp_path / "unbroken", broken)
    state = files.read(str(broken / "model_final.pth"))
    if "adapters" in case:
        assert any(key.startswith("distill.mgd.") for key in state["model"])
    if "EMA" in case:
        assert_same(*(files.read(str(tmp_path / run / "model_ema_final.pth")) for run in ("unbroken", "broken")))
    if case == "FCOS":
        assert state["trainer"]["hooks"]["Saving"]["loss_normalizers"][0] != 300


@pytest.mark.slow
def test_a_random_seed_is_kept(teachers, tmp_path, at):
    """SEED -1 draws one; the resumed run keeps it. run.json names it, and with it the run can be repeated."""
    at(4, kill)
    with pytest.raises(Killed):
        train(tmp_path / "broken", teachers, "SEED", -1)
    assert resume(tmp_path / "broken", teachers, "SEED", -1) == 0
    seed = json.loads((tmp_path / "broken" / "run.json").read_text())["SEED"]
    assert seed >= 0
    assert train(tmp_path / "again", teachers, "SEED", seed) == 0
    assert_same_end(tmp_path / "broken", tmp_path / "again")


@pytest.mark.slow
def test_sigterm_finishes_the_iteration_and_saves(teachers, unbroken, tmp_path, at, capfd):
    before = signal.getsignal(signal.SIGTERM)
    at(2, sigterm)
    assert train(tmp_path, teachers) == EXIT_PREEMPTED == 75
    assert "--resume" in last_error(capfd)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"
    assert signal.getsignal(signal.SIGTERM) == before
    assert resume(tmp_path, teachers) == 0
    assert_same_end(unbroken, tmp_path)


@pytest.mark.slow
def test_a_restart_by_torchrun_resumes(teachers, unbroken, tmp_path, at, monkeypatch):
    """With --max-restarts it repeats the command without --resume."""
    at(4, kill)
    with pytest.raises(Killed):
        train(tmp_path, teachers)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train(tmp_path, teachers) == 0
    assert_same_end(unbroken, tmp_path)


@pytest.mark.slow
def test_damaged_checkpoints_are_passed_over(teachers, unbroken, tmp_path, capfd):
    """Truncated, then empty: the run resumes from the previous one, whatever the pointer says."""
    shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model_final.pth").unlink()
    newest = tmp_path / "model_0000005.pth"
    newest.write_bytes(newest.read_bytes()[:-1000])
    (tmp_path / "model_0000003.pth").write_bytes(b"")
    (tmp_path / "tmpabc.partial").write_bytes(b"half written")
    (tmp_path / "last_checkpoint").unlink()
    assert resume(tmp_path, teachers) == 0
    out = capfd.readouterr().out
    assert "model_0000005.pth cannot be read" in out
    assert "Starting training from iteration 2" in out
    assert_same_end(unbroken, tmp_path)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
def test_no_readable_checkpoint_is_told(teachers, unbroken, tmp_path, capfd):
    shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
    for path in checkpoints_in(tmp_path):
        Path(path).write_bytes(b"x")
    assert resume(tmp_path, teachers) == 2
    assert "none of the checkpoints" in last_error(capfd)


@pytest.mark.slow
def test_full_disk_leaves_the_last_good_checkpoint(teachers, unbroken, tmp_path, at, capfd):
    """The system refuses to write files above a size: an error in one sentence, the pointer and its file stay."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (unbroken / "model_final.pth").stat().st_size
    at(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, limits[1])))
    try:
        assert train(tmp_path, teachers) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    captured = capfd.readouterr()
    assert "model_0000003.pth could not be written (File too large)" in captured.err.strip().splitlines()[-1]
    assert "Traceback" not in captured.out
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    assert not list(tmp_path.glob("*.partial"))
    assert resume(tmp_path, teachers) == 0
    assert_same_end(unbroken, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("make", [command, lazy_command])
def test_a_run_is_not_overwritten_or_mixed_up(make, teachers, tmp_path, capfd):
    """Without --resume it is refused; with it, only what changes no iteration may differ."""
    rate, evaluation = {
        command: (["SOLVER.BASE_LR", "0.002"], ["TEST.EVAL_PERIOD", "3", "DATASETS.TEST", "('blood_cells_val',)"]),
        lazy_command: (["optimizer.lr=0.002"], ["train.eval_period=3"]),
    }[make]
    assert train(tmp_path, teachers, make=make) == 0
    final = (tmp_path / "model_final.pth").read_bytes()
    assert train(tmp_path, teachers, make=make) == 2
    assert "holds checkpoints of a run" in last_error(capfd)
    assert resume(tmp_path, teachers, *rate, make=make) == 2
    assert f"{'optimizer.lr' if make is lazy_command else 'SOLVER.BASE_LR'} was 0.0" in last_error(capfd)
    assert resume(tmp_path, teachers, *evaluation, make=make) == 0
    assert (tmp_path / "model_final.pth").read_bytes() == final
    flags = ("--resume", "--allow-config-change")
    assert train(tmp_path, teachers, *rate, make=make, flags=flags) == 0
    assert resume(tmp_path, teachers, *rate, make=make) == 0  # these are the run's values now


@pytest.mark.slow
def test_a_changed_teacher_is_refused(teachers, unbroken, tmp_path, capfd):
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    recorded = json.loads((run / "teacher.json").read_text())
    assert recorded["path"] == str(teachers / "teacher.pth")
    sha256sum = subprocess.run(["sha256sum", recorded["file"]], capture_output=True, text=True, check=True)
    assert sha256sum.stdout.split()[0] == recorded["sha256"]
    shutil.copy(teachers / "teacher.pth", tmp_path / "moved.pth")
    assert resume(run, tmp_path, teacher="moved.pth") == 0
    save_teacher(tmp_path / "moved.pth", seed=3)
    assert resume(run, tmp_path, teacher="moved.pth") == 2
    error = last_error(capfd)
    assert "moved.pth is not the one this run was started with" in error


@pytest.mark.slow
def test_ema(teachers, tmp_path):
    """The file is a plain checkpoint of the average of all iterates, and its AP stands beside the student's."""
    period = ["SOLVER.CHECKPOINT_PERIOD", "1", "DATASETS.TEST", "('blood_cells_val',)"]
    assert train(tmp_path, teachers, "SOLVER.EMA_DECAY", "0.75", *period, "SOLVER.MAX_ITER", 3) == 0
    iterates = [files.read(str(tmp_path / f"model_{i:07d}.pth"))["model"] for i in range(3)]
    saved = files.read(str(tmp_path / "model_ema_final.pth"))["model"]
    key = "head.cls_score.weight"
    first = 0.75 * iterates[0][key] + 0.25 * iterates[1][key]
    torch.testing.assert_close(saved[key], 0.75 * first + 0.25 * iterates[2][key])
    assert not torch.equal(saved[key], iterates[2][key])
    assert saved.keys() == iterates[2].keys()
    plain = build_model(small_config())
    DetectionCheckpointer(plain).load(str(tmp_path / "model_ema_final.pth"))
    torch.testing.assert_close(plain.state_dict()[key], saved[key], rtol=0, atol=0)
    assert {"bbox/AP", "ema/bbox/AP"} <= read_metrics(tmp_path)[-1].keys()


def test_ema_decay_out_of_range_is_told(teachers, tmp_path, capfd):
    assert train(tmp_path, teachers, "SOLVER.EMA_DECAY", "1.5") == 2
    assert "SOLVER.EMA_DECAY" in last_error(capfd)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_names_itself_and_the_images(teachers, blood_cells, tmp_path, at, monkeypatch, capfd):
    forward = CrossKD.forward

    def broken(self, *args):
        return {**forward(self, *args), "loss_crosskd_box": torch.tensor(float("nan"), requires_grad=True)}

    at(2, lambda: monkeypatch.setattr(CrossKD, "forward", broken))
    assert train(tmp_path, teachers, "SOLVER.IMS_PER_BATCH", 2) == 2
    captured = capfd.readouterr()
    error = captured.err.strip().splitlines()[-1]
    assert error.startswith("error: iteration 3: loss_crosskd_box is nan on images ")
    assert "loss_cls" not in error
    assert error.count(str(blood_cells)) == 2
    assert "Traceback" not in captured.out
    assert [Path(path).name for path in checkpoints_in(tmp_path)] == ["model_0000001.pth"]


def loader(workers=0, seed=1, mapper=None, size=24, **options):
    """A loader of random crops of pairs (index, random number)."""
    dataset = [{"index": i, "width": 2 if i % 3 else 1, "height": 1} for i in range(size)]
    mapper = mapper or (lambda entry: (entry["index"], entry["width"], np.random.rand(), torch.rand(1).item()))
    return build_train_loader(dataset, mapper=mapper, total_batch_size=4, num_workers=workers, seed=seed, **options)


def test_the_loader_is_a_function_of_seed_and_iteration():
    """From any start, with any number of loading processes, and without a trace in the process's random numbers."""
    batches = list(islice(loader(), 15))
    assert all(len({width for _, width, *_ in batch}) == 1 for batch in batches)  # aspect ratios are not mixed
    numbers = [number for batch in batches for _, _, *drawn in batch for number in drawn]
    assert len(set(numbers)) == len(numbers)
    for workers in (0, 2):
        later = loader(workers)
        start_at(later, 6)
        state = torch.get_rng_state()
        assert list(islice(later, 9)) == batches[6:]
        assert torch.equal(torch.get_rng_state(), state)
    assert list(islice(loader(seed=2), 15)) != batches


def test_augmentation_does_not_depend_on_the_number_of_processes(monkeypatch):
    one = list(islice(loader(aspect_ratio_grouping=False), 6))
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    ranks = []
    for rank in (0, 1):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        ranks.append(list(islice(loader(aspect_ratio_grouping=False), 6)))
    assert [sorted(a + b) for a, b in zip(*ranks)] == [sorted(batch) for batch in one]


def test_samples_that_the_mapper_refuses_are_replaced():
    entries = next(iter(loader(mapper=lambda entry: entry if entry["index"] < 12 else None)))
    assert all(entry["index"] < 12 for entry in entries)
    with pytest.raises(ValueError, match="images in a row"):
        next(iter(loader(mapper=lambda _: None)))


def test_another_loader_is_resumed_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        start_at([1, 2], 0)
        assert not caplog.records
        start_at([1, 2], 3)
    assert "not exact" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_and_kill_of_processes(processes, teachers, tmp_path):
    """Slurm's SIGTERM to all of a job, loading processes too, then kill -9; or both to the first of three.

    The end of several processes that were killed is compared in test_distributed.py and by kill_and_resume.py.
    """
    opts = ["SOLVER.MAX_ITER", 12, "DATALOADER.NUM_WORKERS", 2 if processes == 1 else 0]
    flags = ("--resume", "--num-gpus", str(processes))

    def start(folder):
        return forked.start(command(folder, teachers, *opts, flags=flags), tmp_path / "log")

    def wait_for_more(folder, process):
        count, deadline = len(checkpoints_in(folder)), time.time() + 240
        while len(checkpoints_in(folder)) == count and process.is_alive() and time.time() < deadline:
            time.sleep(0.02)
        assert process.is_alive(), (tmp_path / "log").read_text()

    broken = tmp_path / "broken"
    process = start(broken)
    wait_for_more(broken, process)
    if processes == 1:
        os.killpg(process.pid, signal.SIGTERM)
    else:
        process.terminate()
    process.join(120)
    assert process.exitcode == EXIT_PREEMPTED
    process = start(broken)
    wait_for_more(broken, process)
    os.killpg(process.pid, signal.SIGKILL) if processes == 1 else process.kill()  # the parent alone
    process.join()
    assert ends(process.pid)
    assert not (broken / "model_final.pth").exists()
    if processes == 1:
        assert resume(broken, teachers, *opts) == train(tmp_path / "unbroken", teachers, *opts) == 0
        assert_same_end(tmp_path / "unbroken", broken)
