"""A mistake is one sentence and exit status 2; a bug shows its traceback, on the terminal and in the log."""

import os
import re
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, build_detection_train_loader
from detectron2.data.transforms import RandomFlip, ResizeTransform, apply_augmentations
from detectron2.layers import ShapeSpec
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    build_resnet_backbone,
)
from detectron2.modeling.box_regression import Box2BoxTransform, _dense_box_regression_loss
from detectron2.structures import Boxes
from fvcore.common.param_scheduler import MultiStepParamScheduler
from isolation import restored_catalogs
from small import CONFIGS, save_teacher, small_config

from d2kd.engine import main
from d2kd.errors import (
    KNOWN_MISTAKES,
    PLEASE_REPORT,
    D2kdError,
    exit_status,
    known_mistakes,
    mistake_in_traceback,
)
from d2kd.keys import key, lazy_keys, setting
from d2kd.methods import CrossKD

QUICK = str(CONFIGS / "quick_crosskd_retinanet.yaml")
SCRIPT = """
import sys
import tempfile

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


@pytest.mark.slow
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


def test_a_message_is_one_line_of_a_bearable_length():
    error = D2kdError("a \x1b[31mred\nerror: two\u2028lines \udc80" + "x" * 38_000 + "; fix it")
    assert str(error).startswith(r"a \x1b[31mred\nerror: two\u2028lines \udc80xxx")
    assert str(error).endswith("xxx; fix it")
    assert len(str(error)) < 2100
    assert str(D2kdError(error)) == str(error)


def test_exit_statuses(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def fail(error):
        raise error

    assert exit_status(lambda: None) == 0
    assert exit_status(lambda: 75) == 75
    assert exit_status(lambda: fail(D2kdError("set KEY to 3"))) == 2
    assert capsys.readouterr().err == "error: set KEY to 3\n"
    assert exit_status(lambda: fail(KeyError("x"))) == 1
    assert capsys.readouterr().err.startswith("Traceback")
    assert not list(tmp_path.iterdir())  # a traceback goes to no file, whose name others could take before
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


def deltas_loss(kind):
    boxes = torch.zeros(1, 1, 4)
    foreground = torch.ones(1, 1, dtype=torch.bool)
    _dense_box_regression_loss([Boxes(boxes[0])], Box2BoxTransform((1.0,) * 4), [boxes], [boxes[0]], foreground, kind)


def loader(**options):
    cfg = small_config("DATASETS.TRAIN", "('known_mistakes',)", "SOLVER.IMS_PER_BATCH", 1, *options.pop("opts", ()))
    DatasetCatalog.register("known_mistakes", lambda: [{"file_name": "", "height": 8, "width": 8, "annotations": []}])
    return build_detection_train_loader(cfg, mapper=None, num_workers=0)


def flipped_pixel():
    flipped, _ = apply_augmentations([RandomFlip(1.0)], np.zeros((1, 1, 3)))
    torch.as_tensor(np.ascontiguousarray(flipped.transpose(2, 0, 1)))


def resnet_18(*opts):
    zoo = ("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.DEPTH", 18)
    build_resnet_backbone(small_config(*zoo, *opts), ShapeSpec(channels=3))


def sync_bn():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        torch.nn.SyncBatchNorm(2)(torch.zeros(2, 2, 2, 2))
    finally:
        torch.distributed.destroy_process_group()


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory")  # no other way on the CPU


# What other libraries raise, by rows of KNOWN_MISTAKES, and the start of what users read instead.
PROVOKED = [
    (out_of_memory, "the GPU's memory is full"),
    (lambda: os.write(os.open("/dev/full", os.O_WRONLY), b"x"), "the disk is full (No space left on device)"),
    (lambda: META_ARCH_REGISTRY.get("x"), "MODEL.META_ARCHITECTURE is 'x'"),
    (lambda: BACKBONE_REGISTRY.get("x"), "MODEL.BACKBONE.NAME is 'x'"),
    (lambda: ANCHOR_GENERATOR_REGISTRY.get("x"), "MODEL.ANCHOR_GENERATOR.NAME is 'x'"),
    (
        lambda: loader(opts=("DATALOADER.SAMPLER_TRAIN", "x", "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False)),
        "DATALOADER.SAMPLER_TRAIN is 'x'",
    ),
    (lambda: torch.nn.GroupNorm(32, 20), "a NORM is GN"),
    (lambda: torch.nn.BatchNorm2d(2)(torch.zeros(1, 2, 1, 1)), "a NORM has a single value"),
    (lambda: torch.nn.InstanceNorm2d(2)(torch.zeros(1, 2, 1, 1)), "a NORM has a single value"),
    (lambda: MultiStepParamScheduler([1, 0.1], 3, milestones=[5]), "SOLVER.STEPS has 5"),
    (lambda: MultiStepParamScheduler([1, 0.1, 0.01], 1), "SOLVER.STEPS has more steps"),
    (lambda: deltas_loss("x"), "MODEL.RETINANET.BBOX_REG_LOSS_TYPE is 'x'"),
    (lambda: MultiStepParamScheduler([1, 0.1], milestones=[1, 2, 3]), "lr_multiplier.scheduler.milestones"),
    (loader, "no image of known_mistakes is left"),
    (flipped_pixel, "an image has a side of a pixel or less"),
    (lambda: ResizeTransform(4, 1, 0, 0).apply_image(np.zeros((4, 1, 3), np.uint8)), "an image has a side"),
    (lambda: resnet_18("MODEL.RESNETS.RES2_OUT_CHANNELS", 8), "ResNets of MODEL.RESNETS.DEPTH 18 and 34 need MODEL"),
    (lambda: RandomFlip(horizontal=True, vertical=True), "an augmentation RandomFlip"),
    (lambda: RandomFlip(horizontal=False), "an augmentation RandomFlip"),
    (sync_bn, "a NORM is SyncBN"),
]


@pytest.mark.parametrize(("provoke", "message"), PROVOKED, ids=[message for _, message in PROVOKED])
def test_known_mistakes_are_what_the_libraries_raise(provoke, message):
    with pytest.raises(D2kdError, match="^" + re.escape(message)), known_mistakes(), restored_catalogs():
        provoke()


def test_every_known_mistake_is_provoked():
    raised = []
    for provoke, _ in PROVOKED:
        with pytest.raises(BaseException) as caught, restored_catalogs():
            provoke()
        raised.append(caught.value)
    for row in KNOWN_MISTAKES:
        assert any(isinstance(x, row.kind) and re.search(row.pattern, str(x)) for x in raised), row.pattern


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
