"""The teacher as it runs for a student: exact by default, else an inference copy that is never stale."""

import copy
import logging
import re
from types import SimpleNamespace

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from small import batch, build, distill_config, gradients, save_teacher, small_config, step
from torch import nn

from d2kd.data.loader import SeededDataset
from d2kd.diagnose import preflight
from d2kd.diagnose.reduced_teacher import compare
from d2kd.errors import D2kdError
from d2kd.heads import Cut
from d2kd.inference_copy import Engine, fold_norms, inference_copy

DETECTORS = ("RetinaNet", "GFL", "ATSS", "FCOS")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def randomize_norms(network):
    """Gives norms statistics and parameters that matter."""
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if "norm" in name and tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    return network


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    for name in DETECTORS:
        save_teacher(folder / f"{name}.pth", "MODEL.META_ARCHITECTURE", name)
        saved = torch.load(folder / f"{name}.pth")["model"]
        model = build(small_config("MODEL.META_ARCHITECTURE", name))
        model.load_state_dict(saved)
        torch.save({"model": randomize_norms(model).state_dict()}, folder / f"{name}.pth")
    return folder


def student(teachers, *opts, detector="RetinaNet", methods=("CrossKD",)):
    opts = ["MODEL.META_ARCHITECTURE", f"Distill{detector}", *opts]
    teacher_opts = ["MODEL.META_ARCHITECTURE", detector]
    return build(distill_config(teachers / f"{detector}.pth", *opts, methods=methods, teacher_opts=teacher_opts))


def with_dtype(dtype):
    return ["MODEL.DISTILL.TEACHER.DTYPE", dtype]


FOLDED = ["MODEL.DISTILL.TEACHER.FOLD_NORMS", "True"]


def gradient(model, inputs):
    grads = gradients(model, step(model, inputs))
    return torch.cat([grads[name].flatten() for name in sorted(grads)])


@pytest.mark.slow
@pytest.mark.parametrize("detector", DETECTORS)
def test_folded_norms_change_rounding_only(teachers, detector):
    """And a copy in bfloat16 the gradient by a little, under autocast too; the cross head stays exact."""
    exact, folded, short = (student(teachers, *o, detector=detector) for o in ([], FOLDED, with_dtype("bfloat16")))
    inputs = batch()
    expected = gradient(exact, inputs)
    torch.testing.assert_close(gradient(folded, inputs), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    found = gradient(short, inputs)
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.05
    seen = short.teacher(inputs, "BGR", [Cut(1)])
    assert {x.dtype for x in (*seen.features, *seen.predictions[0], *seen.taps[Cut(1)][0])} == {BF16}
    assert seen.detector is short.teacher.detector
    assert seen.detector.head.cls_score.weight.dtype == FP32
    assert seen.anchors.dtype == FP32
    assert torch.equal(seen.anchors, exact.teacher(inputs, "BGR").anchors)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d])
def test_folding(norm):
    """Both patterns; not where the convolution's own output is wanted, or where others use the convolution too."""
    torch.manual_seed(0)
    shared = nn.Conv2d(4, 4, 3, padding=1)
    network = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), norm(4), nn.ReLU()),
        Conv2d(4, 4, 3, padding=1, norm=norm(4), activation=nn.ReLU()),
        nn.Sequential(shared, norm(4)),
        nn.Sequential(shared, norm(4), nn.GroupNorm(2, 4)),
    ).eval()
    for name, tensor in network.state_dict().items():
        if name.split(".")[-1] in ("running_mean", "running_var") or tensor.dim() == 1:
            tensor.uniform_(0.5, 1.5)
    x = torch.randn(2, 3, 8, 8)
    expected, kept = network(x), copy.deepcopy(network)
    assert fold_norms(network) == 2
    assert isinstance(network[0][1], nn.Identity)
    assert isinstance(network[2][1], norm)
    torch.testing.assert_close(network(x), expected)
    assert fold_norms(kept, ["0.0"]) == 1
    torch.testing.assert_close(kept(x), expected)


def test_the_copy_shares_and_leaves_alone_what_it_does_not_convert():
    model = build(small_config()).eval()
    before = copy.deepcopy(model.state_dict())
    made = inference_copy(model, BF16)
    assert made.pixel_mean is model.pixel_mean
    assert made.anchor_generator is model.anchor_generator
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert {x.dtype for x in made.backbone.state_dict().values() if x.is_floating_point()} == {BF16}
    assert made.backbone.fpn_output3.weight.is_contiguous(memory_format=torch.channels_last)


