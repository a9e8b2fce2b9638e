"""Reads the golden numbers: where they are, which are covered, and detectors of their sizes with their weights."""

import json
import math
import os
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Type

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, RetinaNet
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import FPN
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor

from d2kd.checkpoint import convert_mmdet
from d2kd.meta_arch import DistillATSS, DistillFCOS, DistillGFL, DistillMetaArch, DistillRetinaNet
from d2kd.methods import PKD, CrossKD
from d2kd.modeling import ATSS, FCOS, GFL, ATSSHead, FCOSHead, GFLHead
from d2kd.modeling.backbone import BLOCKS_OF_DEPTH, ExtraLevels, make_resnet
from d2kd.teacher import Teacher

COMMITTED = Path(__file__).parent / "goldens"
GOLDENS = Path(os.environ["D2KD_GOLDENS"])
# Another folder may hold goldens of some kinds only.
of_committed_goldens = pytest.mark.skipif(GOLDENS.resolve() != COMMITTED, reason="D2KD_GOLDENS is another folder")
FIRST_LEVEL = 3  # p3, whose stride is 8
INPUTS = ("_inputs", "_student", "_teacher")
BLOCKS = ("blocks_anchors", "blocks_assign", "blocks_coders", "blocks_losses_cls", "blocks_losses_iou")
BLOCKS += ("blocks_pkd_align", "blocks_post_retinanet")
# Compared in test_gfl_atss.py, test_fcos.py, test_ld.py, test_fgd.py and test_feature_methods.py.
ELSEWHERE = ("blocks_post_gfl", "blocks_post_atss", "blocks_post_fcos", "ld_mmdet3_", "ld_repo_c", "ld_repo_regions")
ELSEWHERE += ("fgd_",)
# Measured defects of the reference, which d2kd does not share; test_fgd.py has what it does instead.
DEFECTS = ("fgd_quirk_",)


def all_cases() -> List[Path]:
    """Every golden file that is a case of its own, not the common input of others."""
    return sorted(p for p in GOLDENS.rglob("*.npz") if not p.stem.endswith(INPUTS))


def cases(prefix: str) -> List[Path]:
    """The cases whose file name starts with a prefix."""
    return [path for path in all_cases() if path.name.startswith(prefix)]


def covered_cases() -> List[Path]:
    """What the tests run."""
    single = [path for prefix in (*BLOCKS, *ELSEWHERE) for path in cases(prefix)]
    return [*detector_cases(), *(path for path in single if not path.name.startswith(DEFECTS))]


def detector_cases() -> List[Path]:
    """The cases of whole heads and whole detectors."""
    return [path for form in ("head", "full") for kind in KINDS for path in cases(f"{form}_{kind}_")]


def uncovered_cases() -> Dict[str, List[str]]:
    """The other cases by reason."""
    covered, reasons = set(covered_cases()), {}
    for path in all_cases():
        if path in covered:
            continue
        reason = "no such detector or method in d2kd"
        if path.name.startswith(DEFECTS):
            reason = "a defect of the reference, not reproduced"
        reasons.setdefault(reason, []).append(path.stem)
    return reasons


class Golden:
    """One file: arrays as tensors, JSON as dicts, and what groups of arrays share a prefix."""

    def __init__(self, path: Path) -> None:
        self.arrays = dict(np.load(path))

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def __getitem__(self, key: str) -> Tensor:
        return torch.as_tensor(self.arrays[key])

    def json(self, key: str) -> Any:
        return json.loads(str(self.arrays[key]))

    def levels(self, pattern: str) -> List[Tensor]:
        """Arrays of all levels that the file has; ``{}`` in the pattern stands for p3, p4 and so on."""
        found = [level for level in level_names(10) if pattern.format(level) in self.arrays]
        assert found, f"no level of {pattern}"
        return [self[pattern.format(level)] for level in found]

    def group(self, prefix: str) -> Dict[str, Tensor]:
        """Arrays whose names start with a prefix, without it."""
        return {key[len(prefix) :]: self[key] for key in self.arrays if key.startswith(prefix)}


