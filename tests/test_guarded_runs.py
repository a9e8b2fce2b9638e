"""Runs guard their folder and themselves: signals while they evaluate, changed teachers and data, odd files."""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.engine import AMPTrainer
from detectron2.evaluation import COCOEvaluator
from detectron2.utils.events import EventStorage, JSONWriter, TensorboardXWriter
from detectron2.utils.logger import _cached_log_stream
from kill_and_resume import ends
from runs import assert_same_end, command, last_error, lazy_command, resume, sigterm, train
from small import CONFIGS
from tensorboard.summary.writer import record_writer

from d2kd.checkpoint import files
from d2kd.checkpoint.run_checkpoints import checkpoints_in
from d2kd.engine import Trainer, lock
from d2kd.engine import trainer as trainer_module
from d2kd.engine.hooks import EXIT_PREEMPTED, Writing
from d2kd.engine.main import RESUME, parser
from d2kd.engine.run_folder import RunFolder
from d2kd.engine.styles import load_recipe
from d2kd.errors import EXIT_INTERRUPTED, D2kdError
from d2kd.experiments.pictures import read_metrics

EVALUATED = ["TEST.EVAL_PERIOD", "3", "DATASETS.TEST", "('blood_cells_val',)", "SOLVER.EMA_DECAY", "0.9"]
ALLOWED = ("--resume", "--allow-config-change")
HOLD = """
import fcntl, os, sys

with open(sys.argv[1], "a+") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print(f"process {os.getpid()} on another machine", end="", file=file, flush=True)
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def in_evaluation(monkeypatch):
    """Calls ``act`` once in ``in_evaluation(number, act)``, within an evaluation."""
    process = COCOEvaluator.process

    def set_up(number, act):
        started = []
        reset = COCOEvaluator.reset

        def count(self):
            started.append(self)
            reset(self)

        def step(self, *args):
            if len(started) == number:
                started.append(None)
                act()
            process(self, *args)

        monkeypatch.setattr(COCOEvaluator, "reset", count)
        monkeypatch.setattr(COCOEvaluator, "process", step)

    return set_up


def average_precisions(folder):
    """Iteration, AP and the average's AP of each whole evaluation, as text: both may be NaN."""
    rows = [row for row in read_metrics(folder) if "ema/bbox/AP" in row]
    return [f"{row['iteration']} {row['bbox/AP']} {row['ema/bbox/AP']}" for row in rows]


@pytest.fixture(scope="module")
def evaluated(teachers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    assert train(folder, teachers, *EVALUATED) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 3], ids=["periodic, of EMA", "final"])
def test_sigterm_breaks_off_an_evaluation_which_the_resumed_run_does(
    number, teachers, evaluated, tmp_path, in_evaluation, capfd
):
    in_evaluation(number, sigterm)
    assert train(tmp_path, teachers, *EVALUATED) == EXIT_PREEMPTED
    assert "--resume continues" in last_error(capfd)
    last = "model_0000002.pth" if number < 3 else "model_final.pth"
    assert os.path.basename(checkpoints_in(tmp_path)[0]) == last
    assert len(average_precisions(tmp_path)) == (number > 2)
    assert resume(tmp_path, teachers, *EVALUATED) == 0
    assert_same_end(evaluated, tmp_path)
    assert average_precisions(tmp_path) == average_precisions(evaluated)


# ---- Ctrl-C


@pytest.mark.slow
def test_ctrl_c_ends_a_run_in_one_line(teachers, tmp_path, at, capfd):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest may run where it is ignored
    at(1, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert train(tmp_path, teachers) == EXIT_INTERRUPTED == 130
    captured = capfd.readouterr()
    assert captured.err.strip().splitlines()[-1] == f"interrupted; {RESUME}"
    assert "Traceback" not in captured.out + captured.err


def children_of(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def imports_torch(pid):
    with contextlib.suppress(OSError):
        return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["starting", "training"])
def test_ctrl_c_ends_several_processes_in_one_line(moment, teachers, tmp_path):
    """A terminal sends SIGINT to all of them, also to those that are still importing."""
    log, folder = tmp_path / "log", tmp_path / "run"
    arguments = command(folder, teachers, "SOLVER.MAX_ITER", 1000, flags=("--num-gpus", "2"))
    method = {"starting": "spawn", "training": "fork"}[moment]
    run = forked.start(arguments, log, on_sigint=signal.default_int_handler, method=method)
    due = {
        "starting": lambda: sum(map(bool, map(imports_torch, children_of(run.pid)))) == 2,
        "training": lambda: checkpoints_in(folder),
    }[moment]
    deadline = time.monotonic() + 240
    while run.is_alive() and not due() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGINT)
    run.join(60)
    assert run.exitcode == EXIT_INTERRUPTED
    assert ends(run.pid)
    assert f"interrupted; {RESUME}" in log.read_text().splitlines()
    assert "Traceback" not in log.read_text()


