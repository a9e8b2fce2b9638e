"""A mistake is one sentence and exit status 2; a bug shows its traceback, on the terminal and in the log."""

import os
import subprocess
import sys

import pytest
import torch
from small import CONFIGS, save_teacher

from d2kd.engine import main
from d2kd.errors import PLEASE_REPORT, D2kdError, exit_status, known_mistakes, mistake_in_traceback
from d2kd.keys import key, lazy_keys, setting
from d2kd.methods import CrossKD

QUICK = str(CONFIGS / "quick_crosskd_retinanet.yaml")
SCRIPT = """
import sys

from d2kd.engine import main
from d2kd.errors import D2kdError
from d2kd.methods import CrossKD


def broken(self, *args):
    {raises}


CrossKD.forward = broken
if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory, blood_cells):
    return save_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pth")


def command(teacher_file, folder):
    own = ["MODEL.DISTILL.TEACHER.WEIGHTS", str(teacher_file), "OUTPUT_DIR", str(folder), "DATASETS.TEST", "()"]
    return ["--config-file", QUICK, *own]


def test_a_method_that_is_broken_shows_its_traceback(teacher_file, tmp_path, monkeypatch, capfd):
    def broken(self, student, teacher, targets):
        return {"loss_crosskd_cls": student.logitz.sum()}

    monkeypatch.setattr(CrossKD, "forward", broken)
    assert main(command(teacher_file, tmp_path)) == 1
    error = capfd.readouterr().err
    assert "in broken" in error
    assert "AttributeError: 'DenseOutputs' object has no attribute 'logitz'" in error
    assert error.strip().splitlines()[-1] == f"bug: AttributeError: {PLEASE_REPORT}"
    assert "in broken" in (tmp_path / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("raises", "status", "last"),
    [
        ("return {'x': undefined}", 1, f"bug: {PLEASE_REPORT}"),
        ("raise D2kdError('set KEY to 3')", 2, "error: set KEY to 3"),
    ],
)
def test_the_same_from_started_processes(raises, status, last, teacher_file, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("{raises}", raises))
    done = subprocess.run(
        [sys.executable, script, "--num-gpus", "2", *command(teacher_file, tmp_path / "run")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CONFIGS.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status
    lines = done.stderr.strip().splitlines()
    assert lines[-1] == last
    assert ("NameError: name 'undefined' is not defined" in lines) == (status == 1)
    assert ("in broken" in done.stderr) == (status == 1)


def test_exit_statuses(capsys):
    def fail(error):
        raise error

    assert exit_status(lambda: None) == 0
    assert exit_status(lambda: 75) == 75
    assert exit_status(lambda: fail(D2kdError("set KEY to 3"))) == 2
    assert capsys.readouterr().err == "error: set KEY to 3\n"
    assert exit_status(lambda: fail(KeyError("x"))) == 1
    assert capsys.readouterr().err.startswith("Traceback")
    with pytest.raises(KeyboardInterrupt):
        exit_status(lambda: fail(KeyboardInterrupt()))


def test_what_is_known_is_translated_and_the_rest_is_not():
    fix = r"memory is full; lower SOLVER\.IMS_PER_BATCH .* SOLVER\.AMP\.ENABLED True"
    with pytest.raises(D2kdError, match=fix), known_mistakes():
        raise torch.OutOfMemoryError("CUDA out of memory")
    for error in (KeyError("x"), AssertionError("0"), D2kdError("as it is")):
        with pytest.raises(type(error)) as raised, known_mistakes():
            raise error
        assert raised.value is error


def test_errors_of_other_processes():
    """Torch passes on texts; the last line of one that holds a D2kdError is its message."""
    text = "Caught D2kdError in DataLoader worker process 0.\nOriginal Traceback\nd2kd.errors.D2kdError: fix it\n"
    assert str(D2kdError(text)) == mistake_in_traceback(text) == "fix it"
    bug = "\n\n-- Process 1 terminated with the following error:\nTraceback\nValueError: no\n"
    assert mistake_in_traceback(bug) is None
    assert mistake_in_traceback("d2kd.errors.D2kdError: in this process") is None


def test_messages_speak_the_style_of_the_config():
    assert key("SOLVER.BASE_LR") == "SOLVER.BASE_LR"
    assert setting("SOLVER.AMP.ENABLED", True) == "SOLVER.AMP.ENABLED True"
    with lazy_keys(True):
        assert key("SOLVER.BASE_LR") == "optimizer.lr"
        assert setting("SOLVER.AMP.ENABLED", True) == "train.amp.enabled=True"
        assert (key("TEST.AUG"), setting("TEST.AUG", 1)) == ("TEST.AUG", "TEST.AUG 1")
    assert key("SOLVER.BASE_LR") == "SOLVER.BASE_LR"