def level_names(count: int) -> List[str]:
    """Names of FPN levels: p3, p4 and so on."""
    return [f"p{FIRST_LEVEL + i}" for i in range(count)]


def level_strides(count: int) -> List[int]:
    """Strides of these levels: 8, 16 and so on."""
    return [2 ** (FIRST_LEVEL + i) for i in range(count)]


class Maps(Backbone):
    """Stands for a backbone: returns stored FPN maps whatever the image.

    Args:
        maps: of each level.
        strides: their strides; 8, 16 and so on by default.
    """

    def __init__(self, maps: List[Tensor], strides: Optional[Sequence[int]] = None) -> None:
        super().__init__()
        self.maps = maps
        self._out_features = level_names(len(maps))
        self._out_feature_strides = dict(zip(self._out_features, strides or level_strides(len(maps))))
        self._out_feature_channels = {level: m.shape[1] for level, m in zip(self._out_features, maps)}

    @property
    def size_divisibility(self) -> int:
        return 32

    def forward(self, _: Tensor) -> Dict[str, Tensor]:
        return dict(zip(self._out_features, self.maps))


def make_fpn(config: Dict[str, Any]) -> FPN:
    """A ResNet-FPN from an mmdet config, with trainable BN in eval mode."""
    backbone, neck = config["backbone"], config["neck"]
    depth = backbone["depth"]
    bottom_up = make_resnet(
        BLOCKS_OF_DEPTH[depth],
        width=backbone["base_channels"],
        bottleneck=depth >= 50,
        norm="BN",
        freeze_at=backbone["frozen_stages"] + 1,
        stride_in_1x1=backbone["style"] == "caffe",
    )
    in_feature = {"on_input": "res5", "on_output": "p5"}[neck["add_extra_convs"]]
    out = neck["out_channels"]
    in_channels = bottom_up.output_shape()["res5"].channels if in_feature == "res5" else out
    relu = neck.get("relu_before_extra_convs", False)
    extra = ExtraLevels(in_channels, out, in_feature, neck["num_outs"] - 3, relu)
    return FPN(bottom_up, ["res3", "res4", "res5"], out, top_block=extra)


def retinanet_args(config: Dict[str, Any], backbone: Backbone) -> Dict[str, Any]:
    """Arguments of detectron2's RetinaNet from an mmdet config."""
    head, test = config["bbox_head"], config["test_cfg"]
    assigner = config["train_cfg"]["assigner"]
    anchors = head["anchor_generator"]
    octaves = anchors["scales_per_octave"]
    sizes = [
        [anchors["octave_base_scale"] * s * 2 ** (i / octaves) for i in range(octaves)] for s in anchors["strides"]
    ]
    channels = head["in_channels"]
    data = config.get("data_preprocessor", {"mean": [0.0] * 3, "std": [1.0] * 3})
    return {
        "backbone": backbone,
        "head": RetinaNetHead(
            input_shape=[ShapeSpec(channels=channels)] * len(sizes),
            num_classes=head["num_classes"],
            num_anchors=octaves * len(anchors["ratios"]),
            conv_dims=[head["feat_channels"]] * head["stacked_convs"],
        ),
        "head_in_features": level_names(len(sizes)),
        "anchor_generator": DefaultAnchorGenerator(
            sizes=sizes, aspect_ratios=anchors["ratios"], strides=anchors["strides"], offset=0.0
        ),
        "box2box_transform": Box2BoxTransform(weights=[1 / s for s in head["bbox_coder"]["target_stds"]]),
        "anchor_matcher": Matcher(
            [assigner["neg_iou_thr"], assigner["pos_iou_thr"]], [0, -1, 1], allow_low_quality_matches=True
        ),
        "num_classes": head["num_classes"],
        **test_args(test),
        "pixel_mean": data["mean"],
        "pixel_std": data["std"],
        "input_format": input_format(config),
    }


def test_args(test: Dict[str, Any]) -> Dict[str, Any]:
    """Thresholds of detections from an mmdet config's test_cfg."""
    return {
        "test_score_thresh": test["score_thr"],
        "test_topk_candidates": test["nms_pre"],
        "test_nms_thresh": test["nms"]["iou_threshold"],
        "max_detections_per_image": test["max_per_img"],
    }


