"""Every detector, plain and as a student without methods: training, inference, export, names; and FPN variants."""

from typing import Any, Dict, List, Set, Tuple

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.export import TracingAdapter, scripting_with_instances
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from small import batch, build, gradients, small_config, step
from torch import Tensor, nn

from d2kd.contract import Dense, check_contract, members
from d2kd.errors import D2kdError
from d2kd.modeling import ExtraLevels, make_fpn, make_resnet

PLAIN = ("RetinaNet", "GFL", "ATSS", "FCOS")
LOSSES = {
    "RetinaNet": {"loss_cls", "loss_box_reg"},
    "GFL": {"loss_cls", "loss_bbox", "loss_dfl"},
    "ATSS": {"loss_cls", "loss_bbox", "loss_centerness"},
    "FCOS": {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"},
}
NUM_CONVS, STAGES = 2, (3, 4, 5)

plain = pytest.mark.parametrize("name", PLAIN)
DISTILLED = [f"Distill{name}" for name in PLAIN]
every = pytest.mark.parametrize("name", [*PLAIN, *DISTILLED])
students_slow = pytest.mark.parametrize("name", [*PLAIN, *(pytest.param(x, marks=pytest.mark.slow) for x in DISTILLED)])


def config(name: str, *opts: Any) -> CfgNode:
    return small_config("MODEL.META_ARCHITECTURE", name, *opts)


def detector(name: str, *opts: Any) -> nn.Module:
    """A tiny detector whose scores and boxes differ from place to place."""
    model = build(config(name, *opts))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for part, std in ((model.head.cls_score, 0.3), (model.head.bbox_pred, 0.05)):
            part.weight.normal_(std=std, generator=generator)
        model.head.bbox_pred.bias.fill_(0.5)  # FCOS's boxes have an area then
    return model


def detect(model: nn.Module, inputs: List[Dict[str, Any]]) -> List[Instances]:
    with torch.no_grad():
        return [x["instances"] for x in model.eval()(inputs)]


def agree(found: Instances, expected: Instances) -> None:
    """Equal detections, and some."""
    assert len(found) == len(expected) > 5
    assert torch.equal(found.pred_classes, expected.pred_classes)
    torch.testing.assert_close(found.scores, expected.scores)
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=1e-4, atol=1e-3)


# --- training


@every
@pytest.mark.parametrize("boxes", [(2, 2), (2, 0), (0, 0)], ids=["all", "one empty", "none"])
def test_train_step(name: str, boxes: Tuple[int, int]) -> None:
    model = build(config(name))
    losses = step(model, batch(boxes=boxes))
    assert set(losses) == LOSSES[name.replace("Distill", "")]
    assert all(x.shape == () and x.dtype == torch.float32 and x.isfinite() for x in losses.values())
    grads = gradients(model, losses)
    assert set(grads) == {key for key, p in model.named_parameters() if p.requires_grad}
    assert all(grad.isfinite().all() for grad in grads.values())
    assert (grads["head.bbox_pred.weight"].abs().sum() > 0) == any(boxes)


@plain
def test_a_student_without_methods_is_the_plain_detector(name: str) -> None:
    ours, theirs = build(config(f"Distill{name}")), build(config(name))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    losses, expected = (step(model, batch()) for model in (ours, theirs))
    assert losses == expected
    own, plain_grads = gradients(ours, losses), gradients(theirs, expected)
    assert all(torch.equal(own[key], plain_grads[key]) for key in plain_grads)


@plain
def test_training_under_autocast(name: str) -> None:
    exact = step(build(config(name)), batch())
    model = build(config(name))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = step(model, batch())
    for key, loss in losses.items():
        assert loss.dtype == torch.float32 or name == "RetinaNet"  # detectron2's own stays in half precision
        assert loss.item() == pytest.approx(exact[key].item(), rel=0.1), key
    assert all(grad.isfinite().all() for grad in gradients(model, losses).values())