# ---- one run in a folder


@pytest.fixture(scope="module")
def finished(teachers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    assert train(folder, teachers, "SOLVER.MAX_ITER", 1) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def holder(tmp_path):
    """Starts a process that holds the lock of a folder."""
    started = []

    def start(folder):
        folder.mkdir(exist_ok=True)
        (folder / lock.NAME).unlink(missing_ok=True)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        started.append(subprocess.Popen([sys.executable, "-c", HOLD, folder / lock.NAME], **pipes))
        assert started[-1].stdout.readline() == b"locked\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "flags"),
    [(command, ()), (command, ("--resume",)), (command, ("--eval-only",)), (lazy_command, ("--resume",))],
)
def test_a_folder_in_use_is_refused(make, flags, run, teachers, holder, monkeypatch, capfd):
    monkeypatch.setattr(lock, "WAIT", 0.0)
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    other = holder(run)
    assert train(run, teachers, make=make, flags=flags) == 2
    assert f"{run} is in use by another run (process {other.pid} on " in last_error(capfd)
    after = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    assert after.pop(lock.NAME)
    before.pop(lock.NAME)
    assert after == before


def test_the_lock_of_a_killed_process_is_taken_over(holder, tmp_path):
    other = holder(tmp_path)
    other.kill()
    other.wait()
    with lock.locked(str(tmp_path), ""):
        assert (tmp_path / lock.NAME).read_text().startswith(f"process {os.getpid()} on ")


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EIO, errno.ESTALE], ids=os.strerror)
def test_a_file_system_without_locks_is_told(code, tmp_path, monkeypatch, caplog):
    """NFS without its lock daemon, and others: the run goes on, and is not said to be in use."""

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)
    with lock.locked(str(tmp_path), ""):
        assert f"{tmp_path} cannot be locked ({os.strerror(code)}): make sure that no other run" in caplog.text


@pytest.mark.slow
def test_evaluation_leaves_the_runs_config_alone(run, teachers):
    kept = {name: (run / name).read_bytes() for name in ("config.yaml", "run.json", "log.txt")}
    opts = ["MODEL.WEIGHTS", run / "model_final.pth", "DATASETS.TEST", "('blood_cells_val',)", "SEED", 7]
    assert train(run, teachers, *opts, flags=("--eval-only",)) == 0
    assert {name: (run / name).read_bytes() for name in kept} == kept
    assert "SEED: 7" in (run / "inference" / "config.yaml").read_text()


# ---- a resumed run learns from the same


def edited_teacher(make, folder, *opts):
    """A run whose teacher has a config file of its own, as it is and edited."""
    path = folder / "teacher.yaml"
    path.write_text(f"_BASE_: {CONFIGS}/quick_retinanet.yaml\n" + "\n".join(opts))
    if make is lazy_command:
        return [f"model.teacher.config_file={path}", "train.max_iter=1"]
    return ["MODEL.DISTILL.TEACHER.CONFIG_FILE", path, "SOLVER.MAX_ITER", 1]


@pytest.mark.slow
@pytest.mark.parametrize("make", [command, lazy_command])
def test_an_edited_teacher_config_is_refused(make, teachers, tmp_path, capfd):
    run = tmp_path / "run"
    assert train(run, teachers, *edited_teacher(make, tmp_path), make=make) == 0
    assert json.loads((run / "teacher.json").read_text())["config"]["INPUT.FORMAT"] == "BGR"
    same = edited_teacher(make, tmp_path, "SOLVER: {MAX_ITER: 77}")  # which does not matter
    assert resume(run, teachers, *same, make=make) == 0
    edited = edited_teacher(make, tmp_path, "INPUT: {FORMAT: RGB}", "MODEL: {PIXEL_MEAN: [0.0, 0.0, 0.0]}")
    assert resume(run, teachers, *edited, make=make) == 2
    error = last_error(capfd)
    assert "the teacher's config has changed" in error
    assert "INPUT.FORMAT was BGR and is RGB, MODEL.PIXEL_MEAN was [103.53, 116.28, 123.675] and is [0.0, " in error
    assert train(run, teachers, *edited, make=make, flags=ALLOWED) == 0
    assert resume(run, teachers, *edited, make=make) == 0