def strides_of(config: Dict[str, Any]) -> List[int]:
    """The levels' strides in an mmdet config."""
    head = config["bbox_head"]
    return head["strides"] if "strides" in head else head["anchor_generator"]["strides"]


def dense_args(config: Dict[str, Any], backbone: Backbone) -> Dict[str, Any]:
    """Arguments that GFL, ATSS and FCOS have in common, from an mmdet config, with a head of the right class."""
    head, test = config["bbox_head"], config["test_cfg"]
    data = config.get("data_preprocessor", {"mean": [0.0] * 3, "std": [1.0] * 3})
    groups, strides = head["norm_cfg"]["num_groups"], strides_of(config)
    options = {
        "GFLHead": {"reg_max": head.get("reg_max")},
        "FCOSHead": {"box_scales": True, "box_exp": True, "ctrness_on_cls": CTRNESS_ON_CLS, "tower_bias": False},
    }
    head_class = {"GFLHead": GFLHead, "ATSSHead": ATSSHead, "FCOSHead": FCOSHead}[head["type"]]
    return {
        "backbone": backbone,
        "head": head_class(
            input_shape=[ShapeSpec(channels=head["in_channels"], stride=stride) for stride in strides],
            num_classes=head["num_classes"],
            conv_dims=[head["feat_channels"]] * head["stacked_convs"],
            # detectron2 also makes a norm of 32 channels, only to see its type
            norm=lambda channels: torch.nn.GroupNorm(math.gcd(groups, channels), channels),
            **options.get(head["type"], {}),
        ),
        "head_in_features": level_names(len(strides)),
        "num_classes": head["num_classes"],
        **test_args(test),
        "pixel_mean": data["mean"],
        "pixel_std": data["std"],
        "input_format": input_format(config),
    }


def anchor_point_args(config: Dict[str, Any], backbone: Backbone) -> Dict[str, Any]:
    """The same with the anchors and candidates of GFL and ATSS."""
    scale = config["bbox_head"]["anchor_generator"]["octave_base_scale"]
    assigned = {"anchor_scale": float(scale), "topk": config["train_cfg"]["assigner"]["topk"]}
    return {**dense_args(config, backbone), **assigned}


def input_format(config: Dict[str, Any]) -> str:
    """The channel order of an mmdet config's model."""
    return "RGB" if config.get("data_preprocessor", {}).get("bgr_to_rgb", True) else "BGR"


def fcos_args(config: Dict[str, Any], backbone: Backbone) -> Dict[str, Any]:
    """The same with the published FCOS's options."""
    published = {"box_exp": True, "center_sampling_radius": 0.0, "box_reg_loss_type": "iou_log"}
    published |= {"loss_normalizer": "batch", "score_rule": "product", "clip_before_nms": True}
    return {**dense_args(config, backbone), **published}


class Kind(NamedTuple):
    """How a detector is made, and the names of its losses in the goldens."""

    plain: Type[DenseDetector]
    distilled: Type[DistillMetaArch]
    arguments: Callable[[Dict[str, Any], Backbone], Dict[str, Any]]
    losses: Dict[str, str]
    options: Dict[str, Any] = {}


CTRNESS_ON_CLS = True  # as the reference's default has it
FCOS_OPTIONS = {"box_loss": "iou_log", "normalizer": "centerness", "centerness_weight": 0.0, "mask_padding": False}
FCOS_LOSSES = {"loss_fcos_cls": "loss_cls", "loss_fcos_loc": "loss_bbox", "loss_fcos_ctr": "loss_centerness"}
KINDS = {
    "retinanet": Kind(RetinaNet, DistillRetinaNet, retinanet_args, {}),
    "gfl": Kind(GFL, DistillGFL, anchor_point_args, {key: key for key in ("loss_cls", "loss_bbox", "loss_dfl")}),
    "atss": Kind(
        ATSS, DistillATSS, anchor_point_args, {key: key for key in ("loss_cls", "loss_bbox", "loss_centerness")}
    ),
    "fcos": Kind(FCOS, DistillFCOS, fcos_args, FCOS_LOSSES, FCOS_OPTIONS),
}