@every
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_training_on_non_finite_images_ends_with_an_error(name: str, value: float) -> None:
    """Nothing is updated: detectron2's trainer names the losses, or its GIoU loss refuses the boxes before."""
    model = build(config(name))
    inputs = batch()
    inputs[0]["image"] = torch.full((3, 96, 128), value)
    before = {key: p.clone() for key, p in model.state_dict().items()}
    trainer = SimpleTrainer(model, [inputs], torch.optim.SGD(model.parameters(), lr=0.1))
    by_fvcore = name.endswith(("RetinaNet", "FCOS"))
    error, text = (AssertionError, "bad box") if by_fvcore else (FloatingPointError, "infinite or NaN.*loss_bbox")
    trainer.iter = 0
    with EventStorage() as trainer.storage, pytest.raises(error, match=f"(?s){text}"):
        trainer.run_step()
    assert all(torch.equal(p, before[key]) for key, p in model.state_dict().items())


# --- inference


@every
def test_detections_of_images_of_different_sizes(name: str) -> None:
    model = detector(name, "TEST.DETECTIONS_PER_IMAGE", 20)
    inputs = batch()
    inputs[0]["height"], inputs[0]["width"] = 192, 256
    together = detect(model, inputs)
    for found, (height, width) in zip(together, ((192, 256), (80, 112))):
        assert found.image_size == (height, width)
        assert 0 < len(found) <= 20
        assert (found.scores.diff() <= 0).all()
        assert (found.scores > model.test_score_thresh).all() or name.endswith("ATSS")
        assert found.pred_boxes.nonempty().all()
        assert (found.pred_boxes.tensor >= 0).all()
        assert (found.pred_boxes.tensor <= torch.tensor([width, height, width, height])).all()
    model.test_score_thresh = 1.0
    assert [len(found) for found in detect(model, inputs)] == [0, 0]


@plain
def test_candidates_per_level(name: str) -> None:
    """Two of each of four levels are left; GFL and RetinaNet keep the best score."""
    model = detector(name)
    model.test_nms_thresh = 1.0
    everything = detect(model, batch())[0]
    model.test_topk_candidates = 2
    found = detect(model, batch())[0]
    assert 0 < len(found) <= 2 * len(model.head_in_features) < len(everything)
    if name in ("GFL", "RetinaNet"):
        assert found.scores[0] == everything.scores[0]


@every
def test_non_finite_predictions(name: str) -> None:
    """NaN scores pass no threshold; infinite boxes are refused: so detectron2's RetinaNet has it."""
    model = detector(name)
    values: List[float] = []
    model.head.register_forward_hook(
        lambda _module, _inputs, outputs: tuple([torch.full_like(x, values[-1]) for x in level] for level in outputs)
    )
    values.append(float("nan"))
    assert [len(found) for found in detect(model, batch())] == [0, 0]
    values.append(float("inf"))
    with pytest.raises(AssertionError, match="infinite or NaN"):
        detect(model, batch())


@plain
def test_inference_under_autocast(name: str) -> None:
    model = detector(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = detect(model, batch())
    for image in found:
        assert len(image) > 0
        assert image.pred_boxes.tensor.dtype == torch.float32
        assert image.scores.dtype == torch.float32 or name == "RetinaNet"  # detectron2's own, bfloat16
        assert image.pred_boxes.tensor.isfinite().all()


# --- export


@pytest.mark.slow
@students_slow
def test_traced_detector_agrees_on_an_image_of_another_size(name: str) -> None:
    def run(model: nn.Module, image: Tensor) -> Instances:
        return model([{"image": image}])[0]["instances"]

    model = detector(name).eval()
    images = [x["image"].float() for x in batch([(128, 128), (96, 128), (128, 192)])]
    adapter = TracingAdapter(model, images[0], run).eval()
    traced = torch.jit.trace(adapter, (images[0],), check_trace=False)
    for image in images[1:]:
        agree(adapter.outputs_schema(traced(image)), detect(model, [{"image": image}])[0])


@pytest.mark.slow
@plain
def test_scripted_detector_agrees(name: str) -> None:
    """Of a student, the plain detector with its weights is scripted."""
    model = detector(name).eval()
    model.load_state_dict(detector(f"Distill{name}").state_dict())
    scripted = scripting_with_instances(model, {"pred_boxes": Boxes, "scores": Tensor, "pred_classes": Tensor})
    inputs = [{"image": x["image"].float()} for x in batch()]
    with torch.no_grad():
        results = scripted(inputs)
    for result, expected, image in zip(results, detect(model, inputs), inputs):
        size = tuple(image["image"].shape[1:])
        found = Instances(size, pred_boxes=Boxes(result.pred_boxes.tensor))
        found.scores, found.pred_classes = result.scores, result.pred_classes
        agree(detector_postprocess(found, *size), expected)


# --- names


def backbone_names(top: str = "p6") -> Set[str]:
    """Of a ResNet with one basic block per stage, frozen BN, and an FPN on res3 to res5."""

    def conv(path: str) -> Set[str]:
        norm = {f"{path}.norm.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")}
        return {f"{path}.weight"} | norm

    names = conv("bottom_up.stem.conv1")
    for stage in (2, 3, 4, 5):
        for part in ("conv1", "conv2", *(["shortcut"] if stage > 2 else [])):
            names |= conv(f"bottom_up.res{stage}.0.{part}")
    parts = [f"fpn_{kind}{stage}" for kind in ("lateral", "output") for stage in STAGES] + [f"top_block.{top}"]
    return {f"backbone.{name}" for name in names | leaves(*parts)}


