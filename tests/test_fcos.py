"""d2kd's FCOS: parity of head, targets, losses and inference with the reference, and what detectron2's lacks."""

from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.fcos import FCOS as StockFCOS
from detectron2.modeling.meta_arch.fcos import FCOSHead as StockFCOSHead
from detectron2.structures import Boxes, ImageList, Instances
from goldens import (
    KINDS,
    Golden,
    Maps,
    cases,
    close,
    close_levels,
    image_list,
    of_committed_goldens,
    strides_of,
    truths,
    zero_maps,
)
from rounding import check_gradients
from small import batch, build, gradients, small_config, step
from torch import Tensor, nn

from d2kd.dense import run_dense
from d2kd.errors import D2kdError
from d2kd.heads import Cut, cross_head
from d2kd.meta_arch import DistillMetaArch
from d2kd.methods import PKD, CrossKD, Method
from d2kd.modeling.config import add_detector_config
from d2kd.modeling.fcos import FCOS, FCOSHead
from d2kd.teacher import Teacher

LOSS, GRADIENT = 1e-5, 1e-3
STRIDES = (8, 16, 32, 64, 128)
LOSS_NAMES = {"loss_fcos_cls": "loss_cls", "loss_fcos_loc": "loss_bbox", "loss_fcos_ctr": "loss_centerness"}
PUBLISHED: Dict[str, Any] = {
    "box_exp": True,
    "center_sampling_radius": 0,
    "box_reg_loss_type": "iou_log",
    "loss_normalizer": "batch",
    "score_rule": "product",
    "clip_before_nms": True,
    "test_score_thresh": 0.05,
    "test_nms_thresh": 0.5,
}
YAML = {key.upper(): value for key, value in PUBLISHED.items() if not key.startswith("test_")} | {
    "BOX_SCALES": True,
    "CTRNESS_ON_CLS": True,
    "TOWER_BIAS": False,
    "SCORE_THRESH_TEST": 0.05,
    "NMS_THRESH_TEST": 0.5,
}


class DistillFCOS(DistillMetaArch, FCOS):
    """As the package would register it."""


def published(maps: List[Tensor], num_classes: int = 5, cls: type = FCOS, **options: Any) -> Any:
    """The reference's FCOS on given FPN maps, with a head of four convolutions and groups."""
    head = FCOSHead(
        input_shape=[ShapeSpec(channels=maps[0].shape[1])] * len(maps),
        conv_dims=[maps[0].shape[1]] * 4,
        num_classes=num_classes,
        norm=lambda channels: nn.GroupNorm(4, channels),
        box_scales=True,
        box_exp=True,
        ctrness_on_cls=True,
        tower_bias=False,
    )
    options = {**PUBLISHED, "num_classes": num_classes, "pixel_mean": [0.0] * 3, "pixel_std": [1.0] * 3, **options}
    return cls(backbone=Maps(maps), head=head, **options).train()