class Case:
    """A head or full case: the distilling model with the golden's weights, its batch, and what it should give.

    Args:
        path: the golden's file.
        double: make the model and its maps float64.
    """

    def __init__(self, path: Path, double: bool = False) -> None:
        self.golden = Golden(path)
        self.full = path.name.startswith("full_")
        self.kind = KINDS[path.stem.split("_")[1]]
        stem = path.stem.split("_idx")[0]
        self.inputs = Golden(
            path.with_name(f"{stem.rsplit('_t', 1)[0]}_student.npz" if self.full else f"{stem}_inputs.npz")
        )
        teacher_file = Golden(path.with_name(f"{stem}_teacher.npz")) if self.full else self.inputs
        config = self.inputs.json("config_json")
        if self.full:
            teacher_config = teacher_file.json("config_json")["teacher_config"]
            backbones = [make_fpn(config), make_fpn(teacher_config)]
            teacher_config = {**config, **teacher_config}
        else:
            self.maps, teacher_maps = (self.inputs.levels(f"{who}.fpn.{{}}") for who in ("stu", "tea"))
            if double:
                self.maps, teacher_maps = ([m.double() for m in maps] for maps in (self.maps, teacher_maps))
            self.maps = [m.requires_grad_() for m in self.maps]
            backbones = [Maps(maps, strides_of(config)) for maps in (self.maps, teacher_maps)]
            teacher_config = config
        self.state = self.inputs.group("student.")
        teacher = self.kind.plain(**self.kind.arguments(teacher_config, backbones[1]))
        fill(teacher, teacher_file.group("teacher."))
        self.student = self.kind.distilled(
            **self.kind.arguments(config, backbones[0]),
            teacher=Teacher(teacher, teacher.input_format),
            methods=self.methods(pre_activation=path.stem.endswith("_preact")),
        )
        fill(self.student, self.state)
        if double:
            self.student.double()
            teacher.double()
        self.teacher_file = teacher_file
        self.student.train()
        for module in self.student.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()

    def methods(self, pre_activation: bool) -> List[torch.nn.Module]:
        """The methods with the case's settings."""
        config = self.golden.json("kd_cfg_json")
        crosskd = CrossKD(
            cut=int(self.golden["reused_teacher_head_idx"]),
            cls_weight=config["loss_cls_kd"]["loss_weight"],
            box_weight=config["loss_reg_kd"]["loss_weight"],
            beta=config["loss_cls_kd"]["beta"],
            pre_activation=pre_activation,
            **({"centerness_weight": config["loss_center_kd"]["loss_weight"]} if "loss_center_kd" in config else {}),
            **self.kind.options,
        )
        feature = config.get("loss_feat_kd")
        return [crosskd, PKD(weight=feature["loss_weight"])] if feature else [crosskd]

    def find(self, key: str) -> Golden:
        """The file that holds a common input; cases without ground truth carry their own."""
        return self.golden if key in self.golden else self.inputs

    def batch(self) -> List[Dict[str, Any]]:
        """The batch as a dataset mapper would give it, in the student's channel order."""
        batch = []
        for i, target in enumerate(truths(self.find("gt.0.boxes"), self.inputs["img_shapes"])):
            image = self.inputs[f"image.{i}"] if self.full else torch.zeros(3, *target.image_size)
            image = image.flip(0) if self.student.input_format == "RGB" else image
            batch.append({"image": image, "instances": target})
        return batch

    def targets(self, name: str) -> Tensor:
        """The reference's targets of all anchors in our order: (N, R) or (N, R, 4)."""
        images = len(self.inputs["img_shapes"])
        levels = self.find("target.labels.p3").levels(f"target.{name}.{{}}")
        return self.order(
            [level.reshape(images, -1, *level.shape[level.dim() - (name == "bbox_targets") :]) for level in levels]
        )

    def order(self, per_level: List[Tensor]) -> Tensor:
        """All levels in one, (N, R, ...), RetinaNet's anchors in detectron2's order."""
        if self.kind.plain is RetinaNet:
            anchors = self.inputs.json("config_json")["bbox_head"]["anchor_generator"]
            per_level = [slot_order(x, len(anchors["ratios"]), anchors["scales_per_octave"]) for x in per_level]
        return torch.cat(per_level, dim=1)

    def gradients(self, prefix: str) -> Dict[str, Tensor]:
        """Golden gradients of parameters under detectron2's names; NaN where the file has none."""
        grads = self.golden.group(prefix)
        return convert_mmdet({k: grads.get(k, torch.full_like(v.float(), torch.nan)) for k, v in self.state.items()})

    def norms(self) -> Dict[str, float]:
        """Golden gradient norms under detectron2's names."""
        names = list(self.state)
        marked = convert_mmdet({k: torch.full_like(v.float(), i) for i, (k, v) in enumerate(self.state.items())})
        norms = self.golden.group("gradnorm.")
        found = {}
        for key, value in marked.items():  # the levels' scales have become one parameter
            parts = [norms.get(names[int(i)]) for i in value.unique()]
            if all(part is not None for part in parts):
                found[key] = float(torch.stack(parts).norm())
        return found


