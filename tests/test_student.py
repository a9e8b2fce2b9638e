"""Students made in Python: the same as registered ones, for any dense detector, in any loop."""

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, List, Tuple

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import RetinaNet, build_model
from detectron2.modeling.meta_arch import fcos
from detectron2.utils.events import EventStorage
from small import CONFIGS, batch, build, distill_config, gradients, save_teacher, small_config, step
from torch import nn

import d2kd
from d2kd.errors import D2kdError
from d2kd.methods import PKD, CrossKD, FitNet, Schedule
from d2kd.student import student_class

WIDE = ("MODEL.FPN.OUT_CHANNELS", "64")
QUICK = str(CONFIGS / "quick_retinanet.yaml")


class Own(RetinaNet):
    """A detector that is not registered as a student."""


class Special(RetinaNet):
    """One that trains in its own way."""

    def forward_training(self, *args: Any) -> Any:
        return {**super().forward_training(*args), "loss_extra": self.pixel_mean.sum()}


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pth")


@pytest.fixture
def teacher(teacher_file: Path) -> d2kd.Teacher:
    return d2kd.load_teacher(QUICK, str(teacher_file))


@pytest.fixture
def wide_teacher(tmp_path: Path) -> d2kd.Teacher:
    """Its features need adapters."""
    return d2kd.load_teacher(QUICK, str(save_teacher(tmp_path / "wide.pth", *WIDE)), WIDE)


def own_detector() -> nn.Module:
    model = build(small_config())
    model.__class__ = Own
    return model


def detectron2_fcos() -> nn.Module:
    """detectron2's own FCOS, which no config builds."""
    model = build(small_config("MODEL.META_ARCHITECTURE", "FCOS"))
    return fcos.FCOS(
        backbone=model.backbone,
        head=fcos.FCOSHead(
            input_shape=[model.backbone.output_shape()[name] for name in model.head_in_features],
            num_classes=3,
            conv_dims=[32, 32],
        ),
        head_in_features=model.head_in_features,
        num_classes=3,
        pixel_mean=[103.53, 116.28, 123.675],
        pixel_std=[1.0, 1.0, 1.0],
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["RetinaNet", "GFL", "ATSS", "FCOS"])
def test_losses_and_gradients_are_those_of_the_registered_student(name: str, tmp_path: Path) -> None:
    opts = ("MODEL.META_ARCHITECTURE", name)
    file = save_teacher(tmp_path / "teacher.pth", *opts)
    cfg = distill_config(
        file, "MODEL.META_ARCHITECTURE", f"Distill{name}", methods=("CrossKD", "PKD"), teacher_opts=opts
    )
    cfg.MODEL.DISTILL.PKD.WEIGHT = 2.0
    registered = build(cfg)
    made = d2kd.distill(
        build(small_config(*opts)), d2kd.load_teacher(QUICK, str(file), opts), [CrossKD(cut=1), PKD(weight=2.0)]
    )
    assert type(made) is type(registered)
    assert made.state_dict().keys() == registered.state_dict().keys()
    losses, expected = made(batch()), step(registered, batch())
    assert list(losses) == list(expected)
    for key, value in expected.items():
        assert torch.equal(losses[key], value), key
    found = gradients(made, losses)
    for key, value in gradients(registered, expected).items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("make", [own_detector, detectron2_fcos])
def test_detectors_without_a_registered_student(make: Any, teacher: d2kd.Teacher) -> None:
    model = make()
    plain = step(copy.deepcopy(model), batch())
    other = d2kd.Teacher(copy.deepcopy(model), "BGR")
    student = d2kd.distill(model, other, [CrossKD(cut=1), PKD()])
    assert type(student).__name__ == f"Distill{type(model).__name__}"
    assert isinstance(student, type(model))
    losses = student(batch())
    assert {key: losses[key] for key in plain} == plain
    assert losses.keys() - plain.keys() >= {"loss_crosskd_cls", "loss_pkd_feature"}


