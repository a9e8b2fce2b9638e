"""Configs: every one merges, builds and reloads; every mistake gets its sentence."""

from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.modeling import META_ARCH_REGISTRY
from small import CONFIGS, save_teacher

from d2kd import add_distill_config
from d2kd.config import find_config, load_config
from d2kd.engine.lazy_run import check_override
from d2kd.errors import D2kdError
from d2kd.methods import method_defaults, method_names

YAMLS = sorted(CONFIGS.glob("*.yaml"))
LAZIES = sorted((CONFIGS / "lazy").glob("*.py"))


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.name)
def test_yaml_merges_builds_and_reloads(path, monkeypatch, tmp_path):
    """Full size, with random weights instead of a teacher's."""
    from d2kd import distill

    monkeypatch.setattr(distill, "load_strict", lambda *_: None)
    cfg = load_config(str(path))
    cfg.MODEL.DEVICE = "cpu"
    again = get_cfg()
    add_distill_config(again)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again.merge_from_file(str(tmp_path / "config.yaml"))
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())
    if path.name.startswith("Base-Retina"):
        return  # half a config
    model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
    if cfg.MODEL.DISTILL.METHODS:
        assert model.teacher.detector.num_classes == model.num_classes
        assert Path(cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE).is_absolute()


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.name)
def test_yaml_is_short_and_loads_safely(path):
    text = path.read_text()
    yaml.safe_load(text)
    assert len([line for line in text.splitlines() if line.strip()]) <= 30


@pytest.mark.parametrize("path", LAZIES, ids=lambda p: p.name)
def test_lazy_builds_and_reloads(path, monkeypatch, tmp_path):
    from d2kd import distill

    monkeypatch.setattr(distill, "load_strict", lambda *_: None)
    cfg = LazyConfig.load(str(path))
    assert {"model", "train", "dataloader", "optimizer", "lr_multiplier"} <= set(cfg)
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    cfg = LazyConfig.load(str(tmp_path / "config.yaml"))
    model = instantiate(cfg.model)
    if "methods" in cfg.model:
        assert model.teacher.detector.num_classes == model.num_classes
        assert len(model.methods) == len(cfg.model.methods)


def test_yaml_and_lazy_twins_make_the_same_model(monkeypatch):
    from d2kd import distill

    monkeypatch.setattr(distill, "load_strict", lambda *_: None)
    for path in LAZIES:
        cfg = load_config(str(CONFIGS / f"{path.stem}.yaml"))
        cfg.MODEL.DEVICE = "cpu"
        lazy = instantiate(LazyConfig.load(str(path)).model)
        twin = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
        shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (lazy, twin)]
        assert shapes[0] == shapes[1], path.name
        assert torch.equal(lazy.pixel_mean, twin.pixel_mean)
        assert lazy.input_format == twin.input_format


def test_anchors_are_detectron2s_own():
    """The sizes written out in Base-RetinaNet.yaml are those that detectron2's config evaluates as Python."""
    cfg = load_config(str(CONFIGS / "Base-RetinaNet.yaml"))
    expected = [[x, x * 2 ** (1.0 / 3), x * 2 ** (2.0 / 3)] for x in [32, 64, 128, 256, 512]]
    assert expected == cfg.MODEL.ANCHOR_GENERATOR.SIZES


def test_options_of_methods_are_config_keys():
    cfg = get_cfg()
    add_distill_config(cfg)
    for name in method_names():
        node = cfg.MODEL.DISTILL[name.upper()]
        assert {key.lower(): value for key, value in node.items()} == method_defaults(name)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (
            ["MODEL.DISTILL.CROSSKD.CUTT", "2"],
            r"MODEL\.DISTILL\.CROSSKD\.CUTT; did you mean MODEL\.DISTILL\.CROSSKD\.CUT\?",
        ),
        (["SOLVER.MAX_ITERS", "2"], r"did you mean SOLVER\.MAX_ITER\?"),
        (["MODEL.DISTILL.METHODS", "('CrosKD',)"], "did you mean CrossKD"),
        (["MODEL.DISTILL.CROSSKD.CUT", "two"], r"MODEL\.DISTILL\.CROSSKD\.CUT"),
        (["SOLVER.MAX_ITER"], "come in pairs"),
        (["MODEL.DISTILL.TEACHER.CONFIG_FILE", "retinanet_R5O.yaml"], r"did you mean retinanet_R50\.yaml"),
    ],
)
def test_mistakes_in_overrides(opts, message):
    with pytest.raises(D2kdError, match=message):
        load_config(str(CONFIGS / "crosskd_retinanet_R18.yaml"), opts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MODEL: {DISTILL: {METHOD: [1]}}", r"MODEL\.DISTILL\.METHOD; did you mean MODEL\.DISTILL\.METHODS"),
        ("MODEL: [", "own.yaml"),
        ("_BASE_: gone.yaml", r"gone\.yaml"),
        ("SOLVER: {MAX_ITER: many}", r"SOLVER\.MAX_ITER"),
        ("just words", "own.yaml"),
    ],
)
def test_mistakes_in_files(tmp_path, text, message):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(D2kdError, match=message):
        load_config(str(tmp_path / "own.yaml"))


def test_configs_are_found_beside_the_config_and_in_the_zoo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("retinanet_R50.yaml", str(CONFIGS / "any.yaml")) == str(CONFIGS / "retinanet_R50.yaml")
    assert Path(find_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml")).is_file()
    with pytest.raises(D2kdError, match="no model of detectron2's zoo"):
        find_config("nothing.yaml")


def test_zoo_teacher_config_builds_and_loads(tmp_path):
    """A teacher by its model-zoo name, whose file has the zoo's keys."""
    from d2kd.distill import load_teacher

    name = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
    cfg = load_config(name, ["MODEL.DEVICE", "cpu"])
    torch.save({"model": META_ARCH_REGISTRY.get("RetinaNet")(cfg).state_dict()}, tmp_path / "zoo.pth")
    teacher = load_teacher(name, str(tmp_path / "zoo.pth"))
    assert teacher.input_format == "BGR"
    assert teacher.detector.num_classes == 80


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_iters=3", "did you mean max_iter"),
        ("model.methods.0.cutt=3", "did you mean cut"),
        ("model.methods.0.cut", "path.key=value"),
        ("nothing=3", "the config has no 'nothing'"),
    ],
)
def test_mistakes_in_lazy_overrides(override, message):
    cfg = LazyConfig.load(str(CONFIGS / "lazy" / "quick_crosskd_retinanet.py"))
    with pytest.raises(D2kdError, match=message):
        check_override(cfg, override)
    for good in ("train.max_iter=3", "model.methods.0.cut=2", "model.methods.0.beta=2.0", "model.sync_normalizer=True"):
        check_override(cfg, good)


def test_teacher_from_a_lazy_config(tmp_path):
    from d2kd.distill import load_teacher

    file = save_teacher(tmp_path / "teacher.pth")
    overrides = [f"model.teacher.weights={file}", "model.methods=[]"]
    teacher = load_teacher(str(CONFIGS / "lazy" / "quick_crosskd_retinanet.py"), str(file), overrides)
    assert teacher.input_format == "BGR"