def fill(model: torch.nn.Module, state: Dict[str, Tensor]) -> None:
    """Loads mmdet weights completely."""
    result = model.load_state_dict(convert_mmdet(state), strict=False)
    missing = [key for key in result.missing_keys if "num_batches_tracked" not in key]
    assert not missing, missing
    assert not result.unexpected_keys, result.unexpected_keys


def slot_order(per_level: Tensor, num_ratios: int = 3, num_octaves: int = 3) -> Tensor:
    """Reorders a level's anchors (N, H*W*A, ...) from the reference's slots (ratio major) to detectron2's."""
    n, total, *rest = per_level.shape
    cells = per_level.view(n, total // (num_ratios * num_octaves), num_ratios, num_octaves, *rest)
    return cells.transpose(2, 3).reshape(n, total, *rest)


def truths(golden: Golden, sizes: Tensor) -> List[Instances]:
    """Ground truth of each image of a golden, of given sizes (N, 2)."""
    instances = []
    for i, size in enumerate(sizes.tolist()):
        boxes = Boxes(golden[f"gt.{i}.boxes"].reshape(-1, 4))
        instances.append(Instances(tuple(size), gt_boxes=boxes, gt_classes=golden[f"gt.{i}.labels"].long()))
    return instances


def image_list(golden: Golden) -> ImageList:
    """Black images of a golden's sizes in a batch of its size."""
    sizes = [tuple(size) for size in golden["img_shapes"].tolist()]
    height, width = golden["batch_shape"].tolist()
    return ImageList(torch.zeros(len(sizes), 3, height, width), sizes)


def zero_maps(golden: Golden, channels: int = 4, levels: int = 5) -> List[Tensor]:
    """Maps of zeros of a golden's batch size."""
    images, (height, width) = len(golden["img_shapes"]), golden["batch_shape"].tolist()
    return [torch.zeros(images, channels, -(-height // s), -(-width // s)) for s in level_strides(levels)]


def close_levels(ours: Sequence[Tensor], golden: Sequence[Tensor], tolerance: float, what: str) -> None:
    """Asserts :func:`close` on each level."""
    assert len(ours) == len(golden), f"{what}: {len(ours)} levels are not {len(golden)}"
    for level, (mine, theirs) in enumerate(zip(ours, golden)):
        close(mine, theirs, tolerance, f"{what} level {level}")


def close(ours: Optional[Tensor], golden: Tensor, tolerance: float, what: str) -> None:
    """Asserts that the largest error is at most ``tolerance`` of the largest value."""
    assert ours is not None, f"{what}: no value"
    assert ours.shape == golden.shape, f"{what}: {tuple(ours.shape)} is not {tuple(golden.shape)}"
    assert torch.isfinite(ours).all(), f"{what}: not finite"
    error = (ours - golden).abs().max()
    assert error <= tolerance * golden.abs().max().clamp(min=1e-12), f"{what}: off by {float(error):.3g}"