def test_the_model_stays_the_plain_detector_and_shares_its_parameters(wide_teacher: d2kd.Teacher) -> None:
    model = build(small_config()).eval()
    names, plain = set(model.state_dict()), type(model)
    student = d2kd.distill(model, wide_teacher, [PKD()])
    assert type(model) is plain
    assert set(model.state_dict()) == names
    assert not student.training
    assert not student.distill.training
    assert dict(student.named_parameters()).items() > dict(model.named_parameters()).items()
    optimizer = torch.optim.SGD(student.train().parameters(), lr=0.1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sum(student(batch()).values()).backward()
    optimizer.step()
    assert not torch.equal(model.head.cls_score.weight, before["head.cls_score.weight"])
    assert not model.training
    assert model.double().pixel_mean.dtype == student.pixel_mean.dtype == torch.float64


def test_plain_state_dict_loads_into_stock_detectron2(wide_teacher: d2kd.Teacher, tmp_path: Path) -> None:
    student = d2kd.distill(build(small_config()), wide_teacher, [PKD()])
    assert any(name.startswith("distill.pkd.") for name in student.state_dict())
    stock = build_model(small_config())
    assert type(stock) is RetinaNet
    stock.load_state_dict(student.plain_state_dict(), strict=True)
    torch.save(student.plain_state_dict(), tmp_path / "student.pth")
    left = DetectionCheckpointer(build_model(small_config())).load(str(tmp_path / "student.pth"))
    assert left == {}  # nothing else in the file
    for name, value in student.plain_state_dict().items():
        assert torch.equal(stock.state_dict()[name], value)


@pytest.mark.parametrize("make", [own_detector, lambda: build(small_config())], ids=["own", "registered"])
def test_copies_and_pickles(make: Any, wide_teacher: d2kd.Teacher) -> None:
    student = d2kd.distill(make(), wide_teacher, [PKD(), FitNet()])
    expected = copy.deepcopy(student)(batch())
    copied, pickled = copy.deepcopy(student), pickle.loads(pickle.dumps(student))
    assert type(copied) is type(pickled) is type(student)
    assert copied.teacher is student.teacher
    assert copied.head.cls_score.weight is not student.head.cls_score.weight
    for other in (copied, pickled):
        losses = other(batch())
        assert {key: value.item() for key, value in losses.items()} == {k: v.item() for k, v in expected.items()}
    buffer = io.BytesIO()
    torch.save(student, buffer)
    buffer.seek(0)
    assert type(torch.load(buffer, weights_only=False)) is type(student)


@pytest.mark.slow
def test_a_student_travels_to_another_process(tmp_path: Path) -> None:
    model = detectron2_fcos()
    student = d2kd.distill(model, d2kd.Teacher(copy.deepcopy(model), "BGR"), [CrossKD(cut=1)])
    (tmp_path / "student.pkl").write_bytes(pickle.dumps((student, batch())))
    code = "import pickle; student, x = pickle.load(open('student.pkl', 'rb')); print(sum(student(x).values()).item())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(sum(student(batch()).values()).item(), rel=1e-5)


def test_a_plain_loop_needs_no_event_storage(teacher: d2kd.Teacher) -> None:
    student = d2kd.distill(build(small_config()), teacher, [PKD()], schedules={"PKD": Schedule(warmup=2, end=3)})
    first = [student(batch())["loss_pkd_feature"].item() for _ in range(4)]
    assert first == pytest.approx([first[1] / 2, first[1], first[1], 0.0], rel=1e-5)
    assert student.iteration == 4
    student.iteration = 0
    assert student(batch())["loss_pkd_feature"].item() == pytest.approx(first[0], rel=1e-5)
    student.eval()(batch())
    assert student.iteration == 1


def test_an_event_storage_of_the_loop_counts_and_gets_the_scalars(teacher: d2kd.Teacher) -> None:
    student = d2kd.distill(build(small_config()), teacher, [PKD()], schedules={"PKD": Schedule(end=3)})
    with EventStorage(3) as storage:
        assert student(batch())["loss_pkd_feature"].item() == 0.0
    assert student.iteration == 0
    assert "num_pos_anchors" in storage.latest()


def test_a_student_without_methods_needs_no_event_storage_either() -> None:
    student, plain = (d2kd.distill(build(small_config()), None, []) for _ in range(2))
    assert student(batch()) == step(plain, batch())


def test_a_warning_about_losses_that_would_be_lost(teacher: d2kd.Teacher, caplog: pytest.LogCaptureFixture) -> None:
    model = build(small_config())
    d2kd.distill(model, teacher, [PKD()])
    assert not caplog.records
    model.__class__ = Special
    student = d2kd.distill(model, teacher, [PKD()])
    assert "Special.forward_training is not called" in caplog.text
    assert "loss_extra" not in student(batch())


class LightningStyle(nn.Module):
    """What a LightningModule does with a student: holds it as a part and calls it."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def training_step(self, inputs: List[Any]) -> torch.Tensor:
        return sum(self.student(inputs).values())


def test_a_module_around_the_student_moves_the_teacher_too(wide_teacher: d2kd.Teacher) -> None:
    module = LightningStyle(d2kd.distill(build(small_config()), wide_teacher, [PKD()]))
    assert not any(name.startswith("student.teacher") for name in module.state_dict())
    module.double()
    assert wide_teacher.network.pixel_mean.dtype == torch.float64
    module.train().training_step(batch()).backward()
    assert not any(part.training for part in wide_teacher.network.modules())
    assert module.student.distill["pkd"].adapters[0].weight.grad.abs().sum() > 0


def test_a_methodless_student_of_a_config_can_get_methods(teacher_file: Path, teacher: d2kd.Teacher) -> None:
    methodless = build(distill_config(teacher_file, methods=()))
    student = d2kd.distill(methodless, teacher, [PKD()])
    assert type(student) is type(methodless) is student_class(RetinaNet)
    assert "loss_pkd_feature" in student(batch())
    assert not methodless.methods


def mistakes(teacher: d2kd.Teacher) -> List[Tuple[Tuple[Any, ...], dict, str]]:
    model = build(small_config())
    student = d2kd.distill(model, teacher, [PKD()])
    return [
        ((nn.Linear(1, 1), teacher, [PKD()]), {}, "a student is a dense detector such as RetinaNet, not a Linear"),
        ((student, teacher, [PKD()]), {}, "is a student already"),
        ((model, build(small_config()), [PKD()]), {}, r"the teacher is a RetinaNet; use d2kd\.load_teacher"),
        ((model, d2kd.Teacher(student.backbone, "BGR"), [PKD()]), {}, "share parameters"),
        ((model, None, [PKD()]), {}, "need a teacher"),
        ((model, teacher, PKD()), {}, "methods is a PKD; pass a list"),
        ((model, teacher, [PKD]), {}, "is not a method; pass instances"),
        ((model, teacher, ["PKD"]), {}, "'PKD' is not a method"),
        ((model, teacher, [PKD(), PKD()]), {}, "PKD is named twice"),
        ((model, teacher, [PKD()]), {"schedule": {}}, "no option 'schedule'; did you mean schedules"),
        ((model, teacher, [PKD(weight=-1.0)]), {}, "PKD's weight is -1.0"),
    ]


@pytest.mark.parametrize("index", range(11))
def test_mistakes(index: int, teacher: d2kd.Teacher) -> None:
    args, options, message = mistakes(teacher)[index]
    with pytest.raises(D2kdError, match=message):
        d2kd.distill(*args, **options)


def test_different_classes_are_a_mistake_before_training(teacher: d2kd.Teacher) -> None:
    model = build(small_config("MODEL.RETINANET.NUM_CLASSES", 5))
    with pytest.raises(D2kdError, match="5 classes and the teacher 3"):
        d2kd.distill(model, teacher, [CrossKD(cut=1)])
    student = d2kd.distill(model, teacher, [CrossKD(cut=1)], class_map=[(0, 0), (4, 2)])
    assert "loss_crosskd_cls" in student(batch())
