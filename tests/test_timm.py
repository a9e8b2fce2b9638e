"""Backbones of timm: levels, weights from a local classifier, frozen stages and norms, and the pixels they expect."""

import builtins

import pytest
import torch
from detectron2.config import LazyConfig
from detectron2.modeling import build_model
from small import CONFIGS, batch, build, distill_config, gradients, save_teacher, step

from d2kd.checkpoint import convert_efficientnet_lite
from d2kd.checkpoint.convert import main as convert
from d2kd.config import drop_teacher, load_config
from d2kd.errors import D2kdError
from d2kd.modeling import TimmBackbone
from d2kd.wiring import check_wiring

timm = pytest.importorskip("timm")
NAME, RESNET = "test_efficientnet", "test_resnet"  # timm's own models for tests
RGB = ["MODEL.PIXEL_MEAN", "[123.675,116.28,103.53]", "MODEL.PIXEL_STD", "[58.395,57.12,57.375]", "INPUT.FORMAT", "RGB"]
TIMM = ["MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", "MODEL.TIMM.NAME", NAME]


@pytest.fixture
def classifier(tmp_path):
    """A classifier with weights and statistics that differ from a new one's, and its file."""
    torch.manual_seed(3)
    model = timm.create_model(NAME, num_classes=5).train()
    model(torch.randn(4, 3, 64, 64))
    torch.save(model.state_dict(), tmp_path / "classifier.pth")
    return model.eval(), str(tmp_path / "classifier.pth")


def plain(*opts):
    return load_config(str(CONFIGS / "quick_retinanet.yaml"), [*TIMM, *map(str, opts)])


@pytest.mark.slow
@pytest.mark.parametrize("name", [NAME, RESNET, "test_convnext", "swin_tiny_patch4_window7_224"])
def test_stages_are_named_by_stride(name):
    backbone = TimmBackbone(name, out_features=["res2", "res4", "res5"]).eval()
    found, shapes = backbone(torch.zeros(1, 3, 64, 96)), backbone.output_shape()
    assert list(found) == list(shapes) == ["res2", "res4", "res5"]
    for stage, stride in zip(found, (4, 16, 32)):
        assert found[stage].shape == (1, shapes[stage].channels, 64 // stride, 96 // stride)
        assert shapes[stage].stride == stride


def test_stages_above_the_last_are_not_built():
    names = [name for name, _ in TimmBackbone(RESNET, out_features=["res3"]).named_parameters()]
    assert any("layer2" in name for name in names)
    assert not any("layer3" in name for name in names)


def test_weights_of_a_whole_classifier(classifier, caplog):
    model, file = classifier
    with caplog.at_level("INFO"):
        backbone = TimmBackbone(NAME, pretrained=file).eval()
    assert "not needed: conv_head.weight, bn2.weight" in caplog.text
    image = torch.randn(1, 3, 64, 64)
    expected = model.forward_intermediates(image, intermediates_only=True)
    for stage, theirs in zip(("res3", "res4", "res5"), expected[-3:]):
        assert torch.allclose(backbone(image)[stage], theirs, atol=1e-5)


def test_weights_under_other_names_than_the_wrappers(tmp_path):
    """A features_only model renames stages.0 to stages_0; files have the classifier's names."""
    model = timm.create_model("test_convnext").eval()
    torch.save({"model": model.state_dict()}, tmp_path / "classifier.pth")
    backbone = TimmBackbone("test_convnext", pretrained=str(tmp_path / "classifier.pth")).eval()
    assert "stages_0.blocks.0.conv_dw.weight" in backbone.net.state_dict()
    image = torch.randn(1, 3, 64, 64)
    expected = model.forward_intermediates(image, intermediates_only=True)[-1]
    assert torch.allclose(backbone(image)["res5"], expected, atol=1e-5)


@pytest.mark.parametrize(
    "spoil", [lambda s: s.pop("blocks.1.0.conv_exp.weight"), lambda s: s.update(bogus=s.pop("conv_stem.weight"))]
)
def test_missing_weights_are_an_error(classifier, tmp_path, spoil):
    state = classifier[0].state_dict()
    spoil(state)
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(
        D2kdError, match=r"part.pth does not hold the weights of MODEL.TIMM.NAME: 1 missing in the file"
    ):
        TimmBackbone(NAME, pretrained=str(tmp_path / "part.pth"))


def test_weights_of_another_model_are_an_error(classifier):
    with pytest.raises(D2kdError, match=r"missing in the file .*with a different shape"):
        TimmBackbone(RESNET, pretrained=classifier[1])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("", {}, "MODEL.TIMM.NAME is empty"),
        ("test_efficientnett", {}, "timm has no such model; did you mean test_efficientnet"),
        ("test_vit", {}, "is 'res3'; use one of res4"),
        (NAME, {"out_features": ["res3", "res7"]}, "is 'res7'; use one of res1, res2, res3, res4, res5"),
        (NAME, {"norm": "GN"}, "MODEL.TIMM.NORM is 'GN'; use one of BN, SyncBN, FrozenBN"),
        (NAME, {"pretrained": "/nowhere.pth"}, "/nowhere.pth: no such file"),
        (f"{NAME}.nonsense", {}, "cannot be a backbone: Invalid pretrained tag"),
    ],
)
def test_mistakes(name, options, message):
    with pytest.raises(D2kdError, match=message):
        TimmBackbone(name, **options)


