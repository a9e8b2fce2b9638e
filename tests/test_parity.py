"""Parity with numbers measured by running the authors' own code.

``D2KD_GOLDENS`` names the folder of the goldens (default ``tests/goldens``); the cases are found by file name.
Tolerances: losses and predictions 1e-5 of the largest, gradients 1e-3 of the largest.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from fvcore.nn import sigmoid_focal_loss
from goldens import (
    BLOCKS,
    GOLDENS,
    Case,
    Golden,
    Maps,
    cases,
    close,
    covered_cases,
    detector_cases,
    retinanet_args,
    slot_order,
)
from torch import Tensor

from d2kd.dense import DenseOutputs, anchors_inside, make_targets, run_dense
from d2kd.losses import giou_loss, iou_log_loss, kd_quality_focal_loss, kl_divergence_loss
from d2kd.methods import PKD
from d2kd.methods.crosskd import align_scale
from d2kd.modeling import FCOS
from d2kd.modeling.boxes import decode_boxes
from d2kd.modeling.one_anchor import OneAnchorDetector

LOSS, GRADIENT = 1e-5, 1e-3
NAMES = {
    "loss_crosskd_cls": "loss_cls_kd",
    "loss_crosskd_box": "loss_reg_kd",
    "loss_crosskd_centerness": "losses_center_kd",
    "loss_pkd_feature": "loss_feat_kd",
}
# What the reference divides FCOS's KD losses by where there is no ground truth; d2kd divides by 1.
FCOS_FLOOR = 1e-6 + torch.finfo(torch.float32).eps

all_cases = pytest.mark.parametrize("path", detector_cases(), ids=lambda p: p.stem)


def test_there_are_cases() -> None:
    print(f"{len(covered_cases())} golden cases in {GOLDENS}")
    assert covered_cases(), f"no golden case in {GOLDENS}"


def in_our_order(per_level: List[Tensor]) -> Tensor:
    return torch.cat([slot_order(level) for level in per_level], dim=1)


def retinanet_losses(case: Case, predictions: List[List[Tensor]]) -> Dict[str, Tensor]:
    """The reference's RetinaNet losses: focal and L1 over N+, without the anchors in padding; ours are detectron2's."""
    student = DenseOutputs(case.student, predictions[0], tuple(predictions))
    labels, weights, boxes = (case.targets(name) for name in ("labels", "label_weights", "bbox_targets"))
    num_classes, num_pos = case.student.num_classes, case.find("target.labels.p3")["target.avg_factor"]
    one_hot = F.one_hot(labels, num_classes + 1)[..., :-1].float()
    focal = sigmoid_focal_loss(student.logits, one_hot, alpha=0.25, gamma=2.0).sum(-1)
    positive = (labels < num_classes) & (weights > 0)
    l1 = (student.box_predictions - boxes).abs().sum(-1)
    return {"loss_cls": (focal * weights).sum() / num_pos, "loss_bbox": l1[positive].sum() / num_pos}


class Run:
    """One training step of a case through the model's own forward, with the reference's detection losses."""

    def __init__(self, path: Path) -> None:
        self.case = Case(path)
        seen: List[Any] = []
        hook = self.case.student.head.register_forward_hook(lambda _m, _i, output: seen.append(output))
        with EventStorage():
            losses = self.case.student(self.case.batch())
        hook.remove()
        assert len(seen) == 1, "the student's head ran more than once"
        self.predictions = seen[0]
        self.kd = {key: value for key, value in losses.items() if key in NAMES}
        self.detection = {name: losses[key] for key, name in self.case.kind.losses.items()}
        if not self.detection:
            self.detection = retinanet_losses(self.case, self.predictions)
        labels = self.case.targets("labels")
        if self.case.kind.plain is FCOS and not (labels < self.case.student.num_classes).any():
            self.kd = {k: v if k == "loss_pkd_feature" else v / FCOS_FLOOR for k, v in self.kd.items()}
        self.total = sum(self.kd.values()) + sum(self.detection.values())

    def backward(self) -> None:
        self.total.backward()


@all_cases
def test_losses(path: Path) -> None:
    run = Run(path)
    golden = run.case.golden
    theirs = {key: value for key, value in golden.group("loss.").items() if not key.endswith("per_level")}
    feature = [value for key, value in theirs.items() if key.startswith("loss_feat_kd")]  # FCOS: one key per level
    expected = {ours: theirs[name] for ours, name in NAMES.items() if name in theirs}
    if feature:
        expected["loss_pkd_feature"] = torch.stack(feature).sum()
    assert run.kd.keys() == expected.keys()
    for name, value in expected.items():
        close(run.kd[name], value, LOSS, name)
    for name, value in run.detection.items():
        close(value, golden[f"loss.{name}"], LOSS, name)
    close(run.total, golden["loss.total"], LOSS, "total")


@all_cases
def test_gradients(path: Path) -> None:
    run = Run(path)
    run.backward()
    parameters = dict(run.case.student.named_parameters())
    compared = 0
    if not run.case.full:
        for ours, theirs in zip(run.case.maps, run.case.golden.levels("grad.stu.fpn.{}")):
            close(ours.grad, theirs, GRADIENT, "FPN map")
    for name, golden in run.case.gradients("grad.").items():
        if name in parameters and not golden.isnan().any():
            close(parameters[name].grad, golden, GRADIENT, name)
            compared += 1
    for name, norm in run.case.norms().items():
        assert parameters[name].grad.norm().item() == pytest.approx(norm, rel=GRADIENT), name
    assert compared, "no gradient was compared"


@all_cases
def test_targets_and_predictions(path: Path) -> None:
    case = Case(path)
    batch = case.batch()
    images = case.student.preprocess_image(batch)
    student = run_dense(case.student, images, case.student.methods[0].cuts)
    labels, boxes = case.student.label_anchors(student.anchors_per_level, [x["instances"] for x in batch])
    targets = make_targets(student, images, [x["instances"] for x in batch], labels, boxes)
    expected = case.targets("labels")
    weights = targets.weights
    if case.kind.plain is not FCOS:  # which has neither weights nor this normaliser
        weights = case.targets("label_weights")
        assert torch.equal(targets.weights, weights)
        assert float(targets.num_pos) == float(case.find("target.labels.p3")["target.avg_factor"])
    assert torch.equal(torch.where(weights > 0, targets.labels, -1), torch.where(weights > 0, expected, -1))
    teacher = case.student.teacher(batch, case.student.input_format, case.student.methods[0].cuts)
    if case.full:
        close_levels(student.features, case.inputs.levels("stu.fpn.{}"), "student FPN")
        close_levels(teacher.features, case.teacher_file.levels("tea.fpn.{}"), "teacher FPN")
    check_predictions(case, student, case.inputs, "stu.pred_{}.{{}}")
    check_predictions(case, teacher, case.teacher_file, "tea.pred_{}.{{}}")
    if "cross.pred_cls.p3" in case.golden:
        check_predictions(case, case.student.methods[0].cross(student, teacher), case.golden, "cross.pred_{}.{{}}")
    if "aligned_cls.p3" in case.golden:
        check_alignment(case, student, teacher)


def check_predictions(case: Case, ours: DenseOutputs, golden: Golden, pattern: str) -> None:
    parts = {"cls": ours.logits, "reg": ours.box_predictions, "ctr": ours.centerness}
    for name, values in parts.items():
        if values is None:
            continue
        values = values[..., None] if name == "ctr" else values
        maps = golden.levels(pattern.format(name))
        rows = [m.unflatten(1, (-1, values.shape[-1])).permute(0, 3, 4, 1, 2).flatten(1, 3) for m in maps]
        close(values, case.order(rows), LOSS, pattern.format(name))


def check_alignment(case: Case, student: DenseOutputs, teacher: DenseOutputs) -> None:
    cut = case.student.methods[0].cut
    for tower, name in enumerate(("cls", "reg")):
        own, theirs = student.towers(cut)[tower], teacher.towers(cut)[tower]
        close_levels(own, case.golden.levels(f"stu.hold_{name}.{{}}"), "student hold")
        close_levels(theirs, case.golden.levels(f"tea.hold_{name}.{{}}"), "teacher hold")
        aligned = [align_scale(s, t) for s, t in zip(own, theirs)]
        close_levels(aligned, case.golden.levels(f"aligned_{name}.{{}}"), "aligned")


def close_levels(ours: List[Tensor], golden: List[Tensor], what: str) -> None:
    for level, (mine, theirs) in enumerate(zip(ours, golden)):
        close(mine, theirs, LOSS, f"{what} level {level}")


def block(name: str) -> Any:
    assert name in BLOCKS
    return pytest.mark.parametrize("path", cases(name), ids=lambda p: p.stem)


@block("blocks_losses_cls")
def test_kd_quality_focal_loss(path: Path) -> None:
    golden = Golden(path)
    for beta in (1, 2):
        pred = golden["kdqfl.pred"].clone().requires_grad_()
        none = kd_quality_focal_loss(pred, golden["kdqfl.target_logits"], beta)
        weighted = none * golden["kdqfl.weight"][:, None]
        results = {"none": weighted, "avg": weighted.sum() / golden["kdqfl.avg_factor"], "mean": weighted.mean()}
        for reduction, ours in results.items():
            name = f"kdqfl_beta{beta}.{reduction}"
            close(ours, golden[name], LOSS, name)
            (grad,) = torch.autograd.grad(ours.sum(), pred, retain_graph=True)
            close(grad, golden[f"{name}.grad"], GRADIENT, f"{name}.grad")


@block("blocks_losses_cls")
def test_kl_divergence_loss(path: Path) -> None:
    """Names are kl_<class reduction>_T<temperature>_w<weight>; w025 is 0.25."""
    golden = Golden(path)
    names = {key.split(".")[0] for key in golden.arrays if key.startswith("kl_")}
    assert names
    for name in sorted(names):
        _, reduction, temperature, digits = name.split("_")
        weight = float(f"0.{digits[2:]}" if digits[1] == "0" else digits[1:])
        pred = golden["kl.pred"].clone().requires_grad_()
        target = golden["kl.soft_label"]
        none = kl_divergence_loss(pred, target, float(temperature[1:]))
        none = none / pred.shape[1] if reduction == "mean" else none
        weighted = weight * none * golden["kl.weight"]
        results = {"none": weighted, "avg": weighted.sum() / golden["kl.avg_factor"], "mean": weighted.mean()}
        for key, ours in results.items():
            if f"{name}.{key}" in golden:
                close(ours, golden[f"{name}.{key}"], LOSS, f"{name}.{key}")
                (grad,) = torch.autograd.grad(ours.sum(), pred, retain_graph=True)
                close(grad, golden[f"{name}.{key}.grad"], GRADIENT, f"{name}.{key}.grad")


@block("blocks_losses_iou")
def test_box_losses(path: Path) -> None:
    golden = Golden(path)
    for prefix, loss, weight in (
        ("giou_w1", giou_loss, 1),
        ("giou_w2", giou_loss, 2),
        ("iou_log_w075", iou_log_loss, 0.75),
    ):
        pred = golden["pred"].clone().requires_grad_()
        weighted = weight * loss(pred, golden["target"]) * golden["weight"]
        results = {"none": weighted, "avg": weighted.sum() / golden["avg_factor"], "mean": weighted.mean()}
        for reduction, ours in results.items():
            name = f"{prefix}.{reduction}"
            close(ours, golden[name], LOSS, name)
            (grad,) = torch.autograd.grad(ours.sum(), pred, retain_graph=True)
            close(grad, golden[f"{name}.grad"], GRADIENT, f"{name}.grad")


@block("blocks_pkd_align")
def test_pkd_and_alignment(path: Path) -> None:
    golden = Golden(path)
    shapes = sorted({key.split(".")[0] for key in golden.arrays if key.endswith(".student")})
    assert shapes
    for shape in shapes:
        teacher = golden[f"{shape}.teacher"]
        for weight in (1.0, 6.0):
            student = golden[f"{shape}.student"].clone().requires_grad_()
            outputs = [DenseOutputs(None, [x]) for x in (student, teacher)]
            method = PKD(weight=weight)
            method.setup(None, None, [(student.shape[1], teacher.shape[1])])
            loss = method(*outputs, None)["loss_pkd_feature"]
            close(loss, golden[f"{shape}.pkd_w{weight:.0f}"], LOSS, "pkd")
            loss.backward()
            close(student.grad, golden[f"{shape}.pkd_w{weight:.0f}.grad"], GRADIENT, "pkd gradient")
        student = golden[f"{shape}.student"].clone().requires_grad_()
        aligned = align_scale(student, teacher)
        close(aligned, golden[f"{shape}.aligned"], LOSS, "aligned")
        (aligned * golden[f"{shape}.upstream"]).sum().backward()
        close(student.grad, golden[f"{shape}.aligned.grad"], GRADIENT, "gradient of the alignment")


@block("blocks_coders")
def test_delta_coder(path: Path) -> None:
    golden = Golden(path)
    for name, weights in (("delta", (1.0, 1.0, 1.0, 1.0)), ("delta_atss", (10.0, 10.0, 5.0, 5.0))):
        coder = Box2BoxTransform(weights=weights)
        close(coder.get_deltas(golden[f"{name}.anchors"], golden[f"{name}.gt"]), golden[f"{name}.encoded"], LOSS, name)
        deltas = golden[f"{name}.deltas"].clone().requires_grad_()
        boxes = decode_boxes(coder, deltas, golden[f"{name}.anchors"])
        close(boxes, golden[f"{name}.decoded"], LOSS, f"{name} decoded")
        boxes.sum().backward()
        if not deltas.grad.equal(golden[f"{name}.decoded.grad"]):
            close(deltas.grad, golden[f"{name}.decoded.grad"], GRADIENT, f"{name} gradient")


def retinanet_of_blocks(golden: Golden, num_classes: int) -> RetinaNet:
    """A stock RetinaNet with the reference's default anchors and assignment, on maps of the golden's size."""
    height, width = golden["batch_shape"].tolist()
    maps = [torch.zeros(2, 4, -(-height // s), -(-width // s)) for s in (8, 16, 32, 64, 128)]
    config = {
        "bbox_head": {
            "anchor_generator": {"octave_base_scale": 4, "ratios": [0.5, 1.0, 2.0], "scales_per_octave": 3}
            | {"strides": [8, 16, 32, 64, 128]},
            "bbox_coder": {"target_stds": [1.0] * 4},
            "feat_channels": 4,
            "in_channels": 4,
            "stacked_convs": 1,
            "num_classes": num_classes,
        },
        "train_cfg": {"assigner": {"neg_iou_thr": 0.4, "pos_iou_thr": 0.5}},
        "test_cfg": {"score_thr": 0.05, "nms": {"iou_threshold": 0.5}},
    }
    return RetinaNet(**retinanet_args(config, Maps(maps)))


def outputs_of(model: RetinaNet) -> DenseOutputs:
    return DenseOutputs(model, model.backbone.maps)


def images_of(golden: Golden) -> ImageList:
    height, width = golden["batch_shape"].tolist()
    return ImageList(torch.zeros(2, 3, height, width), [tuple(s) for s in golden["img_shapes"].tolist()])


@block("blocks_anchors")
def test_anchors_and_validity(path: Path) -> None:
    golden = Golden(path)
    model = retinanet_of_blocks(golden, 5)
    outputs = outputs_of(model)
    anchors = in_our_order([level[None] for level in golden.levels("retinanet.anchors.{}")])[0]
    close(outputs.anchors, anchors, LOSS, "anchors")
    inside = anchors_inside(outputs, images_of(golden))
    for image in range(2):
        valid = in_our_order([level[None] for level in golden.levels(f"retinanet.valid.{image}.{{}}")])[0]
        assert torch.equal(inside[image], valid)


@block("blocks_assign")
def test_assignment(path: Path) -> None:
    golden = Golden(path)
    num_classes = int(golden["num_classes"])
    model = retinanet_of_blocks(golden, num_classes)
    outputs = outputs_of(model)
    images = images_of(golden)
    instances = []
    for i in range(2):
        target = Instances(tuple(golden["img_shapes"][i].tolist()))
        target.gt_boxes = Boxes(golden[f"gt.{i}.boxes"])
        target.gt_classes = golden[f"gt.{i}.labels"]
        instances.append(target)
    labels, boxes = model.label_anchors(outputs.anchors_per_level, instances)
    targets = make_targets(outputs, images, instances, labels, boxes)
    weights = in_our_order(golden.levels("retinanet.targets.label_weights.{}")).float()
    expected = in_our_order(golden.levels("retinanet.targets.labels.{}")).long()
    assert torch.equal(targets.weights, weights)
    assert torch.equal(targets.labels[weights > 0], expected[weights > 0])
    assert float(targets.num_pos) == float(golden["retinanet.targets.avg_factor"])
    empty = [x[:0] for x in instances]
    labels, boxes = model.label_anchors(outputs.anchors_per_level, empty)
    without = make_targets(outputs, images, empty, labels, boxes)
    assert float(without.num_pos) == float(golden["retinanet.targets_nogt.avg_factor"])


@block("blocks_post_retinanet")
@pytest.mark.parametrize("setting", ["default", "low"])
def test_retinanet_inference(path: Path, setting: str) -> None:
    """detectron2's candidates are the reference's; clipped before NMS, as GFL does it, they give its detections.

    detectron2's own RetinaNet, which students are, clips after NMS.
    """
    golden = Golden(path)
    test = golden.json(f"{setting}.test_cfg_json")
    model = retinanet_of_blocks(golden, golden["cls.p3"].shape[1] // 9)
    outputs = [in_our_order([rows(m) for m in golden.levels(f"{kind}.{{}}")]) for kind in ("cls", "reg")]
    anchors = outputs_of(model).anchors_per_level
    for i, size in enumerate(images_of(golden).image_sizes):
        logits, deltas = (list(x[i].split([len(level) for level in anchors])) for x in outputs)
        found = model._decode_multi_level_predictions(
            anchors, [x.sigmoid() for x in logits], deltas, test["score_thr"], test["nms_pre"], size
        )
        options = SimpleNamespace(
            clip_before_nms=True,
            test_nms_thresh=test["nms"]["iou_threshold"],
            max_detections_per_image=test["max_per_img"],
        )
        found = OneAnchorDetector._suppress(options, found)
        expected = {k: golden[f"{setting}.rescale0.{i}.{k}"] for k in ("boxes", "scores", "labels")}
        assert torch.equal(found.pred_classes, expected["labels"])
        close(found.scores, expected["scores"], LOSS, "scores")
        close(found.pred_boxes.tensor, expected["boxes"], LOSS, "boxes")


def rows(maps: Tensor) -> Tensor:
    """A level's predictions (N, 9*D, H, W) per anchor, (N, H*W*9, D)."""
    return maps.unflatten(1, (9, -1)).permute(0, 3, 4, 1, 2).flatten(1, 3)
