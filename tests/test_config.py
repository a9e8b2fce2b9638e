"""Configs: every one merges, builds and reloads; every mistake gets its sentence."""

from inspect import isfunction
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.engine import DefaultPredictor
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.solver import build_lr_scheduler
from omegaconf import ListConfig
from small import CONFIGS, batch, save_teacher
from torch.overrides import TorchFunctionMode

from d2kd.config import add_distill_config, find_config, load_config
from d2kd.contract import num_classes
from d2kd.engine import Trainer
from d2kd.engine.recipe import flatten
from d2kd.errors import D2kdError
from d2kd.methods import method_defaults, method_names
from d2kd.overrides import check_override

YAMLS = sorted(CONFIGS.glob("*.yaml"))
LAZIES = sorted((CONFIGS / "lazy").glob("*.py"))
RECIPES = [path for path in YAMLS if not path.name.startswith(("Base-", "demo_", "quick_"))]


class _SkipInit(TorchFunctionMode):
    """Leaves new parameters as they lie in memory: drawing them takes most of the time of building a model."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


@pytest.fixture
def untrained(monkeypatch):
    """Builds models at full size, without weights of teachers and of timm, and without initialisation."""
    from d2kd import teacher
    from d2kd.modeling import timm_backbone

    monkeypatch.setattr(teacher, "load_strict", lambda *_: None)
    monkeypatch.setattr(timm_backbone, "download", lambda name, options: timm_backbone.create(name, **options))
    with _SkipInit():
        yield


def load_on_cpu(path):
    cfg = load_config(str(path))
    cfg.MODEL.DEVICE = "cpu"
    return cfg


@pytest.mark.parametrize(
    "path",
    [p if p.name.startswith("quick_") else pytest.param(p, marks=pytest.mark.slow) for p in YAMLS],
    ids=lambda p: p.name,
)
def test_yaml_merges_builds_and_reloads(path, untrained, tmp_path):
    cfg = load_on_cpu(path)
    again = get_cfg()
    add_distill_config(again)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again.merge_from_file(str(tmp_path / "config.yaml"))
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())
    if path.name.startswith("Base-"):
        return  # half a config
    assert f"output/{path.stem}" == cfg.OUTPUT_DIR
    model = build_model(cfg)
    if cfg.MODEL.DISTILL.METHODS:
        assert num_classes(model.teacher.detector) == model.num_classes
        assert Path(cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE).is_absolute()


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.name)
def test_yaml_is_short_and_loads_safely(path):
    text = path.read_text()
    yaml.safe_load(text)
    limit = 30 if path.name.startswith("Base-") else 12
    assert len([line for line in text.splitlines() if line.strip()]) <= limit


def test_every_recipe_has_a_lazy_twin():
    assert {path.stem for path in RECIPES} == {path.stem for path in LAZIES if not path.stem.startswith("quick_")}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_methods_page_names_every_recipe(path):
    assert f"`{path.stem}`" in (CONFIGS.parent / "docs" / "methods.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("path", LAZIES, ids=lambda p: p.name)
def test_lazy_reloads_and_makes_the_model_of_its_yaml(path, untrained, tmp_path):
    lazy = LazyConfig.load(str(path))
    assert {"model", "train", "dataloader", "optimizer", "lr_multiplier"} <= set(lazy)
    LazyConfig.save(lazy, str(tmp_path / "config.yaml"))
    lazy = LazyConfig.load(str(tmp_path / "config.yaml"))
    cfg = load_on_cpu(CONFIGS / f"{path.stem}.yaml")
    model, twin = instantiate(lazy.model), build_model(cfg)
    assert_same_detector(model, twin)
    if cfg.MODEL.DISTILL.METHODS:
        teacher = cfg.MODEL.DISTILL.TEACHER
        assert_same_detector(model.teacher.detector, twin.teacher.detector)
        assert model.teacher.input_format == twin.teacher.input_format
        assert (lazy.model.teacher.config_file, lazy.model.teacher.weights) == (teacher.CONFIG_FILE, teacher.WEIGHTS)
        assert list(model.distill) == list(twin.distill)
        assert [public(method) for method in model.methods] == [public(method) for method in twin.methods]
    if not path.stem.startswith("quick_"):
        assert_same_training(lazy, model, cfg, twin)


def assert_same_detector(model, twin):
    """Two detectors of the same class, with the same parameters, buffers and options."""
    assert type(model) is type(twin)
    shapes = [{key: value.shape for key, value in m.state_dict().items()} for m in (model, twin)]
    assert shapes[0] == shapes[1]
    assert torch.equal(model.pixel_mean, twin.pixel_mean)
    assert torch.equal(model.pixel_std, twin.pixel_std)
    heads = [getattr(detector, "head", detector) for detector in (model, twin)]  # R-CNNs have none of that name
    for parts in zip((model, heads[0], *model.backbone.modules()), (twin, heads[1], *twin.backbone.modules())):
        own, theirs = (public(part) for part in parts)
        assert own == theirs


def public(thing):
    """An object's public attributes that are options, lists and tuples alike."""
    found = {name: value for name, value in vars(thing).items() if name[0] != "_" and is_option(value)}
    return {name: list(v) if isinstance(v, (tuple, ListConfig)) else v for name, v in found.items()}