def leaves(*paths: str) -> Set[str]:
    return {f"{path}.{leaf}" for path in paths for leaf in ("weight", "bias")}


def head_names(name: str) -> Set[str]:
    """Of towers of convolution, GN and ReLU; the published GFL and ATSS heads have no biases before a norm."""
    towers = {
        f"{tower}_subnet.{index}" for tower in ("cls", "bbox") for i in range(NUM_CONVS) for index in (3 * i, 3 * i + 1)
    }
    predictors = {"cls_score", "bbox_pred"} | ({"ctrness"} if name in ("ATSS", "FCOS") else set())
    names = leaves(*towers, *predictors)
    if name in ("GFL", "ATSS"):
        names -= {f"{tower}_subnet.{3 * i}.bias" for tower in ("cls", "bbox") for i in range(NUM_CONVS)}
        names.add("scales")
    return {f"head.{x}" for x in names}


@every
def test_state_dict_names(name: str) -> None:
    assert set(build(config(name)).state_dict()) == backbone_names() | head_names(name.replace("Distill", ""))


# --- the contract of heads


@plain
def test_detectors_keep_the_contract(name: str) -> None:
    check_contract(build(config(name)))


def test_a_broken_contract_is_named() -> None:
    model = build(config("GFL"))
    model.head.bbox_subnet = nn.ModuleList(model.head.bbox_subnet)
    with pytest.raises(D2kdError, match=r"GFL's head, GFLHead, has no nn\.Sequential bbox_subnet; keep its towers"):
        check_contract(model)
    check_contract(model, with_head=False)
    del model.head.cls_subnet
    with pytest.raises(D2kdError, match=r"no nn\.Sequential cls_subnet and bbox_subnet"):
        check_contract(model)

    class Bare(nn.Module):
        """A detector of someone else."""

    bare = Bare()
    with pytest.raises(D2kdError, match=r"Bare has no backbone, .*, label_anchors, losses; give it these"):
        check_contract(bare)
    for part in members(Dense):
        setattr(bare, part, None)
    with pytest.raises(D2kdError, match="Bare has no label_anchors, losses;"):
        check_contract(bare, with_head=False)
    check_contract(bare, with_head=False, with_losses=False)


# --- FPN variants


def pyramid(stages: Tuple[int, ...], start: str, relu: bool = False, **options: Any) -> nn.Module:
    torch.manual_seed(5)
    names = [f"res{stage}" for stage in stages]
    fpn = make_fpn(
        make_resnet((1, 1, 1, 1), width=4, out_features=names), names, 8, extra_in_feature=start, relu=relu, **options
    )
    for parameter in fpn.parameters():
        nn.init.normal_(parameter, std=0.2)
    return fpn.eval()


def convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 3x3 convolution of stride 2 by its definition: each output is a sum over a window of the padded input."""
    x = F.pad(x, (1, 1, 1, 1))
    height, width = (x.shape[2] - 1) // 2, (x.shape[3] - 1) // 2
    out = conv.bias.view(1, -1, 1, 1).expand(len(x), -1, height, width).clone()
    for row in range(3):
        for column in range(3):
            window = x[:, :, row : row + 2 * height : 2, column : column + 2 * width : 2]
            out += torch.einsum("oc,nchw->nohw", conv.weight[:, :, row, column], window)
    return out


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("start", ["res", "p", "lateral"])
@pytest.mark.parametrize("stages", [(2, 3, 4, 5), (3, 4, 5), (4, 5), (3, 4)], ids=str)
@torch.no_grad()
def test_extra_levels(stages: Tuple[int, ...], start: str, relu: bool) -> None:
    last = stages[-1]
    fpn = pyramid(stages, f"{start}{last}", relu)
    image = torch.randn(2, 3, 192, 256, generator=torch.Generator().manual_seed(0))
    levels, features = fpn(image), fpn.bottom_up(image)
    assert list(levels) == [f"p{stage}" for stage in (*stages, last + 1, last + 2)]
    for name, level in levels.items():
        stride = 2 ** int(name[1:])
        assert fpn.output_shape()[name].stride == stride
        assert level.shape == (2, 8, -(-192 // stride), -(-256 // stride))
    deepest = features[f"res{last}"]
    lateral = getattr(fpn, f"fpn_lateral{last}")
    one_by_one = torch.einsum("oc,nchw->nohw", lateral.weight[:, :, 0, 0], deepest) + lateral.bias.view(1, -1, 1, 1)
    source = {"res": deepest, "p": levels[f"p{last}"], "lateral": one_by_one}[start]
    upper = [getattr(fpn.top_block, f"p{last + i}") for i in (1, 2)]
    first = convolve(upper[0], source)
    torch.testing.assert_close(levels[f"p{last + 1}"], first, rtol=1e-4, atol=1e-4)
    second = convolve(upper[1], first.relu() if relu else first)
    torch.testing.assert_close(levels[f"p{last + 2}"], second, rtol=1e-4, atol=1e-4)
    assert (first < 0).any()  # so that the ReLU matters


@pytest.mark.parametrize("fuse_type", ["sum", "avg"])
@torch.no_grad()
def test_where_extra_levels_start_changes_nothing_below(fuse_type: str) -> None:
    fpns = [pyramid((2, 3, 4, 5), start, fuse_type=fuse_type) for start in ("p5", "lateral5")]
    fpns[1].load_state_dict(fpns[0].state_dict())
    image = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    ours, theirs = (fpn(image) for fpn in reversed(fpns))
    assert all(torch.equal(ours[level], theirs[level]) for level in ("p2", "p3", "p4", "p5"))
    assert not torch.equal(ours["p6"], theirs["p6"])


@pytest.mark.parametrize("start", ["res5", "p5", "lateral5"])
def test_parameter_names_do_not_depend_on_where_extra_levels_start(start: str) -> None:
    model = detector("GFL", "MODEL.FPN.EXTRA.IN_FEATURE", start)
    assert set(model.state_dict()) == backbone_names() | head_names("GFL")
    assert [name for name, _ in ExtraLevels(4, 4, start).named_children()] == ["p6", "p7"]
    losses = step(model, batch())
    assert gradients(model, losses)["backbone.top_block.p6.weight"].abs().sum() > 0


def test_a_detector_that_starts_at_p2() -> None:
    names = str([f"res{stage}" for stage in (2, 3, 4, 5)])
    stages = ("MODEL.RESNETS.OUT_FEATURES", names, "MODEL.FPN.IN_FEATURES", names)
    model = detector("GFL", *stages, "MODEL.GFL.IN_FEATURES", "['p2', 'p3', 'p4', 'p5', 'p6']")
    assert [model.backbone.output_shape()[name].stride for name in model.head_in_features] == [4, 8, 16, 32, 64]
    assert step(model, batch())["loss_cls"].isfinite()


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("MODEL.FPN.EXTRA.IN_FEATURE", "p4"), r"IN_FEATURE is 'p4'; use one of res5, p5, lateral5"),
        (("MODEL.FPN.EXTRA.IN_FEATURE", "laterl5"), "did you mean lateral5"),
        (("MODEL.FPN.IN_FEATURES", "['res2', 'res3']"), "MODEL.FPN.IN_FEATURES is 'res2'; use one of res3, res4, res5"),
        (("MODEL.FPN.IN_FEATURES", "['res3', 'res5']"), "res3, res5; list consecutive stages"),
        (("MODEL.GFL.IN_FEATURES", "['p3', 'p7']"), "MODEL.GFL.IN_FEATURES is 'p7'; use one of p3, p4, p5, p6"),
    ],
)
def test_wrong_names_of_levels(opts: Tuple[str, str], message: str) -> None:
    with pytest.raises(D2kdError, match=message):
        build(config("GFL", *opts))
