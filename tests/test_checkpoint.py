"""Weights: conversion from torchvision and mmdetection, strict loading, the command line."""

import json
import os
import pickle
from pathlib import Path
from typing import Any, Callable, Dict, List
from urllib.error import URLError

import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_backbone, build_model
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn

from d2kd.checkpoint import StrictCheckpointer, convert_mmdet, files, is_mmdet, load_strict, register_torchvision
from d2kd.checkpoint.convert import main
from d2kd.config import load_config
from d2kd.errors import D2kdError
from d2kd.modeling import ExtraLevels

CONFIGS = Path(__file__).parent.parent / "configs"
KEYS = json.loads((Path(__file__).parent / "goldens/crosskd/mmdet_state_dict_keys.json").read_text())
RESNET18 = "resnet18-f37072fd.pth"


def config(depth: int = 18, classes: int = 80, channels: int = 256) -> CfgNode:
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth < 50 else 256
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = channels
    cfg.MODEL.RETINANET.NUM_CLASSES = classes
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[x, x * 2 ** (1 / 3), x * 2 ** (2 / 3)] for x in (32, 64, 128, 256, 512)]
    return cfg


def small_model(classes: int = 5) -> nn.Module:
    """ResNet-18 with 8 FPN channels: the smallest that detectron2's own builders make."""
    return build_model(config(classes=classes, channels=8))


def without_relu(model: nn.Module) -> nn.Module:
    """The same model with P6 and P7 as mmdetection makes them."""
    model.backbone.top_block = ExtraLevels(512, 8, "res5")
    return model


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_model()


def stored(shapes: Dict[str, List[int]]) -> Dict[str, Tensor]:
    """A state dict with shapes but no numbers."""
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def shrink(classes: int = 5, channels: int = 8, slots: int = 9) -> Dict[str, Tensor]:
    """Mmdetection's ResNet-18 RetinaNet with random numbers and few channels."""

    def shape(key: str, full: List[int]) -> List[int]:
        if key.startswith("backbone."):
            return full
        sizes = {720: slots * classes, 36: slots * 4, 256: channels}
        keep_input = "lateral_convs" in key or "fpn_convs.3" in key  # these read the backbone
        return [n if i == 1 and keep_input else sizes.get(n, n) for i, n in enumerate(full)]

    return {key: torch.rand(shape(key, full)) for key, full in KEYS["retinanet_r18"].items()}


def message(action: Callable[[], Any]) -> str:
    """What a mistake tells the user: one line."""
    with pytest.raises(D2kdError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- mmdetection


@pytest.mark.parametrize("depth", [18, 50])
def test_every_retinanet_key_has_its_place(depth: int) -> None:
    converted = convert_mmdet(stored(KEYS[f"retinanet_r{depth}"]))
    expected = build_model(config(depth)).state_dict()
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in expected.items()}


@pytest.mark.slow
@pytest.mark.parametrize("entry", ["gfl_r50", "gfl_r18", "atss_r50", "fcos_r50"])
def test_every_key_of_the_other_detectors_has_its_place(entry: str) -> None:
    detector, depth = entry.split("_r")
    opts = ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", depth, "MODEL.META_ARCHITECTURE", detector.upper()]
    cfg = load_config(str(CONFIGS / "Base-dense.yaml"), opts)
    cfg.merge_from_list(["MODEL.FCOS.BOX_SCALES", True, "MODEL.FCOS.TOWER_BIAS", False])
    converted = convert_mmdet(stored(KEYS[entry]))
    expected = build_model(cfg).state_dict()
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in expected.items()}


def head(channels: Tensor, boxes: Tensor) -> Dict[str, Tensor]:
    """Only the predictors; every number of an output channel is that channel's value."""
    state = {"bbox_head.retina_cls.bias": channels, "bbox_head.retina_reg.bias": boxes}
    weights = {key.replace("bias", "weight"): v.view(-1, 1, 1, 1).expand(-1, 2, 3, 3) for key, v in state.items()}
    return {**state, **weights}


