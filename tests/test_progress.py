"""Progress: bars on a terminal, over which the log stays, and plain lines elsewhere."""

import fcntl
import logging
import os
import pty
import struct
import sys
import termios
import threading
from types import SimpleNamespace

import pytest
from detectron2.utils.events import EventStorage
from small import CONFIGS

from d2kd.engine import main
from d2kd.engine.hooks import Progress
from d2kd.experiments import series
from d2kd.experiments.series import Run, run_all
from d2kd.progress import log_above_bars, progress_bar


class Terminal:
    """Stands for the terminal that a process prints to; what it shows is read all the time."""

    def __init__(self):
        reading, writing = pty.openpty()
        fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        self.file = os.fdopen(writing, "w")
        self._reading, self._parts = reading, []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self):
        while True:
            try:
                self._parts.append(os.read(self._reading, 4096))
            except OSError:  # the other end is closed
                return

    def shown(self):
        self.file.close()
        self._thread.join(timeout=10)
        os.close(self._reading)
        return b"".join(self._parts).decode()


def open_terminal(monkeypatch):
    """Not a fixture: pytest sets sys.stdout again before the test begins."""
    made = Terminal()
    monkeypatch.setattr(sys, "stdout", made.file)
    return made


def test_a_training_shows_iterations_loss_and_ap(monkeypatch):
    terminal = open_terminal(monkeypatch)
    progress = Progress()
    with EventStorage() as storage:
        progress.trainer = SimpleNamespace(iter=3, max_iter=8, storage=storage)
        storage.put_scalar("total_loss", 2.5)
        progress.after_step()
        progress.hide()
        storage.put_scalar("val/bbox/AP", 31.04, smoothing_hint=False)
        print("COCO prints", file=terminal.file)
        progress.trainer.iter = 4
        progress.after_step()
        progress.after_train()
    before, after = terminal.shown().split("COCO prints")
    assert "training  50%" in before
    assert "4/8 [ETA " in before
    assert ", loss 2.5" in before
    assert before.endswith("\r"), "the bar is gone before others print"
    assert "5/8" in after
    assert ", loss 2.5, AP 31.0" in after


def test_logs_stay_above_the_bar_and_do_not_repeat_it(monkeypatch):
    terminal = open_terminal(monkeypatch)
    logger = logging.getLogger("tests.progress")
    for stream in (terminal.file, sys.stderr):
        logger.addHandler(logging.StreamHandler(stream))
    logger.propagate = False
    with log_above_bars(["tests.progress"]):
        for _ in progress_bar(range(2), desc="work"):
            logger.warning("Inference done 1/2")
            logger.warning("news")
    handlers = list(logger.handlers)
    assert [handler.filters for handler in handlers] == [[], []]
    shown = terminal.shown()
    assert shown.count("\rnews\r\n") == 2
    assert "work   0%" in shown
    assert "Inference" not in shown


def test_elsewhere_there_is_no_bar_and_all_of_the_log(capsys):
    logger = logging.getLogger("tests.progress_elsewhere")
    logger.addHandler(logging.StreamHandler(sys.stdout))
    with log_above_bars([logger.name]):
        for _ in progress_bar(range(2), desc="work"):
            logger.warning("Inference done 1/2")
    assert capsys.readouterr().out == "Inference done 1/2\n" * 2


# Stands for train_net.py, half way until that has been seen.
SCRIPT = """
import json, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
records = [{"iteration": 19, "time": 3.0, "total_loss": 1.5, "bbox/AP": 7.0}, {"iteration": 39, "bbox/AP": 8.0}]
(folder / "metrics.json").write_text(json.dumps(records[0]))
while not (folder / "seen").exists():
    time.sleep(0.05)
(folder / "metrics.json").write_text("\\n".join(map(json.dumps, records)))
(folder / "model_final.pth").touch()
"""


class Fake(Run):
    def command(self):
        return [sys.executable, "-c", SCRIPT, str(self.folder)]

    def progress(self):
        done, text = super().progress()
        if done:
            (self.folder / "seen").touch()
        return done, text


def test_a_series_shows_a_bar_for_each_run_and_a_line_at_its_end(tmp_path, monkeypatch):
    terminal = open_terminal(monkeypatch)
    run_all([Fake("student", "c.yaml", tmp_path, 1, 40, "bccd")])
    shown = terminal.shown()
    assert "[1/1] student (seed 1)  50%|" in shown
    assert "| 20/40, loss 1.50, AP 7.0, ETA 60 s" in shown
    assert "[1/1] student (seed 1): AP 8.0 after " in shown.splitlines()[-1]


def test_a_series_in_a_file_has_a_line_now_and_then(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(series, "LINE_SECONDS", 0.0)
    run_all([Fake("student", "c.yaml", tmp_path, 1, 40, "bccd")])
    lines = capsys.readouterr().out.splitlines()
    assert "[1/1] student (seed 1): 20/40, loss 1.50, AP 7.0, ETA 60 s" in lines
    assert lines[-1].startswith("[1/1] student (seed 1): AP 8.0 after ")


@pytest.mark.slow
def test_on_a_terminal_a_run_shows_bars_and_each_line_once(blood_cells, tmp_path, monkeypatch):
    """The lines of metrics are in the file."""
    terminal = open_terminal(monkeypatch)
    opts = ["SOLVER.MAX_ITER", "4", "TEST.EVAL_PERIOD", "2", "OUTPUT_DIR", str(tmp_path)]
    assert main(["--config-file", str(CONFIGS / "quick_retinanet.yaml"), *opts]) == 0
    shown, log = terminal.shown(), (tmp_path / "log.txt").read_text()
    for words in ("training ", "/4 [ETA ", "evaluating on blood_cells_val", "/4 [ETA "):
        assert words in shown
    for text, metrics in ((shown, 0), (log, 1)):
        assert text.count("Starting training from iteration 0") == 1
        assert text.count("total_loss:") == metrics