def test_the_copy_is_made_once_and_never_stale(teachers):
    model, inputs = student(teachers, *with_dtype("bfloat16")), batch()
    teacher = model.teacher

    def scores():
        return teacher(inputs, "BGR").predictions[0][0]

    first, made = scores(), teacher.engine._copy
    scores()
    assert teacher.engine._copy is made
    with torch.no_grad():
        teacher.detector.head.cls_score.bias.add_(1)
    torch.testing.assert_close(scores(), first + 1, atol=0.1, rtol=0.1)
    teacher.network.load_state_dict(torch.load(teachers / "RetinaNet.pth")["model"])
    assert torch.equal(scores(), first)
    model.to("cpu")
    assert teacher.engine._copy is None
    assert torch.equal(scores(), first)
    assert copy.deepcopy(model).teacher is teacher
    with teacher.engine.exact():
        assert scores().dtype == FP32


def test_auto_follows_autocast(teachers):
    model, inputs = student(teachers, *with_dtype("auto")), batch()
    exact = student(teachers)
    assert all(torch.equal(x, y) for x, y in zip(step(model, inputs).values(), step(exact, inputs).values()))
    assert model.teacher.engine._copy is None
    with torch.autocast("cpu", BF16):
        assert model.teacher(inputs, "BGR").predictions[0][0].dtype == BF16
        assert model.teacher.engine._copy.head.cls_score.weight.dtype == BF16
        assert all(loss.isfinite() for loss in step(model, inputs).values())


def test_a_copy_runs_in_its_own_type_under_autocast():
    assert Engine("float16").type_on(torch.device("cuda")) == FP16
    assert Engine("float16").type_on(torch.device("cpu")) == BF16
    model, images = build(small_config()).eval(), torch.zeros(1, 3, 64, 64)
    with torch.autocast("cpu", BF16), torch.no_grad():
        for fold, dtype in ((False, "bfloat16"), (True, "float32")):
            with Engine(dtype, fold).running(model, type("", (), {"tensor": images})(), ()) as (found, own):
                assert found is not model
                assert own.tensor.dtype == getattr(torch, dtype)
                assert torch.is_autocast_enabled("cpu") == (dtype == "float32")


def test_an_unknown_type_is_told(teachers):
    with pytest.raises(D2kdError, match=r"MODEL.DISTILL.TEACHER.DTYPE is 'bfloat'.*did you mean bfloat16\?"):
        student(teachers, *with_dtype("bfloat"))


@pytest.mark.parametrize(("dtype", "amp"), [("bfloat16", ""), ("auto", "bfloat16")])
def test_the_preflight_tells_how_far_gradients_move(dtype, amp, teachers, monkeypatch, caplog):
    """And changes neither weights, random numbers nor the loss normalizer."""
    logger = logging.getLogger("d2kd")
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.INFO, "d2kd")
    monkeypatch.setattr(preflight, "examine", lambda *_: None)
    model = student(teachers, *with_dtype(dtype), "MODEL.RESNETS.NORM", "BN", methods=("CrossKD", "MGD"))
    before, normalizer, state = (
        copy.deepcopy(model.state_dict()),
        vars(model).get("loss_normalizer"),
        torch.get_rng_state(),
    )
    loader = SimpleNamespace(dataset=SeededDataset(batch(), lambda sample: sample, seed=0))
    preflight.check_teacher(model, loader, 2, amp)
    assert re.search(r"In bfloat16 the teacher moves the methods' gradient by \d\.\d+ % \(cosine 0\.99", caplog.text)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert vars(model).get("loss_normalizer") == normalizer
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_a_teacher_that_moves_gradients_far_is_told(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("d2kd"), "propagate", True)
    exact = torch.tensor([3.0, 4.0])
    compare(torch.tensor([3.0, 4.2]), exact, "bfloat16")
    assert not caplog.records
    compare(torch.tensor([3.0, 4.3]), exact, "bfloat16")
    assert "by 6.00 %" in caplog.text
    assert "MODEL.DISTILL.TEACHER.DTYPE float32 is safer" in caplog.text
    with pytest.raises(D2kdError, match=r"not finite in float16; set MODEL.DISTILL.TEACHER.DTYPE bfloat16"):
        compare(torch.tensor([3.0, torch.nan]), exact, "float16")