def from_mmdet(state: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Mmdetection's FCOS head under our names."""
    predictors = {"conv_cls": "cls_score", "conv_reg": "bbox_pred", "conv_centerness": "ctrness"}
    scales = [key for key in state if key.startswith("bbox_head.scales.")]
    out: Dict[str, Tensor] = {
        "scales": torch.stack([state[key] for key in sorted(scales, key=lambda key: int(key.split(".")[2]))])
    }
    for key, value in state.items():
        _, part, *rest = key.split(".")
        if part in predictors:
            out[f"{predictors[part]}.{rest[0]}"] = value
        elif part.endswith("_convs"):
            tower = {"cls_convs": "cls_subnet", "reg_convs": "bbox_subnet"}[part]
            index = 3 * int(rest[0]) + {"conv": 0, "gn": 1}[rest[1]]
            out[f"{tower}.{index}.{rest[2]}"] = value
    return out


def of_golden(inputs: Golden, maps: List[Tensor], who: str, cls: type = FCOS, **options: Any) -> Any:
    """The reference's FCOS of a golden's sizes with the weights of student or teacher."""
    config = inputs.json("config_json")
    arguments = KINDS["fcos"].arguments(config, Maps(maps, strides_of(config)))
    model = cls(**{**arguments, **PUBLISHED}, **options).train()
    model.head.load_state_dict(from_mmdet(inputs.group(f"{who}.")))
    return model


def head_case(path: Path, double: bool = False) -> Tuple[Golden, Golden, FCOS, List[Instances]]:
    """A head case: its file, the common inputs, the student on its maps, and the ground truth."""
    golden = Golden(path)
    inputs = Golden(path.with_name("head_fcos_inputs.npz"))
    maps = [m.double() if double else m for m in inputs.levels("stu.fpn.{}")]
    model = of_golden(inputs, [m.requires_grad_() for m in maps], "student")
    source = golden if "gt.0.boxes" in golden else inputs
    return golden, inputs, model.double() if double else model, truths(source, inputs["img_shapes"])


head_cases = pytest.mark.parametrize("path", cases("head_fcos_"), ids=lambda p: p.stem)


@of_committed_goldens
def test_there_are_cases() -> None:
    assert cases("head_fcos_")
    assert cases("blocks_post_fcos")
    assert cases("blocks_assign")


@head_cases
def test_parity_of_predictions(path: Path) -> None:
    inputs = head_case(path)[1]
    for short, who in (("stu", "student"), ("tea", "teacher")):
        maps = inputs.levels(f"{short}.fpn.{{}}")
        for ours, name in zip(of_golden(inputs, maps, who).head(maps), ("cls", "reg", "ctr")):
            close_levels(ours, inputs.levels(f"{short}.pred_{name}.{{}}"), LOSS, name)


@head_cases
def test_parity_of_losses(path: Path) -> None:
    golden, inputs, model, instances = head_case(path)
    losses = step(model, [{"image": torch.zeros(3, *x.image_size), "instances": x} for x in instances])
    for ours, theirs in LOSS_NAMES.items():
        close(losses[ours], golden[f"loss.{theirs}"], LOSS, theirs)
    sum(losses.values()).backward()
    assert all(m.grad.isfinite().all() for m in model.backbone.maps)
    source = golden if "target.labels.p3" in golden else inputs
    labels, boxes = model.label_anchors(model.anchor_generator(model.backbone.maps), instances)
    check_labels(model, labels, source.levels("target.labels.{}"))
    targets = source.levels("target.bbox_targets.{}")
    check_boxes(model, labels, boxes, targets)


def crosskd_case(path: Path, double: bool = False) -> Tuple[Golden, DistillMetaArch, List[Instances]]:
    """A head case with its teacher and the methods of its settings."""
    golden, inputs, model, instances = head_case(path, double)
    teacher_maps = [m.double() if double else m for m in inputs.levels("tea.fpn.{}")]
    teacher = of_golden(inputs, teacher_maps, "teacher")
    teacher = teacher.double() if double else teacher
    settings = golden.json("kd_cfg_json")
    methods: List[Method] = [
        CrossKD(
            cut=int(golden["reused_teacher_head_idx"]),
            cls_weight=settings["loss_cls_kd"]["loss_weight"],
            box_weight=settings["loss_reg_kd"]["loss_weight"],
            centerness_weight=0.0,
            box_loss="iou_log",
            normalizer="centerness",
            mask_padding=False,
            pre_activation=path.stem.endswith("_preact"),
        )
    ]
    if "loss_feat_kd" in settings:
        methods.append(PKD(weight=settings["loss_feat_kd"]["loss_weight"]))
    teacher = Teacher(teacher, teacher.input_format)
    student = of_golden(inputs, model.backbone.maps, "student", DistillFCOS, teacher=teacher, methods=methods)
    return golden, student.double() if double else student, instances


# Without any ground truth the reference's losses are 1e8: d2kd has another normalizer there, on purpose.
crosskd_cases = pytest.mark.parametrize(
    "path", [p for p in cases("head_fcos_") if not p.stem.endswith("nogt_all")], ids=lambda p: p.stem
)


@crosskd_cases
def test_parity_of_crosskd(path: Path) -> None:
    golden, student, instances = crosskd_case(path)
    losses = step(student, [{"image": torch.zeros(3, *x.image_size), "instances": x} for x in instances])
    for ours, theirs in {"loss_crosskd_cls": "loss_cls_kd", "loss_crosskd_box": "loss_reg_kd", **LOSS_NAMES}.items():
        close(losses[ours], golden[f"loss.{theirs}"], LOSS, theirs)
    total = sum(losses.values())
    close(total, golden["loss.total"], LOSS, "total")


@crosskd_cases
def test_parity_of_gradients(path: Path) -> None:
    golden = Golden(path)
    source = {f"bbox_head.{name}": value for name, value in golden.group("grad.bbox_head.").items()}
    expected = {**from_mmdet(source), **{f"map {i}": x for i, x in enumerate(golden.levels("grad.stu.fpn.{}"))}}

    def run(double: bool) -> Dict[str, Tensor]:
        _, student, instances = crosskd_case(path, double)
        losses = step(student, [{"image": torch.zeros(3, *x.image_size), "instances": x} for x in instances])
        sum(losses.values()).backward()
        maps = {f"map {i}": m.grad for i, m in enumerate(student.backbone.maps)}
        return {**maps, **{name: p.grad for name, p in student.head.named_parameters()}}

    check_gradients(run, expected, GRADIENT)


def by_level(model: FCOS, per_image: List[Tensor]) -> List[Tensor]:
    """The reference's order: per level, the images one after the other."""
    sizes = [len(a) for a in model.anchor_generator(model.backbone.maps)]
    return [level.flatten(0, 1) for level in torch.stack(per_image)[..., None].split(sizes, dim=1)]


def check_labels(model: FCOS, labels: List[Tensor], golden: List[Tensor]) -> None:
    for ours, theirs in zip(by_level(model, labels), golden):
        assert torch.equal(ours.squeeze(-1), theirs.long())


def check_boxes(model: FCOS, labels: List[Tensor], boxes: List[Tensor], golden: List[Tensor]) -> None:
    anchors = Boxes.cat(model.anchor_generator(model.backbone.maps)).tensor
    ltrb = [model.box2box_transform.get_deltas(anchors, b) for b in boxes]
    for mask, ours, theirs in zip(by_level(model, labels), by_level(model, ltrb), golden):
        positive = mask.squeeze(-1) < model.num_classes
        if positive.any():
            close(ours.squeeze(-1)[positive], theirs[positive], LOSS, "distances")


@pytest.mark.parametrize("path", cases("blocks_assign"), ids=lambda p: p.stem)
def test_parity_of_assignment(path: Path) -> None:
    golden = Golden(path)
    per_level = golden.levels("fcos.targets.labels.{}")
    model = published(zero_maps(golden, levels=len(per_level)), int(golden["num_classes"]))
    anchors = model.anchor_generator(model.backbone.maps)
    labels, boxes = model.label_anchors(anchors, truths(golden, golden["img_shapes"]))
    check_labels(model, labels, per_level)
    all_anchors = Boxes.cat(anchors).tensor
    index = golden["fcos.targets.pos_index"]
    positive = torch.cat(by_level(model, labels)).squeeze(-1) < model.num_classes
    assert torch.equal(positive.nonzero().squeeze(1), index)
    ltrb = [model.box2box_transform.get_deltas(all_anchors, b) for b in boxes]
    ours = torch.cat(by_level(model, ltrb)).squeeze(-1)[index]
    close(ours, golden["fcos.targets.pos_bbox_targets"], LOSS, "distances")
    centerness = model.compute_ctrness_targets(anchors, boxes)
    ours = torch.cat(by_level(model, list(centerness))).squeeze(-1)[index]
    close(ours, golden["fcos.targets.pos_centerness"], LOSS, "centerness")


@pytest.mark.parametrize("path", cases("blocks_anchors"), ids=lambda p: p.stem)
def test_parity_of_points(path: Path) -> None:
    golden = Golden(path)
    points = golden.levels("fcos.points.{}")
    model = published(zero_maps(golden, levels=len(points)))
    ours = [level.get_centers() for level in model.anchor_generator(model.backbone.maps)]
    close_levels(ours, points, LOSS, "points")


@pytest.mark.parametrize("setting", ["default", "low"])
@pytest.mark.parametrize("path", cases("blocks_post_fcos"), ids=lambda p: p.stem)
def test_parity_of_inference(path: Path, setting: str) -> None:
    golden = Golden(path)
    config = golden.json(f"{setting}.test_cfg_json")
    outputs = [golden.levels(f"{name}.{{}}") for name in ("cls", "reg", "centerness")]
    model = published(
        [torch.zeros(len(x), 4, *x.shape[2:]) for x in outputs[0]],
        outputs[0][0].shape[1],
        test_score_thresh=config["score_thr"],
        test_topk_candidates=config["nms_pre"],
        test_nms_thresh=config["nms"]["iou_threshold"],
        max_detections_per_image=config["max_per_img"],
    )
    results = model.forward_inference(image_list(golden), model.backbone.maps, outputs)
    for i, found in enumerate(results):
        close(found.scores, golden[f"{setting}.rescale0.{i}.scores"], LOSS, "scores")
        close(found.pred_boxes.tensor, golden[f"{setting}.rescale0.{i}.boxes"], LOSS, "boxes")
        assert torch.equal(found.pred_classes, golden[f"{setting}.rescale0.{i}.labels"])


def config(*opts: Any, **node: Any) -> CfgNode:
    """The quick RetinaNet's backbone with an FCOS on it."""
    cfg = small_config()
    if "FCOS" not in cfg.MODEL:
        add_detector_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "FCOS"
    cfg.MODEL.FCOS.IN_FEATURES = cfg.MODEL.RETINANET.IN_FEATURES
    cfg.MODEL.FCOS.NUM_CLASSES = 3
    cfg.merge_from_list([str(x) for x in opts])
    for key, value in node.items():
        cfg.MODEL.FCOS[key] = value
    return cfg


@pytest.mark.parametrize("node", [{}, YAML, {"BOX_REG_LOSS_TYPE": "iou_log"}, {"LOSS_NORMALIZER": "batch"}])
def test_trains_and_detects_from_a_config(node: Dict[str, Any]) -> None:
    model = build(config(**node))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = step(model, batch())
    before = sum(losses.values())
    assert set(losses) == set(LOSS_NAMES)
    found = gradients(model, losses)
    assert all(g.isfinite().all() for g in found.values())
    assert set(found) == {name for name, p in model.named_parameters() if p.requires_grad}
    optimizer.step()
    vars(model).pop("loss_normalizer", None)  # the running mean has moved
    assert sum(step(model, batch()).values()) < before
    model.eval().test_score_thresh = 0.0
    assert len(model(batch())[0]["instances"]) > 0


def test_defaults_are_detectron2s() -> None:
    cfg = config()
    ours = build(cfg)
    head = StockFCOSHead(
        input_shape=[ours.backbone.output_shape()[name] for name in cfg.MODEL.FCOS.IN_FEATURES],
        conv_dims=[cfg.MODEL.FPN.OUT_CHANNELS] * cfg.MODEL.FCOS.NUM_CONVS,
        num_classes=3,
        norm="GN",
    )
    theirs = StockFCOS(
        backbone=ours.backbone,
        head=head,
        head_in_features=cfg.MODEL.FCOS.IN_FEATURES,
        num_classes=3,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
    )
    theirs.load_state_dict(ours.state_dict())
    results = [step(model.train(), batch()) for model in (ours, theirs)]
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[1])
    for model in (ours, theirs):
        model.eval().test_score_thresh = 0.0
    found, expected = (model(batch())[0]["instances"] for model in (ours, theirs))
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(found.scores, expected.scores)