def test_anchor_slots_are_reordered() -> None:
    """2 ratios (a, b) x 3 octaves (0, 1, 2), 2 classes. mmdetection's slots are a0 a1 a2 b0 b1 b2, detectron2's
    a0 b0 a1 b1 a2 b2: its slots read mmdetection's 0 3 1 4 2 5. With 2 channels per slot (classes) these are channels
    0 1, 6 7, 2 3, 8 9, 4 5, 10 11; with 4 per slot (box) each slot s gives 4s, 4s+1, 4s+2, 4s+3.
    """
    converted = convert_mmdet(head(torch.arange(12.0), torch.arange(24.0)), num_ratios=2, num_octaves=3)
    classes = [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]
    boxes = [0, 1, 2, 3, 12, 13, 14, 15, 4, 5, 6, 7, 16, 17, 18, 19, 8, 9, 10, 11, 20, 21, 22, 23]
    assert converted["head.cls_score.bias"].tolist() == classes
    assert converted["head.bbox_pred.bias"].tolist() == boxes
    assert converted["head.cls_score.weight"][:, 1, 2, 2].tolist() == classes
    assert converted["head.bbox_pred.weight"][:, 1, 2, 2].tolist() == boxes


def test_reordered_slots_are_the_anchors_of_detectron2() -> None:
    """The numbers of detectron2's anchor generator, put in mmdetection's order, come back as detectron2's."""
    generator = small_model().anchor_generator
    anchors = next(iter(generator.cell_anchors))
    mmdet_order = torch.cat([anchors[ratio::3] for ratio in range(3)])
    converted = convert_mmdet(head(torch.zeros(9), mmdet_order.flatten()))
    assert torch.equal(converted["head.bbox_pred.bias"].view(9, 4), anchors)


@pytest.mark.parametrize(("ratios", "octaves"), [(3, 2), (1, 1), (0, 3), (-3, -3)])
def test_wrong_number_of_anchors_is_refused(ratios: int, octaves: int) -> None:
    assert f"{ratios} ratios x {octaves} octaves" in message(lambda: convert_mmdet(shrink(), ratios, octaves))


def test_group_norm_towers() -> None:
    state = head(torch.zeros(9), torch.zeros(36))
    for tower in ("cls_convs", "reg_convs"):
        for k in range(2):
            state[f"bbox_head.{tower}.{k}.conv.weight"] = state[f"bbox_head.{tower}.{k}.gn.bias"] = torch.zeros(1)
    subnets = sorted(key for key in convert_mmdet(state) if "_subnet" in key)
    places = ["0.weight", "1.bias", "3.weight", "4.bias"]
    assert subnets == [f"head.{subnet}.{place}" for subnet in ("bbox_subnet", "cls_subnet") for place in places]


def test_wrapped_and_prefixed_states() -> None:
    state = shrink()
    wrapped = {"meta": {}, "state_dict": {f"module.{k}": v for k, v in state.items()}}
    wrapped["state_dict"]["module.data_preprocessor.mean"] = torch.zeros(3)
    assert is_mmdet(wrapped)
    assert is_mmdet(state)
    converted, expected = convert_mmdet(wrapped), convert_mmdet(state)
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[key], expected[key]) for key in expected)
    assert not is_mmdet(expected)


def test_unknown_keys_are_listed() -> None:
    extra = {f"roi_head.fc{i}.weight": torch.zeros(1) for i in range(7)}
    text = message(lambda: convert_mmdet({**shrink(), **extra}))
    assert "roi_head.fc0.weight" in text
    assert "7 in all" in text
    assert "fc5" not in text
    deep_stem = {"backbone.layer1.0.downsample.2.weight": torch.zeros(1)}
    assert "downsample.2" in message(lambda: convert_mmdet({**shrink(), **deep_stem}))
    assert "none of mmdetection's RetinaNet, GFL, ATSS, FCOS" in message(
        lambda: convert_mmdet({"neck.lateral_convs.0.conv.bias": torch.zeros(1)})
    )
    assert "meta is a dict" in message(lambda: convert_mmdet({"meta": {}}))