@pytest.mark.slow
@pytest.mark.parametrize("make", [command, lazy_command])
def test_edited_annotations_are_refused(make, teachers, blood_cells, tmp_path, capfd, monkeypatch):
    data = tmp_path / "blood_cells"
    shutil.copytree(blood_cells, data)
    path = data / "instances_train.json"
    monkeypatch.setitem(vars(MetadataCatalog.get("blood_cells_train")), "json_file", str(path))
    one = {command: ["SOLVER.MAX_ITER", 1], lazy_command: ["train.max_iter=1"]}[make]
    assert train(tmp_path / "run", teachers, *one, make=make) == 0
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "images": content["images"][::-1]}))
    assert resume(tmp_path / "run", teachers, *one, make=make) == 2
    assert f"the annotation file {path} of data set blood_cells_train is not the one" in last_error(capfd)
    assert train(tmp_path / "run", teachers, *one, make=make, flags=ALLOWED) == 0
    assert resume(tmp_path / "run", teachers, *one, make=make) == 0


@pytest.mark.slow
def test_what_an_allowed_change_changes(run, teachers, capfd):
    """The learning rate of the rest of the run; not the optimizer, whose state would not fit."""
    assert train(run, teachers, "SOLVER.MAX_ITER", 3, "SOLVER.OPTIMIZER", "SGD", flags=ALLOWED) == 2
    assert "holds the state of another optimizer" in last_error(capfd)
    opts = ["SOLVER.MAX_ITER", 3, "SOLVER.BASE_LR", 0.0625, "SOLVER.WARMUP_ITERS", 0, "SOLVER.WEIGHT_DECAY", 0.5]
    assert train(run, teachers, *opts, flags=ALLOWED) == 0
    groups = files.read(str(run / "model_final.pth"))["trainer"]["_trainer"]["optimizer"]["param_groups"]
    assert {group["initial_lr"] for group in groups} == {0.0625}
    assert 0.5 in {group["weight_decay"] for group in groups}


@pytest.mark.slow
def test_float16_may_be_switched_on_and_off(run, teachers, monkeypatch, caplog):
    """Its gradient scaler starts anew where the checkpoint has none."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plain = trainer_module.amp_trainer
    monkeypatch.setattr(
        trainer_module,
        "amp_trainer",
        lambda model, data, optimizer, _: AMPTrainer(model, data, optimizer, grad_scaler=scaler),
    )
    arguments = command(run, teachers, "SOLVER.MAX_ITER", 3, "SOLVER.AMP.ENABLED", True)
    recipe = load_recipe(parser().parse_args(arguments)).with_seed(5)
    switched = Trainer(recipe.config)
    switched.resume_or_load(resume=True)
    assert switched.start_iter == 1
    assert scaler.get_scale() == 1024.0
    assert "no gradient scaler, as it was written without float16: a new one starts at scale 1024" in caplog.text
    state = files.read(str(run / "model_final.pth"))
    state["trainer"]["_trainer"]["grad_scaler"] = scaler.state_dict()
    files.write(str(run / "model_final.pth"), state)
    scaler.scale(torch.zeros(1))  # makes what update changes
    scaler.update(2.0)
    switched.resume_or_load(resume=True)
    assert scaler.get_scale() == 1024.0
    monkeypatch.setattr(trainer_module, "amp_trainer", plain)
    back = Trainer(recipe.config)
    back.resume_or_load(resume=True)
    assert back.start_iter == 1
    assert "continues without the checkpoint's gradient scaler" in caplog.text


PLAIN = "detectron2.modeling.meta_arch.retinanet.RetinaNet"
# Overrides of a LazyConfig, and what users read.
LAZY_MISTAKES = {
    "model.teacher.weights=gone.pth": "gone.pth",
    "+model.class_map=[[0,9]]": "model.class_map: the teacher has classes 0 to 2, not 9",
    "+model.inherit=[tail]": "model.inherit is 'tail'; use one of neck, head",
    f"model._target_={PLAIN}": "model._target_ RetinaNet is a plain detector and takes no 'teacher': set it to "
    "d2kd.meta_arch.DistillRetinaNet, or delete model.teacher, model.methods, ",
    "model.methods=[{_target_: d2kd.methods.PKD}, {_target_: d2kd.methods.PKD}]": "PKD is named twice in model.methods",
    "+model.methods.0.cls_weight=-1.0": "CrossKD's cls_weight is -1.0; set it to 0 or more",
}


@pytest.mark.slow
@pytest.mark.parametrize("override", LAZY_MISTAKES)
def test_mistakes_in_a_lazy_config_name_its_own_keys(override, teachers, tmp_path, capfd):
    assert train(tmp_path, teachers, override, make=lazy_command, flags=("--dry-run",)) == 2
    error = last_error(capfd)
    assert LAZY_MISTAKES[override] in error
    assert "MODEL." not in error


# ---- odd files


ODD = {
    "list": "[1, 2]",
    "number": "3",
    "null": "null",
    "not JSON": "{",
    "deep": "[" * 100_000,
    "other types": '{"OUTPUT_DIR": "x", "sha256": 3, "config": [1], "blood_cells_train": 7, "file": null}',
    "empty": "{}",
}


@pytest.mark.parametrize("text", ODD.values(), ids=ODD)
def test_odd_records_are_not_compared(text, finished, tmp_path):
    """Of an old version, damaged, or written by somebody else."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for name in ("run.json", "teacher.json", "data.json"):
        (tmp_path / name).write_text(text)
    folder = RunFolder(load_recipe(parser().parse_args(command(tmp_path, tmp_path))))
    folder.check(True, False, {"teacher.json": {"sha256": "1", "file": "x", "config": {"a": 1}}, "data.json": {}})
    (tmp_path / "run.json").write_text('{"SEED": "x"}')
    assert folder.saved_seed() == -1