@pytest.mark.parametrize("node", [{}, YAML, {"BOX_REG_LOSS_TYPE": "iou_log"}])
def test_without_ground_truth(node: Dict[str, Any]) -> None:
    model = build(config(**node))
    losses = step(model, batch(boxes=(0, 0)))
    assert losses["loss_fcos_loc"] == 0
    assert losses["loss_fcos_ctr"] == 0
    found = gradients(model, losses)
    assert set(found) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(g.isfinite().all() for g in found.values())


@pytest.mark.parametrize("node", [{}, YAML])
def test_autocast(node: Dict[str, Any]) -> None:
    model = build(config(**node))
    expected = step(model, batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = step(build(config(**node)), batch())
    for key, value in losses.items():
        assert value.dtype == torch.float32
        assert float(value) == pytest.approx(float(expected[key]), rel=0.05)


def test_a_mistaken_option_is_named() -> None:
    with pytest.raises(D2kdError, match=r"MODEL\.FCOS\.SCORE_RULE is 'sqr'; use one of sqrt, product"):
        build(config(SCORE_RULE="sqr"))
    head = FCOSHead(input_shape=[ShapeSpec(channels=4)] * 5, conv_dims=[4], num_classes=2, norm="", box_exp=True)
    with pytest.raises(D2kdError, match="box_exp=False"):
        FCOS(backbone=Maps([]), head=head, num_classes=2, pixel_mean=[0.0], pixel_std=[1.0])


def test_center_sampling() -> None:
    maps = [torch.zeros(1, 4, 128 // s, 128 // s) for s in STRIDES]
    whole, center = (published(maps, center_sampling_radius=radius) for radius in (0, 1.5))
    target = Instances((128, 128), gt_boxes=Boxes(torch.tensor([[16.0, 16.0, 76.0, 76.0]])))
    target.gt_classes = torch.tensor([1])
    counts = [
        int((model.label_anchors(model.anchor_generator(maps), [target])[0][0] == 1).sum()) for model in (whole, center)
    ]
    assert counts[0] > counts[1] > 0


def test_cut_head_runs_the_rest_of_the_head() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 16, 128 // s, 128 // s, generator=generator) for s in STRIDES]
    model = published(maps)
    images = ImageList(torch.zeros(2, 3, 128, 128), [(128, 128)] * 2)
    for convs in range(5):
        outputs = run_dense(model, images, [Cut(convs)])
        crossed = cross_head(model.head, Cut(convs), *outputs.towers(Cut(convs)))
        for ours, theirs in zip(crossed, outputs.predictions):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


@pytest.mark.parametrize("boxes", [(2, 2), (0, 2), (0, 0)])
def test_as_a_distilled_student(boxes: Tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    own, theirs = ([torch.randn(2, 16, 128 // s, 128 // s, generator=generator) for s in STRIDES] for _ in range(2))
    teacher = Teacher(published(theirs, num_classes=3), "BGR")
    student = published(
        [m.requires_grad_() for m in own],
        num_classes=3,
        cls=DistillFCOS,
        teacher=teacher,
        methods=[CrossKD(cut=2), PKD(weight=2.0)],
    )
    losses = step(student, batch(boxes=boxes))
    assert {*LOSS_NAMES, "loss_crosskd_cls", "loss_crosskd_box", "loss_pkd_feature"} <= set(losses)
    assert all(g.isfinite().all() for g in gradients(student, losses).values())
    assert all(m.grad.isfinite().all() for m in own)