def is_option(value):
    if isinstance(value, (list, tuple, ListConfig)):
        return all(is_option(item) for item in value)
    return isinstance(value, (bool, int, float, str)) or isfunction(value)


def assert_same_training(lazy, model, cfg, twin):
    """The same data, optimizer and schedule."""
    train, test = lazy.dataloader.train, lazy.dataloader.test
    assert (train.dataset.names, test.dataset.names) == (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    assert train.total_batch_size == cfg.SOLVER.IMS_PER_BATCH
    assert {train.mapper.image_format, test.mapper.image_format} == {cfg.INPUT.FORMAT}
    assert list(train.mapper.augmentations[0].short_edge_length) == list(cfg.INPUT.MIN_SIZE_TRAIN)
    assert test.mapper.augmentations[0].short_edge_length == cfg.INPUT.MIN_SIZE_TEST
    assert (lazy.train.init_checkpoint, lazy.train.max_iter) == (cfg.MODEL.WEIGHTS, cfg.SOLVER.MAX_ITER)
    lazy.optimizer.params.model = model
    optimizer, expected = instantiate(lazy.optimizer), Trainer.build_optimizer(cfg, twin)
    assert settings(optimizer, model) == settings(expected, twin)
    multiplier, schedule = instantiate(lazy.lr_multiplier), build_lr_scheduler(cfg, expected)._multiplier
    steps = [step + i for step in (*cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS) for i in (-1, 0, 1)]
    for iteration in (0, 1, 100, *steps, cfg.SOLVER.MAX_ITER - 1):
        where = iteration / cfg.SOLVER.MAX_ITER
        assert multiplier(where) == pytest.approx(schedule(where), rel=1e-6), iteration


def settings(optimizer, model):
    """Type of an optimizer, and its options for each parameter but ``foreach``, which is about speed."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return type(optimizer).__name__, {
        names[parameter]: {key: value for key, value in group.items() if key not in ("params", "foreach")}
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


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


@pytest.mark.slow
def test_every_misspelt_key_of_ours_offers_the_right_one():
    config = str(CONFIGS / "crosskd_retinanet_R18.yaml")
    keys = flatten(load_config(config).MODEL.DISTILL, "MODEL.DISTILL")
    assert len(keys) > 50
    for key in keys:
        with pytest.raises(D2kdError) as error:
            load_config(config, [key[:-1], "1"])
        assert f"did you mean {key}?" in str(error.value)


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


def test_a_plain_detector_with_methods_is_refused():
    """It would ignore them. Evaluation, and the plain baseline of a distilling config, are fine."""
    config = str(CONFIGS / "crosskd_retinanet_R18.yaml")
    plain = ["MODEL.META_ARCHITECTURE", "RetinaNet"]
    with pytest.raises(D2kdError, match=r"RetinaNet is a plain detector .* set it to DistillRetinaNet, or set METHODS"):
        load_config(config, plain)
    nothing = ["MODEL.DISTILL.METHODS", "()"]
    with pytest.raises(D2kdError, match="plain detector"):
        load_config(config, [*plain, *nothing, "MODEL.DISTILL.INHERIT", "('neck',)"])
    with pytest.raises(D2kdError, match=r"ignores MODEL[.]DISTILL[.]FAST_LOSSES"):
        load_config(config, [*plain, *nothing, "MODEL.DISTILL.FAST_LOSSES", "True"])
    assert load_config(config, [*plain, *nothing]).MODEL.META_ARCHITECTURE == "RetinaNet"
    assert load_config(config, plain, with_teacher=False).MODEL.DISTILL.METHODS == ()


def stock_config(*opts):
    """What a script of detectron2 with add_distill_config makes of the quick config."""
    cfg = get_cfg()
    add_distill_config(cfg)
    cfg.merge_from_file(str(CONFIGS / "quick_crosskd_retinanet.yaml"))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *opts])
    return cfg


@pytest.mark.parametrize("name", ["GFL", "ATSS", "FCOS"])
def test_stock_code_cannot_build_a_plain_detector_of_ours_with_methods(name):
    with pytest.raises(D2kdError, match=f"set it to Distill{name}"):
        build_model(stock_config("MODEL.META_ARCHITECTURE", name))
    build_model(stock_config("MODEL.META_ARCHITECTURE", name, "MODEL.DISTILL.METHODS", ()))


def test_stock_code_names_a_misspelt_method():
    with pytest.raises(D2kdError, match=r"names 'CrosKD', .*did you mean CrossKD\?"):
        build_model(stock_config("MODEL.DISTILL.METHODS", ("CrosKD",)))


def test_stock_code_finds_the_teachers_config(tmp_path, monkeypatch):
    """merge_from_file does not say where the config was; ours are found, and others are asked for."""
    monkeypatch.chdir(tmp_path)
    weights = ["MODEL.DISTILL.TEACHER.WEIGHTS", str(save_teacher(tmp_path / "teacher.pth"))]
    assert build_model(stock_config(*weights)).teacher.loaded
    with pytest.raises(
        D2kdError, match=r"config own\.yaml is no file in .*give the whole path, or .*d2kd\.load_config"
    ):
        build_model(stock_config("MODEL.DISTILL.TEACHER.CONFIG_FILE", "own.yaml"))
    (tmp_path / "quick_retinanet.yaml").write_text("nonsense: 1")  # a file here comes first
    with pytest.raises(D2kdError, match="no config key nonsense"):
        build_model(stock_config(*weights))


def test_keys_are_added_once():
    cfg = stock_config("MODEL.GFL.NUM_CLASSES", 7, "SOLVER.EMA_DECAY", 0.5)
    before = cfg.dump()
    add_distill_config(cfg)
    assert cfg.dump() == before
    assert cfg.MODEL.DISTILL.METHODS == ("CrossKD",)
    cfg.MODEL.DISTILL.SCHEDULE.pop("PKD")  # as for a method that was registered since
    add_distill_config(cfg)
    assert cfg.dump() == before


def test_a_method_that_was_registered_too_late():
    cfg = stock_config()
    cfg.MODEL.DISTILL.pop("CROSSKD")
    with pytest.raises(D2kdError, match=r"no MODEL\.DISTILL\.CROSSKD: import CrossKD before add_distill_config"):
        build_model(cfg)


@pytest.mark.parametrize("weights", ["", "gone.pth"])
def test_stock_code_evaluates_without_the_teachers_file(weights, tmp_path):
    student = build_model(stock_config("MODEL.DISTILL.METHODS", ()))
    torch.save({"model": student.state_dict()}, tmp_path / "student.pth")
    opts = ["MODEL.WEIGHTS", str(tmp_path / "student.pth"), "MODEL.DISTILL.TEACHER.WEIGHTS", weights]
    image = batch()[0]["image"].permute(1, 2, 0).numpy()
    found = DefaultPredictor(stock_config(*opts))(image)["instances"]
    lazy = LazyConfig.load(str(CONFIGS / "lazy" / "quick_crosskd_retinanet.py"))
    lazy.model.teacher.weights = weights
    model = instantiate(lazy.model).eval()
    model.load_state_dict(student.state_dict())
    model(batch())
    assert found.image_size == image.shape[:2]


@pytest.mark.slow
def test_zoo_teacher_config_builds_and_loads(tmp_path):
    """A teacher by its model-zoo name, whose file has the zoo's keys."""
    from d2kd.teacher import load_teacher

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
    from d2kd.teacher import load_teacher

    file = save_teacher(tmp_path / "teacher.pth")
    overrides = [f"model.teacher.weights={file}", "model.methods=[]"]
    teacher = load_teacher(str(CONFIGS / "lazy" / "quick_crosskd_retinanet.py"), str(file), overrides)
    assert teacher.input_format == "BGR"