# ---- torchvision


def torchvision_resnet(name: str) -> nn.Module:
    """A random ResNet whose norms do something."""
    torch.manual_seed(0)
    net = torchvision.models.get_model(name, weights=None).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_var, module.weight.data):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.running_mean, module.bias.data):
                tensor.normal_()
    return net


def save(path: Path, content: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return str(path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty torch.hub folder without network."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise URLError("no route")

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    return tmp_path / "hub" / "checkpoints"


class Detector(nn.Module):
    """A backbone where every detector has it."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.backbone = build_backbone(config(depth, channels=8)).eval()


@pytest.mark.slow
@pytest.mark.parametrize("depth", [18, 50])
def test_features_equal_torchvisions(depth: int, tmp_path: Path, hub: Path) -> None:
    net = torchvision_resnet(f"resnet{depth}")
    path = save(tmp_path / f"resnet{depth}-0123abcd.pth", net.state_dict())
    detector = Detector(depth)
    DetectionCheckpointer(detector).load(f"torchvision://{path}")
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        features = detector.backbone.bottom_up(image)
        x = net.maxpool(net.relu(net.bn1(net.conv1(image))))
        for stage in range(1, 5):
            x = getattr(net, f"layer{stage}")(x)
            error = (features[f"res{stage + 1}"] - x).abs().max() / x.abs().max()
            assert error < 1e-5


def test_hub_file_is_used_without_network(hub: Path) -> None:
    net = torchvision_resnet("resnet18")
    save(hub / RESNET18, net.state_dict())
    model = build_model(config(channels=8))
    DetectionCheckpointer(model).resume_or_load("torchvision://resnet18", resume=False)
    assert torch.equal(model.backbone.bottom_up.res2[0].conv1.weight, net.layer1[0].conv1.weight)
    assert sorted(p.name for p in hub.iterdir()) == ["resnet18-f37072fd.detectron2.pth", RESNET18]
    with PathManager.open("torchvision://resnet18", "rb") as file:
        assert "model" in torch.load(file, weights_only=True)


def test_download_goes_to_the_hub_folder(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def fake(url: str, target: str, hash_prefix: str, progress: bool) -> None:
        asked.update(url=url, hash_prefix=hash_prefix)
        save(Path(target), torchvision_resnet("resnet18").state_dict())

    monkeypatch.setattr(torch.hub, "download_url_to_file", fake)
    PathManager.get_local_path("torchvision://resnet18")
    assert (hub / RESNET18).is_file()
    assert asked == {"url": f"https://download.pytorch.org/models/{RESNET18}", "hash_prefix": "f37072fd"}


def test_failed_download_names_url_and_folder(hub: Path) -> None:
    text = message(lambda: PathManager.get_local_path("torchvision://resnet18"))
    assert f"https://download.pytorch.org/models/{RESNET18} could not be downloaded" in text
    assert text.endswith(f"into {hub}")


@pytest.mark.slow
def test_conversion_is_kept_until_the_source_changes(tmp_path: Path, hub: Path) -> None:
    net = torchvision_resnet("resnet18")
    source = save(tmp_path / "net.pth", net.state_dict())
    target = Path(PathManager.get_local_path(f"torchvision://{source}"))
    assert target == tmp_path / "net.detectron2.pth"
    made = target.stat().st_mtime_ns
    PathManager.get_local_path(f"torchvision://{source}")
    assert target.stat().st_mtime_ns == made
    nn.init.zeros_(net.conv1.weight)
    save(Path(source), net.state_dict())
    PathManager.get_local_path(f"torchvision://{source}")
    assert not torch.load(target, weights_only=True)["model"]["backbone.bottom_up.stem.conv1.weight"].any()
    target.write_bytes(b"damaged")
    PathManager.get_local_path(f"torchvision://{source}")
    assert "model" in torch.load(target, weights_only=True)


def test_read_only_folder(tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(tmp_path / "net.pth", torchvision_resnet("resnet18").state_dict())
    mkstemp = files.tempfile.mkstemp
    read_only = [str(tmp_path)]

    def guarded(dir: str, suffix: str) -> Any:
        if dir in read_only:
            raise PermissionError(13, "read-only", dir)
        return mkstemp(dir=dir, suffix=suffix)

    monkeypatch.setattr(files.tempfile, "mkstemp", guarded)
    read_only.append(str(hub))
    assert "TORCH_HOME" in message(lambda: PathManager.get_local_path(f"torchvision://{source}"))
    read_only.pop()
    assert PathManager.get_local_path(f"torchvision://{source}") == str(hub / "net.detectron2.pth")
    assert PathManager.get_local_path(f"torchvision://{source}") == str(hub / "net.detectron2.pth")


def test_torchvision_mistakes(tmp_path: Path, hub: Path) -> None:
    text = message(lambda: PathManager.get_local_path("torchvision://resnet81"))
    assert "resnet18, resnet34, resnet50, resnet101; did you mean resnet" in text
    assert "no such file" in message(lambda: PathManager.get_local_path(f"torchvision://{tmp_path}/none.pth"))
    other = save(tmp_path / "alexnet.pth", {"features.0.weight": torch.zeros(1)})
    assert "alexnet.pth: these keys do not belong to a ResNet: features.0" in message(
        lambda: PathManager.get_local_path(f"torchvision://{other}")
    )
    empty = save(tmp_path / "stem.pth", {"conv1.weight": torch.zeros(1)})
    assert "layer4.0.conv1.weight is missing" in message(lambda: PathManager.get_local_path(f"torchvision://{empty}"))


def test_registering_again_is_harmless() -> None:
    register_torchvision()
    register_torchvision()


# ---- strict loading


def equal(a: Dict[str, Tensor], b: Dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
def test_loads_detectron2_files(model: nn.Module, tmp_path: Path) -> None:
    state = model.state_dict()
    for content in ({"model": state, "iteration": 3}, state, {f"module.{k}": v for k, v in state.items()}):
        other = small_model()
        load_strict(other, save(tmp_path / "weights.pth", content))
        assert equal(other.state_dict(), state)


def test_loads_zoo_files(model: nn.Module, tmp_path: Path) -> None:
    content = {"model": {k: v.numpy() for k, v in model.state_dict().items()}, "__author__": "zoo"}
    path = tmp_path / "zoo.pkl"
    path.write_bytes(pickle.dumps(content))
    other = small_model()
    load_strict(other, str(path))
    assert equal(other.state_dict(), model.state_dict())


def test_loads_mmdet_files(tmp_path: Path) -> None:
    state = shrink()
    other = without_relu(small_model())
    load_strict(other, save(tmp_path / "mmdet.pth", {"state_dict": state, "meta": {"epoch": 12}}))
    assert equal(other.state_dict(), convert_mmdet(state))


def test_mmdet_anchor_grid_is_the_models(tmp_path: Path) -> None:
    cfg = config(classes=5, channels=8)
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[x, 1.3 * x, 1.6 * x, 1.8 * x] for x in (32, 64, 128, 256, 512)]
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[0.5, 2.0]]
    other, state = without_relu(build_model(cfg)), shrink(slots=8)
    load_strict(other, save(tmp_path / "mmdet.pth", state))
    assert equal(other.state_dict(), convert_mmdet(state, num_ratios=2, num_octaves=4))


def test_mmdet_file_in_a_model_with_another_p7_is_refused(tmp_path: Path) -> None:
    """The keys would fit, and every P7 would be another than the one it was trained with."""
    assert "no ReLU between P6 and P7" in message(
        lambda: load_strict(small_model(), save(tmp_path / "m.pth", shrink()))
    )


def test_model_without_anchors_reads_mmdet_as_3_by_3(tmp_path: Path) -> None:
    other = without_relu(small_model())
    del other.anchor_generator
    load_strict(other, save(tmp_path / "mmdet.pth", shrink()))


def test_harmless_extras_pass(model: nn.Module, tmp_path: Path) -> None:
    names = ["distill.pkd.adapter.weight", "pixel_mean", "pixel_std", "anchor_generator.cell_anchors.0"]
    names.append("backbone.bottom_up.stem.conv1.norm.num_batches_tracked")
    extras = {name: torch.zeros(3) for name in names}
    load_strict(model, save(tmp_path / "extras.pth", {"model": {**model.state_dict(), **extras}}))


def test_missing_counters_are_harmless(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    state = {k: v for k, v in net.state_dict().items() if "num_batches_tracked" not in k}
    load_strict(net, save(tmp_path / "no_counters.pth", state))


def test_empty_and_missing_paths(model: nn.Module, tmp_path: Path) -> None:
    assert "path of the weights is empty" in message(lambda: load_strict(model, ""))
    for path in (tmp_path / "none.pth", tmp_path):
        assert f"{path}: no such file" in message(lambda path=path: load_strict(model, str(path)))


def test_failed_fetch(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> str:
        raise URLError("no route")

    checkpointer = StrictCheckpointer(model)
    monkeypatch.setattr(checkpointer, "path_manager", type("Offline", (), {"get_local_path": staticmethod(refuse)}))
    assert "http://x/y.pth could not be downloaded" in message(lambda: checkpointer.load("http://x/y.pth"))


class Other:
    """Not weights."""


def test_other_objects_are_not_unpickled(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "object.pth"
    path.write_bytes(pickle.dumps(Other(), protocol=2))
    for file in (str(path), save(tmp_path / "zip.pth", {"model": model.state_dict(), "cfg": Other()})):
        assert f"{file} holds Python objects other than weights" in message(lambda file=file: load_strict(model, file))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([1, 2], "holds a list, not a state dict"),
        ({"model": 3}, "has no state dict under its key 'model'"),
        ({"epoch": 3}, "holds values that are not weights"),
        ({1: torch.zeros(1)}, "holds values that are not weights"),
        ({"model": {}}, "none of its 0 keys match"),
    ],
)
def test_files_without_weights(model: nn.Module, tmp_path: Path, content: Any, text: str) -> None:
    assert text in message(lambda: load_strict(model, save(tmp_path / "x.pth", content)))


def test_other_number_of_classes_names_both_shapes(model: nn.Module, tmp_path: Path) -> None:
    path = save(tmp_path / "seven.pth", {"model": small_model(classes=7).state_dict()})
    text = message(lambda: load_strict(model, path))
    assert f"{path} does not fit the model: 2 with a different shape" in text
    assert "head.cls_score.weight (63, 8, 3, 3) in the file, (45, 8, 3, 3) in the model" in text


def test_missing_keys_are_listed(model: nn.Module, tmp_path: Path) -> None:
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}
    text = message(lambda: load_strict(model, save(tmp_path / "x.pth", {"model": state})))
    assert "20 missing in the file (head.cls_subnet.0.weight, " in text
    assert "... (20 in all)" in text
    assert text.count("head.") == 5


def test_missing_statistics_are_not_filled_in(model: nn.Module, tmp_path: Path) -> None:
    """FrozenBatchNorm2d takes mean 0 and variance 1 for a file without statistics and tells nobody."""
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("res2.0.conv1.norm.running_var")}
    text = message(lambda: load_strict(model, save(tmp_path / "x.pth", {"model": state})))
    assert "1 missing in the file (backbone.bottom_up.res2.0.conv1.norm.running_var)" in text


def test_additional_tower_convs_are_refused(model: nn.Module, tmp_path: Path) -> None:
    extra = {f"head.cls_subnet.8.{leaf}": torch.zeros(8) for leaf in ("weight", "bias")}
    text = message(lambda: load_strict(model, save(tmp_path / "x.pth", {"model": {**model.state_dict(), **extra}})))
    assert "2 unknown to the model (head.cls_subnet.8.weight, head.cls_subnet.8.bias)" in text


@pytest.mark.parametrize("query", ["", "?matching_heuristics=True"])
def test_a_prefix_matches_nothing(model: nn.Module, tmp_path: Path, query: str) -> None:
    state = {f"student.{k}": v for k, v in model.state_dict().items()}
    path = save(tmp_path / "x.pth", {"model": state})
    text = message(lambda: load_strict(model, path + query))
    assert f"{path}: none of its {len(state)} keys match (first: student.backbone" in text
    assert "expected e.g. backbone." in text


def test_names_are_not_guessed(model: nn.Module, tmp_path: Path) -> None:
    """detectron2's heuristics would match these shortened names by their endings."""
    state = {k.replace("backbone.", "", 1): v for k, v in model.state_dict().items()}
    path = save(tmp_path / "x.pth", {"model": state})
    text = message(lambda: load_strict(model, f"{path}?matching_heuristics=True"))
    assert "116 unknown to the model (fpn_lateral3.weight, " in text


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises((AttributeError, pickle.PicklingError)):
        files.write(str(tmp_path / "x.pth"), {"model": lambda: None})
    assert not list(tmp_path.iterdir())


def test_a_checkpointer_can_load_again_after_an_error(model: nn.Module, tmp_path: Path) -> None:
    checkpointer = StrictCheckpointer(model)
    message(lambda: checkpointer.load(save(tmp_path / "x.pth", [1])))
    checkpointer.load(save(tmp_path / "x.pth", model.state_dict()))


def test_mmdet_mistakes_name_the_file(model: nn.Module, tmp_path: Path) -> None:
    path = save(tmp_path / "x.pth", {**shrink(), "roi_head.weight": torch.zeros(1)})
    assert message(lambda: load_strict(model, path)).startswith(f"{path}: ")


# ---- command line


def test_command_line_converts_mmdet(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    state = shrink()
    target = str(tmp_path / "out.pth")
    assert main([save(tmp_path / "in.pth", {"state_dict": state}), target]) == 0
    text = capsys.readouterr().out
    assert f"mmdetection RetinaNet: {len(convert_mmdet(state))} tensors mapped, 5 classes" in text
    assert "INPUT.FORMAT RGB" in text
    assert torch.load(target, weights_only=True)["__author__"] == "d2kd.checkpoint.convert"
    other = small_model()
    load_strict(other, target)
    assert equal(other.state_dict(), convert_mmdet(state))


def test_command_line_takes_the_anchor_grid(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = save(tmp_path / "in.pth", shrink(slots=8))
    assert main([source, str(tmp_path / "out.pth"), "--ratios", "2", "--octaves", "4"]) == 0
    assert "5 classes" in capsys.readouterr().out


def test_command_line_converts_torchvision(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = save(tmp_path / "in.pth", torchvision_resnet("resnet18").state_dict())
    assert main([source, str(tmp_path / "out.pth")]) == 0
    assert "torchvision ResNet: 100 tensors mapped" in capsys.readouterr().out


def test_command_line_does_not_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, target = save(tmp_path / "in.pth", shrink()), tmp_path / "out.pth"
    target.write_text("precious")
    assert main([source, str(target)]) == 2
    assert capsys.readouterr().err == f"error: {target} exists; choose another name or pass --force\n"
    assert target.read_text() == "precious"
    assert main([source, str(target), "--force"]) == 0
    assert sorted(os.listdir(tmp_path)) == ["in.pth", "out.pth"]


def test_command_line_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    good = save(tmp_path / "in.pth", shrink())
    detectron2_file = save(tmp_path / "d2.pth", {"model": convert_mmdet(shrink())})
    out = str(tmp_path / "out.pth")
    for args in (["none.pth", out], [detectron2_file, out], [good, str(tmp_path / "none" / "out.pth")]):
        assert main(args) == 2
        captured = capsys.readouterr().err
        assert captured.startswith("error: ")
        assert captured.count("\n") == 1
    assert main([good, out, "--ratios", "0"]) == 2
    assert not os.path.exists(out)


def test_command_line_help_has_an_example(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "example: python -m d2kd.checkpoint.convert" in capsys.readouterr().out