@pytest.mark.slow
def test_dangling_links_are_passed_over(run, teachers, capfd):
    (run / "model_0000009.pth").symlink_to(run / "nowhere")
    (run / "last_checkpoint").write_text("model_0000009.pth")
    assert resume(run, teachers, "SOLVER.MAX_ITER", 1) == 0
    assert "model_0000009.pth: no such file" in capfd.readouterr().out


# ---- full disks while logs are written


@pytest.mark.slow
def test_a_log_that_cannot_be_written_ends_no_run(teachers, tmp_path, capfd):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    assert train(tmp_path, teachers, "SOLVER.MAX_ITER", 1) == 0
    error = capfd.readouterr().err
    assert error.count(f"the log in {tmp_path} could not be written (No space left on device)") == 1
    assert "Traceback" not in error
    assert _cached_log_stream(str(tmp_path / "log.txt")).closed  # else Python reports the same once more when it ends


@pytest.mark.slow
def test_metrics_that_cannot_be_written_end_a_run(teachers, tmp_path, capfd):
    """In one sentence, and after the checkpoint of that iteration, from which the run then goes on."""
    metrics = tmp_path / "metrics.json"
    metrics.symlink_to("/dev/full")
    assert train(tmp_path, teachers, "SOLVER.MAX_ITER", 2) == 2
    captured = capfd.readouterr()
    expected = f"error: the metrics in {tmp_path} could not be written (No space left on device); free some space"
    assert captured.err.strip().splitlines()[-1].startswith(expected)
    assert "Traceback" not in captured.out + captured.err
    assert not list(tmp_path.glob("*.partial"))
    metrics.unlink()
    assert resume(tmp_path, teachers, "SOLVER.MAX_ITER", 2) == 0
    assert "model_final.pth" in capfd.readouterr().out


@pytest.mark.slow
def test_tensorboards_thread_prints_no_traceback(tmp_path, monkeypatch, capfd):
    """The error reaches the hook, which reports it in one sentence."""

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(record_writer.RecordWriter, "write", refuse)
    before = threading.excepthook
    hook = Writing([TensorboardXWriter(str(tmp_path))], 1, str(tmp_path))
    hook.trainer = SimpleNamespace(iter=0, max_iter=9)
    hook.before_train()
    with EventStorage() as storage:
        storage.put_scalar("loss", 1.0)
        with pytest.raises(D2kdError, match=r"could not be written \(No space left on device\)"):
            hook.after_train()
    assert "Traceback" not in capfd.readouterr().err
    assert threading.excepthook is before


def test_metrics_are_given_up_without_a_second_try(tmp_path):
    """Neither the end of training nor that of the process writes again, so neither hides the first error."""
    with open("/dev/full", "w") as full:
        writer = JSONWriter(str(tmp_path / "metrics.json"))
        writer._file_handle = full
        hook = Writing([writer], 1, str(tmp_path))
        hook.trainer = SimpleNamespace(iter=0, max_iter=9)
        with EventStorage() as storage:
            storage.put_scalar("loss", 1.0)
            with pytest.raises(D2kdError, match=rf"the metrics in {re.escape(str(tmp_path))} could not be written"):
                hook.after_step()
            hook.after_train()
        assert full.closed
