"""Mixed precision: losses in float32 and finite, both config styles, evaluation in float32."""

import copy
import re

import pytest
import torch
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from small import CONFIGS, batch, build, distill_config, gradients, save_teacher, step
from torch import nn

from d2kd.engine import main
from d2kd.engine.hooks import Watch
from d2kd.engine.precision import Autocast, amp_trainer
from d2kd.errors import D2kdError
from d2kd.experiments.pictures import read_metrics
from d2kd.methods import method_names

QUICK = str(CONFIGS / "quick_crosskd_retinanet.yaml")
LAZY = str(CONFIGS / "lazy" / "quick_crosskd_retinanet.py")
DETECTORS = ("RetinaNet", "GFL", "ATSS", "FCOS")
WIDER = ("MODEL.FPN.OUT_CHANNELS", "64")
BF16, FP32 = torch.bfloat16, torch.float32
# LD needs GFL.
PAIRS = [(m, d) for m in ("", *method_names()) for d in DETECTORS if m != "LD" or d == "GFL"]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, blood_cells):
    folder = tmp_path_factory.mktemp("teachers")
    for name in DETECTORS:
        save_teacher(folder / f"{name}.pth", "MODEL.META_ARCHITECTURE", name)
    save_teacher(folder / "wide.pth", *WIDER)
    return folder


def student(teachers, detector, methods):
    opts = ["MODEL.META_ARCHITECTURE", f"Distill{detector}"]
    teacher_opts = ["MODEL.META_ARCHITECTURE", detector]
    return build(distill_config(teachers / f"{detector}.pth", *opts, methods=methods, teacher_opts=teacher_opts))


@pytest.mark.parametrize("boxes", [pytest.param((2, 0), id="one empty"), pytest.param((0, 0), id="none")])
@pytest.mark.parametrize(("method", "detector"), PAIRS)
@pytest.mark.slow
def test_losses_are_float32_and_finite(teachers, method, detector, boxes):
    """The detector's own as well; all near those of float32, with finite gradients."""
    assert_same_in_bfloat16(student(teachers, detector, [method] if method else []), batch(boxes=boxes))


def test_adapters_of_a_narrow_student(teachers):
    model = build(distill_config(teachers / "wide.pth", teacher_opts=WIDER))
    assert_same_in_bfloat16(model, batch(boxes=(2, 0)))


def assert_same_in_bfloat16(model, inputs):
    exact = step(copy.deepcopy(model), inputs)
    with torch.autocast("cpu", BF16):
        losses = step(model, inputs)
    assert losses.keys() == exact.keys()
    for key, value in losses.items():
        assert value.dtype == FP32, key
        torch.testing.assert_close(value, exact[key], rtol=0.1, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")
    assert all(g.isfinite().all() for g in gradients(model, losses).values())


def yaml_command(folder, teachers, *opts):
    run = [f"MODEL.DISTILL.TEACHER.WEIGHTS={teachers}/RetinaNet.pth", f"OUTPUT_DIR={folder}", "SOLVER.MAX_ITER=3"]
    run += [
        "SOLVER.AMP.ENABLED=True",
        "SOLVER.EMA_DECAY=0.5",
        *(opt.replace("amp.dtype", "SOLVER.AMP.DTYPE") for opt in opts),
    ]
    return ["--config-file", QUICK, *(part for opt in run for part in opt.split("=", 1))]


def lazy_command(folder, teachers, *opts):
    run = [f"model.teacher.weights={teachers}/RetinaNet.pth", f"train.output_dir={folder}", "train.max_iter=3"]
    run += ["train.amp.enabled=True", "train.ema_decay=0.5", *(f"train.{opt}" for opt in opts)]
    return ["--config-file", LAZY, *run]


@pytest.mark.slow
@pytest.mark.parametrize("command", [yaml_command, lazy_command])
def test_a_run_on_the_cpu(command, teachers, tmp_path, monkeypatch):
    """Student and teacher run in bfloat16; evaluation, of the average too, and all weights stay in float32."""
    seen = set()
    forward = RetinaNetHead.forward

    def watched(self, features):
        outputs = forward(self, features)
        seen.add((self.training, self.cls_score.weight.requires_grad, outputs[0][0].dtype))
        return outputs

    monkeypatch.setattr(RetinaNetHead, "forward", watched)
    assert main(command(tmp_path, teachers)) == 0
    assert seen == {(True, True, BF16), (False, False, BF16), (False, True, FP32), (False, False, FP32)}
    assert "bfloat16, as always on the CPU" in (tmp_path / "log.txt").read_text()
    for name in ("model_final.pth", "model_ema_final.pth"):
        state = torch.load(tmp_path / name)["model"]
        assert "head.cls_score.weight" in state
        assert {value.dtype for value in state.values() if value.is_floating_point()} == {FP32}
    assert {"loss_crosskd_cls", "bbox/AP", "ema/bbox/AP"} <= set().union(*read_metrics(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("command", [yaml_command, lazy_command])
def test_an_unknown_type_is_told(command, teachers, tmp_path, capfd):
    assert main(command(tmp_path, teachers, "amp.dtype=bfloat")) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    key = {yaml_command: "SOLVER.AMP.DTYPE", lazy_command: "train.amp.dtype"}[command]
    assert re.search(rf"{re.escape(key)} is 'bfloat'.*did you mean bfloat16\?", error), error


def test_float16_has_a_gradient_scaler_and_bfloat16_none():
    on_device = nn.Linear(1, 1, device="meta")  # neither the CPU nor in need of a GPU
    optimizer = torch.optim.SGD(on_device.parameters(), lr=1.0)
    assert type(amp_trainer(on_device, [], optimizer, "float16")) is AMPTrainer
    trainer = amp_trainer(on_device, [], optimizer, "bfloat16")
    assert type(trainer) is SimpleTrainer
    assert isinstance(trainer.model, Autocast)


def test_a_loss_that_is_not_finite_is_still_traced_to_its_level(teachers):
    """Through the wrapper around the model."""
    model = student(teachers, "RetinaNet", ["CrossKD"])
    model.head.cls_score.bias.data.fill_(float("nan"))
    trainer = amp_trainer(model, [batch()], torch.optim.SGD(model.parameters(), lr=0.1), "bfloat16")
    with Watch(trainer), pytest.raises(D2kdError, match="not finite already: student p3"):
        trainer.train(0, 1)
