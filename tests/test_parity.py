"""Parity with numbers measured by running the authors' own code.

``D2KD_GOLDENS`` names the folder of the goldens (default ``tests/goldens``). Cases are found by file name, and all
sizes are read from the files. Tolerances: losses and predictions 1e-5 of the largest, gradients 1e-3 of the largest.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.meta_arch.retinanet import RetinaNet
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
    close_levels,
    covered_cases,
    detector_cases,
    image_list,
    level_strides,
    retinanet_args,
    slot_order,
    truths,
    zero_maps,
)
from matching import check_labels
from rounding import check_gradients
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

    def __init__(self, path: Path, double: bool = False) -> None:
        self.case = Case(path, double)
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

    def gradients(self) -> Dict[str, Tensor]:
        """Of the total loss, by parameter and for a head case by FPN map."""
        self.total.backward()
        maps = {} if self.case.full else {f"FPN map {i}": m.grad for i, m in enumerate(self.case.maps)}
        return {**maps, **{name: p.grad for name, p in self.case.student.named_parameters() if p.grad is not None}}


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


def golden_gradients(case: Case) -> Dict[str, Tensor]:
    """What the file has of them, and norms of the others, under our names."""
    trainable = {name for name, p in case.student.named_parameters() if p.requires_grad}
    found = {name: torch.tensor(norm) for name, norm in case.norms().items()}
    assert found.keys() <= trainable
    full = {name: x for name, x in case.gradients("grad.").items() if name in trainable and not x.isnan().any()}
    assert full, "the golden has no gradient"
    maps = [] if case.full else case.golden.levels("grad.stu.fpn.{}")
    norms = {f"norm of {name}": norm for name, norm in found.items()}
    return {**full, **norms, **{f"FPN map {i}": level for i, level in enumerate(maps)}}


@pytest.mark.slow
@all_cases
def test_gradients(path: Path) -> None:
    def run(double: bool) -> Dict[str, Tensor]:
        gradients = Run(path, double).gradients()
        return {**gradients, **{f"norm of {name}": gradient.norm() for name, gradient in gradients.items()}}

    check_gradients(run, golden_gradients(Case(path)), GRADIENT)


@all_cases
def test_targets_and_predictions(path: Path) -> None:
    case = Case(path)
    batch = case.batch()
    images = case.student.preprocess_image(batch)
    student = run_dense(case.student, images, case.student.methods[0].cuts)
    labels, boxes = case.student.label_anchors(student.anchors_per_level, [x["instances"] for x in batch])
    targets = make_targets(student, images, [x["instances"] for x in batch], labels, boxes)
    expected = case.targets("labels")
    if case.kind.plain is FCOS:  # which has neither weights nor this normalizer
        assert torch.equal(targets.labels, expected)
    else:
        labels = torch.where(targets.weights > 0, targets.labels, -1)
        expected = torch.where(case.targets("label_weights") > 0, expected, -1)
        check_labels(case.student, student.anchors, targets, labels, expected)
        assert float(targets.num_pos) == float(case.find("target.labels.p3")["target.avg_factor"])
    teacher = case.student.teacher(batch, case.student.input_format, case.student.methods[0].cuts)
    if case.full:
        close_levels(student.features, case.inputs.levels("stu.fpn.{}"), LOSS, "student FPN")
        close_levels(teacher.features, case.teacher_file.levels("tea.fpn.{}"), LOSS, "teacher FPN")
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
        close_levels(own, case.golden.levels(f"stu.hold_{name}.{{}}"), LOSS, "student hold")
        close_levels(theirs, case.golden.levels(f"tea.hold_{name}.{{}}"), LOSS, "teacher hold")
        aligned = [align_scale(s, t) for s, t in zip(own, theirs)]
        close_levels(aligned, case.golden.levels(f"aligned_{name}.{{}}"), LOSS, "aligned")


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


def retinanet_of_blocks(golden: Golden, num_classes: int, levels: int) -> RetinaNet:
    """A stock RetinaNet with the reference's default anchors and assignment, on maps of the golden's size."""
    config = {
        "bbox_head": {
            "anchor_generator": {"octave_base_scale": 4, "ratios": [0.5, 1.0, 2.0], "scales_per_octave": 3}
            | {"strides": level_strides(levels)},
            "bbox_coder": {"target_stds": [1.0] * 4},
            "feat_channels": 4,
            "in_channels": 4,
            "stacked_convs": 1,
            "num_classes": num_classes,
        },
        "train_cfg": {"assigner": {"neg_iou_thr": 0.4, "pos_iou_thr": 0.5}},
        "test_cfg": {"score_thr": 0.05, "nms_pre": 1000, "nms": {"iou_threshold": 0.5}, "max_per_img": 100},
    }
    return RetinaNet(**retinanet_args(config, Maps(zero_maps(golden, levels=levels))))


def outputs_of(model: RetinaNet) -> DenseOutputs:
    return DenseOutputs(model, model.backbone.maps)


@block("blocks_anchors")
def test_anchors_and_validity(path: Path) -> None:
    golden = Golden(path)
    per_level = golden.levels("retinanet.anchors.{}")
    outputs = outputs_of(retinanet_of_blocks(golden, 1, len(per_level)))
    close(outputs.anchors, in_our_order([level[None] for level in per_level])[0], LOSS, "anchors")
    inside = anchors_inside(outputs, image_list(golden))
    for image in range(len(golden["img_shapes"])):
        valid = in_our_order([level[None] for level in golden.levels(f"retinanet.valid.{image}.{{}}")])[0]
        assert torch.equal(inside[image], valid)


@block("blocks_assign")
def test_assignment(path: Path) -> None:
    golden = Golden(path)
    per_level = golden.levels("retinanet.targets.labels.{}")
    model = retinanet_of_blocks(golden, int(golden["num_classes"]), len(per_level))
    outputs, images = outputs_of(model), image_list(golden)
    instances = truths(golden, golden["img_shapes"])
    labels, boxes = model.label_anchors(outputs.anchors_per_level, instances)
    targets = make_targets(outputs, images, instances, labels, boxes)
    weights = in_our_order(golden.levels("retinanet.targets.label_weights.{}"))
    expected = torch.where(weights > 0, in_our_order(per_level).long(), -1)
    ours = torch.where(targets.weights > 0, targets.labels, -1)
    check_labels(model, outputs.anchors, targets, ours, expected)
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
    maps = [golden.levels(f"{kind}.{{}}") for kind in ("cls", "reg")]
    model = retinanet_of_blocks(golden, maps[0][0].shape[1] // 9, len(maps[0]))
    outputs = [in_our_order([rows(level) for level in output]) for output in maps]
    anchors = outputs_of(model).anchors_per_level
    for i, size in enumerate(image_list(golden).image_sizes):
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