def test_without_timm(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "timm":
            raise ImportError("No module named 'timm'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(D2kdError, match=r"pip install 'd2kd\[timm\]'"):
        build_model(plain())


def test_without_network_the_file_is_named(monkeypatch):
    def offline(*_, **options):
        if options.get("pretrained"):
            raise OSError("no route to host")
        return create(*_, **options)

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(D2kdError, match=r"no route to host.*set MODEL.TIMM.PRETRAINED to its path"):
        TimmBackbone(NAME, pretrained=True)


@pytest.mark.parametrize(("freeze_at", "frozen"), [(0, 0), (1, 1), (2, 2), (5, 5)])
def test_frozen_stages(freeze_at, frozen):
    """Of test_efficientnet, each of blocks 0 to 4 makes the outputs of the next stride; the stem is before block 0."""
    backbone = TimmBackbone(NAME, norm="BN", freeze_at=freeze_at)
    for index, block in enumerate(backbone.net.blocks):
        is_frozen = index < frozen
        assert all(p.requires_grad != is_frozen for p in block.parameters()), index
        norms = [type(m).__name__ for m in block.modules() if "BatchNorm" in type(m).__name__]
        assert all(name.startswith("Frozen") == is_frozen for name in norms), norms
    assert backbone.net.conv_stem.weight.requires_grad == (freeze_at == 0)


@pytest.mark.parametrize(("norm", "moves"), [("BN", True), ("FrozenBN", False)])
def test_norms(norm, moves, classifier):
    backbone = TimmBackbone(NAME, pretrained=classifier[1], norm=norm).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    found = backbone(torch.randn(2, 3, 64, 64))
    after = backbone.state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert any("running_mean" in name for name in changed) == moves
    assert torch.equal(backbone.eval()(torch.ones(1, 3, 64, 64))["res3"], backbone(torch.ones(1, 3, 64, 64))["res3"])
    assert found["res5"].requires_grad


@pytest.mark.slow
def test_pixels_are_taken_over_or_checked(classifier, tmp_path):
    """detectron2's defaults are replaced by timm's; others are compared."""
    weights = ["MODEL.TIMM.PRETRAINED", classifier[1]]
    default = ["MODEL.PIXEL_STD", "[1.0,1.0,1.0]"]
    assert plain().MODEL.PIXEL_STD == [57.375, 57.12, 58.395], "without pretrained weights nothing is expected"
    cfg = plain(*weights, *default)
    assert cfg.INPUT.FORMAT == "RGB"
    assert pytest.approx([123.675, 116.28, 103.53]) == cfg.MODEL.PIXEL_MEAN
    assert pytest.approx([58.395, 57.12, 57.375]) == cfg.MODEL.PIXEL_STD
    build_model(cfg)
    build_model(plain(*weights, *RGB))
    for wrong in (
        ["INPUT.FORMAT", "BGR"],
        ["MODEL.PIXEL_STD", "[1.0,1.0,1.0]"],
        ["MODEL.PIXEL_MEAN", "[103.53,116.28,123.675]"],
    ):
        with pytest.raises(D2kdError, match=r"set MODEL.PIXEL_MEAN \[123.675, 116.28, 103.53\], .* INPUT.FORMAT RGB"):
            build_model(plain(*weights, *RGB, *wrong))


def test_pretrained_changes_between_true_and_a_path(classifier):
    config = str(CONFIGS / "retinanet_lite0.yaml")
    assert load_config(config).MODEL.TIMM.PRETRAINED is True
    assert load_config(config, ["MODEL.TIMM.PRETRAINED", "/a.pth"]).MODEL.TIMM.PRETRAINED == "/a.pth"
    assert load_config(config, ["MODEL.TIMM.PRETRAINED", "False"]).MODEL.TIMM.PRETRAINED is False


def test_pixels_of_a_lazyconfig_are_checked(classifier):
    detector = build_model(plain("MODEL.TIMM.PRETRAINED", classifier[1], *RGB))
    check_wiring(detector)
    detector.input_format = "BGR"
    with pytest.raises(D2kdError, match="expect other pixels than BGR"):
        check_wiring(detector)


def test_a_checkpoint_needs_no_pretrained_weights(tmp_path):
    """Evaluation, export and teachers load all weights from a checkpoint."""
    opts = [*TIMM, "MODEL.TIMM.PRETRAINED", "/nowhere.pth", *RGB]
    cfg = load_config(str(CONFIGS / "quick_retinanet.yaml"), opts, with_teacher=False)
    assert build_model(cfg).pixel_std.flatten().tolist() == pytest.approx([58.395, 57.12, 57.375])
    lazy = LazyConfig.load(str(CONFIGS / "lazy" / "crosskd_retinanet_lite0.py"))
    drop_teacher(lazy)
    assert lazy.model.backbone.bottom_up.pretrained is False


@pytest.mark.slow
def test_a_student_with_a_timm_teacher(classifier, tmp_path):
    """Both with backbones of timm, the student narrower; the teacher's own file of pretrained weights is not needed."""
    own = [*TIMM, "MODEL.RETINANET.NORM", "''"]
    teacher = save_teacher(tmp_path / "teacher.pth", *own)
    teacher_opts = [*own, "MODEL.TIMM.PRETRAINED", "/nowhere.pth", *RGB]
    student_opts = [*own, "MODEL.TIMM.PRETRAINED", classifier[1], *RGB, "MODEL.FPN.OUT_CHANNELS", 16]
    model = build(distill_config(teacher, *student_opts, teacher_opts=teacher_opts, methods=("CrossKD", "PKD")))
    losses = step(model, batch())
    assert all(value.isfinite() for value in losses.values())
    assert gradients(model, losses)["backbone.bottom_up.net.blocks.3.0.conv_pwl.weight"].abs().sum() > 0


def efficientnet_lite():
    """The file of a package: its names and order, with the shapes of timm's model."""
    state = timm.create_model("tf_efficientnet_lite0").state_dict()
    kinds = [name.rpartition(".")[2] for name in state]
    own = {f"_blocks.{i}.{kind}": value for i, (kind, value) in enumerate(zip(kinds, state.values()))}
    first, depthwise = "_conv_stem.weight", "_blocks.0._depthwise_conv.weight"
    names = list(own)
    renamed = {names[0]: first, names[6]: depthwise}
    return {renamed.get(name, name): torch.randn(value.shape) if value.ndim else value for name, value in own.items()}


@pytest.mark.slow
def test_efficientnet_lite_gets_timms_names(tmp_path, capsys):
    source = efficientnet_lite()
    torch.save(source, tmp_path / "package.pth")
    assert convert([str(tmp_path / "package.pth"), str(tmp_path / "timm.pth")]) == 0
    assert "tf_efficientnet_lite0 of timm: 247 tensors mapped, in order" in capsys.readouterr().out
    net = TimmBackbone("tf_efficientnet_lite0", pretrained=str(tmp_path / "timm.pth")).net
    assert torch.equal(net.conv_stem.weight, source["_conv_stem.weight"])
    assert torch.equal(net.blocks[0][0].conv_dw.weight, source["_blocks.0._depthwise_conv.weight"])


@pytest.mark.slow
def test_other_orders_and_shapes_are_refused():
    source = efficientnet_lite()
    last = list(source)[-1]
    with pytest.raises(D2kdError, match="do not stand in the order and shapes"):
        convert_efficientnet_lite({**source, last: source[last][:7]})
    items = list(source.items())
    items[12], items[13] = items[13], items[12]
    with pytest.raises(D2kdError, match="do not stand in the order and shapes"):
        convert_efficientnet_lite(dict(items))
