"""LD: parity with mmdetection's and the authors' own, and what both lack."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, List, Optional, Tuple

import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes, Instances
from goldens import Golden, cases, close, of_committed_goldens
from torch import Tensor

from d2kd.dense import DenseOutputs, Targets
from d2kd.errors import D2kdError
from d2kd.losses import kl_divergence_loss
from d2kd.methods.ld import LD, center_distances, valuable_region

LOSS, GRADIENT = 1e-5, 1e-3
FULL = {"vlr_weight": 0.25, "cls_weight": 10.0}
NAMES = {"loss_ld_main": "loss_ld", "loss_ld_vlr": "loss_ld_vlr", "loss_ld_cls": "loss_kd"}


def detector_cases(*prefixes: str) -> List[Path]:
    found = [path for prefix in prefixes for path in cases(prefix)]
    return [path for path in found if "in.reg_student.0" in Golden(path)]


def detector(num_classes: int, strides: List[int], scale: float, reg_max: Optional[int] = 16) -> Any:
    """Stands for a GFL: what a method reads of it."""
    coder = SimpleNamespace() if reg_max is None else SimpleNamespace(reg_max=reg_max)
    generator = DefaultAnchorGenerator(
        sizes=[[scale * s] for s in strides], aspect_ratios=[1.0], strides=strides, offset=0.0
    )
    return SimpleNamespace(num_classes=num_classes, box2box_transform=coder, anchor_generator=generator)


class Case:
    """Both detectors' outputs, the student's as leaves, and the targets."""

    def __init__(self, path: Path) -> None:
        self.golden = golden = Golden(path)
        settings = golden.json("settings")
        self.strides = golden["in.strides"].tolist()
        reg_max = settings["reg_max"]
        model = detector(settings["num_classes"], self.strides, settings["octave_base_scale"], reg_max)
        self.logits, self.sides = ([x.requires_grad_() for x in self.levels(f"in.{k}_student")] for k in ("cls", "reg"))
        self.student = DenseOutputs(model, self.sides, (self.logits, self.sides))
        has_classes = "in.cls_teacher.0" in golden
        teacher_logits = self.levels("in.cls_teacher") if has_classes else [x.detach() for x in self.logits]
        self.teacher = DenseOutputs(model, self.sides, (teacher_logits, self.levels("in.reg_teacher")))
        instances = []
        for i, size in enumerate(golden["in.img_shape"].tolist()):
            image = Instances(tuple(size))
            image.gt_boxes = Boxes(golden[f"in.gt_boxes.{i}"])
            image.gt_classes = golden[f"in.gt_labels.{i}"]
            instances.append(image)
        labels, boxes, weights = (
            torch.cat(self.levels(f"tgt.{name}"), dim=1) for name in ("labels", "bbox_targets", "label_weights")
        )
        positive = (labels < settings["num_classes"]) & (weights > 0)
        padded = tuple(golden["in.pad_shape"].amax(0).tolist())
        self.targets = Targets(instances, labels.long(), boxes, weights, torch.tensor(1.0), positive, padded)

    def levels(self, name: str) -> List[Tensor]:
        return [self.golden[f"{name}.{level}"] for level in range(len(self.strides))]

    def method(self, **options: Any) -> LD:
        return LD(vlr_topk=self.golden.json("settings")["topk"], **options)

    def losses(self, **options: Any) -> Any:
        return self.method(**options)(self.student, self.teacher, self.targets)


def check(case: Case, ours: str, value: Tensor, leaves: List[Tensor], leaf: str) -> None:
    """Compares a loss with the sum over levels, and its gradient level by level."""
    name = NAMES[ours]
    close(value, case.golden[f"out.{name}"].sum(), LOSS, name)
    gradients = torch.autograd.grad(value, leaves, retain_graph=True)
    expected = case.levels(f"grad.{name}.{leaf}")
    largest = max(float(g.abs().max()) for g in expected)
    for mine, theirs in zip(gradients, expected):
        assert float((mine - theirs).abs().max()) <= GRADIENT * largest


@of_committed_goldens
def test_there_are_cases() -> None:
    assert detector_cases("ld_mmdet3_")
    assert detector_cases("ld_repo_")
    assert cases("ld_repo_regions")
    assert cases("ld_mmdet3_kldiv")


@pytest.mark.parametrize("path", detector_cases("ld_mmdet3_", "ld_repo_"), ids=lambda p: p.stem)
def test_parity_of_the_main_region(path: Path) -> None:
    case = Case(path)
    losses = case.losses()
    assert list(losses) == ["loss_ld_main"]
    check(case, "loss_ld_main", losses["loss_ld_main"], case.sides, "reg_student")


@pytest.mark.parametrize("path", detector_cases("ld_repo_"), ids=lambda p: p.stem)
def test_parity_of_the_full_recipe(path: Path) -> None:
    case = Case(path)
    usable = case.targets.weights > 0
    anchors = torch.cat(case.levels("tgt.anchors"), dim=1)
    for ours, theirs in zip(usable, anchors):
        close(case.student.anchors[ours], theirs[ours], LOSS, "anchors")
    region = case.method(**FULL).region(case.student, case.targets)
    close(region, torch.cat(case.levels("tgt.vlr_region"), dim=1), LOSS, "region")
    losses = case.losses(**FULL)
    check(case, "loss_ld_main", losses["loss_ld_main"], case.sides, "reg_student")
    check(case, "loss_ld_vlr", losses["loss_ld_vlr"], case.sides, "reg_student")
    check(case, "loss_ld_cls", losses["loss_ld_cls"], case.logits, "cls_student")
    assert not case.golden["out.loss_kd_neg"].any()


@pytest.mark.parametrize("path", cases("ld_repo_regions"), ids=lambda p: p.stem)
def test_parity_of_the_region(path: Path) -> None:
    golden = Golden(path)
    settings = golden.json("settings")
    assert settings["sets"]
    for k in range(len(settings["sets"])):
        anchors = [Boxes(x) for x in golden[f"{k}.in.anchors"].split(golden[f"{k}.in.num_level"].tolist())]
        boxes = Boxes(golden[f"{k}.in.gt_boxes"])
        usable = torch.ones(len(golden[f"{k}.in.anchors"]), dtype=torch.bool)
        topk = settings["topk"]
        close(valuable_region(anchors, usable, boxes, topk), golden[f"{k}.out.vlr_region"], LOSS, "region")
        true = valuable_region(anchors, usable, boxes, topk, true_diou=True)
        close(true, golden[f"{k}.derived.vlr_region_true_diou"], LOSS, "region by true DIoU")
        assert not valuable_region(anchors, ~usable, boxes).any()
        assert not valuable_region(anchors, usable, boxes[torch.zeros(0, dtype=torch.long)]).any()


@pytest.mark.parametrize("path", cases("ld_mmdet3_kldiv"), ids=lambda p: p.stem)
def test_parity_of_the_divergence(path: Path) -> None:
    golden = Golden(path)
    for k, combo in enumerate(golden.json("settings")["combos"]):
        pred = golden["in.pred"].clone().requires_grad_()
        loss = kl_divergence_loss(pred, golden["in.soft"], combo["T"])
        if combo["class_reduction"] == "mean":
            loss = loss / pred.shape[-1]
        loss = combo["loss_weight"] * loss * (golden["in.weight"] if combo["weight"] else 1)
        if combo["reduction"] != "none":
            loss = loss.sum()
        if combo["reduction"] == "mean":
            loss = loss / (combo["avg_factor"] or len(pred))
        close(loss, golden[f"out.{k}"], LOSS, str(combo))
        (gradient,) = torch.autograd.grad(loss.sum(), pred)
        close(gradient, golden[f"grad.pred.{k}"], GRADIENT, f"gradient of {combo}")


def random_case(boxes: Tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tuple[DenseOutputs, ...]:
    """Student, teacher and targets of random values for images of 64 x 64 with some boxes each."""
    generator = torch.Generator().manual_seed(0)
    model = detector(3, [8, 16], 4)
    pair = []
    for _ in range(2):
        logits, sides = (
            [torch.randn(len(boxes), c, s, s, generator=generator).to(dtype).requires_grad_() for s in (8, 4)]
            for c in (3, 68)
        )
        pair.append(DenseOutputs(model, logits, (logits, sides)))
    instances = []
    for count in boxes:
        image = Instances((64, 64), gt_boxes=Boxes(torch.tensor([[8.0, 8.0, 40.0, 44.0]]).repeat(count, 1)))
        instances.append(image)
    labels = torch.full((len(boxes), 80), 3)
    for i, count in enumerate(boxes):
        labels[i, 9 : 9 + count] = 1
    weights = torch.ones(len(boxes), 80)
    targets = Targets(
        instances, labels, weights.new_zeros(*labels.shape, 4), weights, torch.tensor(1.0), labels < 3, (64, 64)
    )
    return (*pair, targets)


@pytest.mark.parametrize("boxes", [(2, 1), (0, 1), (0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_and_without_ground_truth(boxes: Tuple[int, ...], dtype: torch.dtype) -> None:
    student, teacher, targets = random_case(boxes, dtype)
    losses = LD(**FULL)(student, teacher, targets)
    assert list(losses) == list(NAMES)
    for value in losses.values():
        assert value.dtype == torch.float32
        assert value.shape == ()
        assert (value > 0) == (sum(boxes) > 0)
    sum(losses.values()).backward()
    for level in (*student.predictions[0], *student.predictions[1]):
        assert level.grad.isfinite().all()
    assert all(level.grad is None for level in (*teacher.predictions[0], *teacher.predictions[1]))


def test_equal_detectors_have_no_loss_and_ignored_anchors_none_either() -> None:
    student, teacher, targets = random_case((2, 1))
    assert all(abs(float(v)) < 1e-5 for v in LD(**FULL)(student, student, targets).values())
    targets.weights.zero_()
    targets.positive.zero_()
    assert not any(LD(**FULL)(student, teacher, targets).values())


def test_only_enabled_terms_are_there() -> None:
    student, teacher, targets = random_case((0, 1))
    assert list(LD(vlr_weight=0.25)(student, teacher, targets)) == ["loss_ld_main", "loss_ld_vlr"]
    assert list(LD(cls_weight=10.0)(student, teacher, targets)) == ["loss_ld_main", "loss_ld_cls"]


def test_per_image_the_box_losses_are_means_over_images() -> None:
    case = random_case((2, 1, 1))
    sums, means = (LD(**FULL, per_image=per_image)(*case) for per_image in (False, True))
    for key in ("loss_ld_main", "loss_ld_vlr"):
        close(means[key] * 3, sums[key], LOSS, key)
    close(means["loss_ld_cls"], sums["loss_ld_cls"], LOSS, "loss_ld_cls")


@pytest.mark.parametrize(("own", "theirs"), [(None, 16), (16, None), (16, 8), (None, None)])
def test_heads_that_do_not_fit_are_refused(own: Optional[int], theirs: Optional[int]) -> None:
    LD().setup(detector(3, [8], 4, 16), detector(3, [8], 4, 16), [(8, 8)])
    with pytest.raises(D2kdError, match=f"the student has {own} and the teacher {theirs}"):
        LD().setup(detector(3, [8], 4, own), detector(3, [8], 4, theirs), [(8, 8)])


def test_center_distances() -> None:
    boxes = Boxes(torch.tensor([[0.0, 0.0, 2.0, 2.0]]))
    others = Boxes(torch.tensor([[0.0, 0.0, 2.0, 2.0], [2.0, 0.0, 4.0, 2.0]]))
    assert center_distances(boxes, others).tolist() == [[0.0, pytest.approx(4 / 20)]]
