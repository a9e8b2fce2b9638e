"""Short runs of the quick config, their commands, and faults that end them."""

import os
import signal

import torch
from iopath.common.file_io import file_lock
from small import CONFIGS

from d2kd.checkpoint import files
from d2kd.engine import main

ROOT = CONFIGS.parent
QUICK = str(CONFIGS / "quick_crosskd_retinanet.yaml")
LAZY = str(CONFIGS / "lazy" / "quick_crosskd_retinanet.py")
SHORT = ["SEED", "5", "SOLVER.MAX_ITER", "6", "SOLVER.CHECKPOINT_PERIOD", "2"]
SHORT += ["SOLVER.WARMUP_ITERS", "2", "DATASETS.TEST", "()"]
RANDOM_VIEWS = ["INPUT.CROP.ENABLED", "True", "INPUT.MIN_SIZE_TRAIN", "(96,112,128)"]
UNEQUAL = ["MODEL.DISTILL.METHODS", "('PKD', 'MGD', 'CrossKD')"]
UNEQUAL += ["MODEL.DISTILL.TEACHER.OPTS", "['MODEL.FPN.OUT_CHANNELS','64']"]
LAZY_SHORT = ["train.seed=5", "train.max_iter=6", "train.checkpointer.period=2", "train.eval_period=0"]


def made_once(tmp_path_factory, name, make):
    """A folder that ``make`` fills for all processes of pytest-xdist: the first one calls it while others wait."""
    ours = tmp_path_factory.getbasetemp()
    folder = (ours.parent if "PYTEST_XDIST_WORKER" in os.environ else ours) / name
    with file_lock(str(folder)):
        if not folder.exists():
            unfinished = folder.with_suffix(".unfinished")
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(folder)
    return folder


class Killed(BaseException):
    """Ends a run as kill -9 does: no code of the run catches it."""


def kill():
    raise Killed


def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


def command(folder, teachers, *opts, teacher="teacher.pth", flags=()):
    weights = str(teachers / teacher)
    run = ["MODEL.DISTILL.TEACHER.WEIGHTS", weights, "OUTPUT_DIR", str(folder)]
    return ["--config-file", QUICK, *flags, *SHORT, *run, *map(str, opts)]


def lazy_command(folder, teachers, *opts, flags=()):
    run = [f"model.teacher.weights={teachers}/teacher.pth", f"train.output_dir={folder}"]
    return ["--config-file", LAZY, *flags, *LAZY_SHORT, *run, *opts]


def train(folder, teachers, *opts, make=command, **options):
    return main(make(folder, teachers, *opts, **options))


def resume(folder, teachers, *opts, **options):
    return train(folder, teachers, *opts, flags=("--resume",), **options)


def assert_same(one, two, where=""):
    """Equal to the last bit, through nested containers."""
    assert type(one) is type(two), where
    if isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            assert_same(one[key], two[key], f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), where
        for i, pair in enumerate(zip(one, two)):
            assert_same(*pair, f"{where}/{i}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, two), where
    else:
        assert one == two, where


def assert_same_end(one, two):
    assert_same(files.read(str(one / "model_final.pth")), files.read(str(two / "model_final.pth")))


def last_error(capfd):
    return capfd.readouterr().err.strip().splitlines()[-1]
