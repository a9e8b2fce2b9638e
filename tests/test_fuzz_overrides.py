"""A second fuzzer, independent of test_fuzz.py: overrides on the command line, and edits of annotations as text."""

import random
import re

import pytest
import torch
import yaml
from detectron2.config import LazyConfig
from detectron2.modeling import build_model
from fuzzing import EXAMPLES, SEED, cheap_runs, fresh, fuzz
from omegaconf import DictConfig, ListConfig
from small import CONFIGS, small_config
from test_fuzz import FIXED, OF_OTHER_DETECTORS, PLAIN

from d2kd.config import load_config
from d2kd.methods import method_names

DISTILL = str(CONFIGS / "quick_crosskd_retinanet.yaml")
DETECTORS = ("RetinaNet", "GFL", "ATSS", "FCOS")
PAIRS = [(d, m) for d in DETECTORS for m in method_names() if m != "LD" or d == "GFL"]
STRANGE = ["None", "-1", "0", "-0.5", "3", "1e30", "nan", "inf", "True", "''", "x", "()", "[]", "[[]]", "[[1,2],[3]]"]
STRANGE += ["['x','y']", "{}", "{'a': 1}", "'1'", "[0]", "[None]", "(1, 'x', 2.5)", "1e-30", "-inf", "res3", "p3", "BN"]
# Of these, a huge value costs neither memory nor time.
CHEAP = re.compile("(?i)period|iters|topk|thresh|weight|factor|seed|decay|alpha|gamma|beta|temperature|_lr|schedule")
LAZY_FIXED = ["train.max_iter=2", "dataloader.train.total_batch_size=2", "train.eval_period=0"]
LAZY_FIXED += ["dataloader.train.mapper.augmentations.0.short_edge_length=[64]"]
LAZY_STUDENT = """
from detectron2.config import LazyCall as L, LazyConfig
from detectron2.layers import ShapeSpec
from d2kd import meta_arch, methods

_quick = LazyConfig.load({quick!r})
dataloader, lr_multiplier, optimizer, train = _quick.dataloader, _quick.lr_multiplier, _quick.optimizer, _quick.train
model = _quick.model
if {detector!r} != "RetinaNet":
    model = LazyConfig.load({own!r}).model
    model.backbone, model.num_classes, model.head_in_features = _quick.model.backbone, 3, _quick.model.head_in_features
    model.head.conv_dims, model.head.input_shape = [32, 32], [ShapeSpec(channels=32)] * 4
    model._target_, model.teacher = meta_arch.Distill{detector}, _quick.model.teacher
model.teacher.opts = ["MODEL.META_ARCHITECTURE", {detector!r}, *{teacher_opts!r}]
model.teacher.weights = {weights!r}
model.methods = [L(methods.{method})({options})]
dataloader.test = dataloader.evaluator = None
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory, blood_cells):
    """Files of random weights of a teacher of each detector."""
    folder = tmp_path_factory.mktemp("teachers")
    for detector in DETECTORS:
        model = build_model(small_config("MODEL.META_ARCHITECTURE", detector, *teacher_opts(detector)))
        torch.save({"model": model.state_dict()}, folder / f"{detector}.pth")
    return {detector: str(folder / f"{detector}.pth") for detector in DETECTORS}


@pytest.fixture(autouse=True)
def _cheap():
    with cheap_runs():
        yield


def teacher_opts(detector):
    return ["MODEL.FCOS.BOX_EXP", "True"] if detector == "FCOS" else []


def leaves(node, path=()):
    """Paths and values of a config's leaves, and of lists with their elements."""
    children = node.items() if isinstance(node, (dict, DictConfig)) else enumerate(node)
    for key, child in children:
        if isinstance(child, (dict, DictConfig)) and child:
            yield from leaves(child, (*path, str(key)))
            continue
        yield (*path, str(key)), child
        if isinstance(child, (list, ListConfig)) and any(isinstance(x, DictConfig) for x in child):
            yield from leaves(child, (*path, str(key)))


def chosen(rng, found):
    """One to three leaves, from nodes of equal probability."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        nodes = sorted({path[:-1] for path, _ in found})
        node = rng.choice(nodes)
        yield rng.choice([(path, value) for path, value in found if path[:-1] == node])


def changed(rng, name, value, strings):
    """Another value, as text: one near to the present, or a strange one."""
    if rng.random() < 0.4:
        return rng.choice(STRANGE)
    if isinstance(value, bool):
        return str(not value)
    if isinstance(value, (int, float)):
        huge = [10**9, 1e9] if CHEAP.search(name) else []
        return str(rng.choice([-value, 0, value + 1, value - 1, value / 2, value * 2, value + 0.5, str(value), *huge]))
    if isinstance(value, str):
        return rng.choice([value.upper(), value[1:], value + "x", rng.choice(strings), f"['{value}']"]) or "''"
    if isinstance(value, (list, ListConfig, tuple)):
        items = [x for x in value if isinstance(x, (str, int, float, list, ListConfig))]
        items = [list(x) if isinstance(x, ListConfig) else x for x in items]
        other = rng.sample([-1, 0, "x", None, 2.5, [], [1]], 1)
        tail = items[1:] + other
        return str(rng.choice([items[1:], items[:-1], items[::-1], items * 2, items[:1], other, tail, [items], []]))
    return rng.choice(STRANGE)


@pytest.mark.slow
def test_yaml_overrides(weights, tmp_path, record_property, request):
    content = yaml.safe_load(load_config(DISTILL).dump())
    found = [x for x in leaves(content) if not any(part.startswith(OF_OTHER_DETECTORS) for part in x[0])]
    strings = [value for _, value in found if isinstance(value, str)]

    def examples(ends):
        for i in range(EXAMPLES):
            rng = random.Random(f"{SEED}/{i}")
            detector, method = rng.choice(PAIRS)
            used = [x for x in found if not unused(x[0], detector, method)]
            edits = [(".".join(path), changed(rng, path[-1], value, strings)) for path, value in chosen(rng, used)]
            student = ["MODEL.META_ARCHITECTURE", f"Distill{detector}", "MODEL.DISTILL.METHODS", f"('{method}',)"]
            student += ["MODEL.DISTILL.TEACHER.WEIGHTS", weights[detector], "MODEL.DISTILL.TEACHER.CONFIG_FILE", PLAIN]
            opts = ["MODEL.META_ARCHITECTURE", detector, *teacher_opts(detector)]
            student += ["MODEL.DISTILL.TEACHER.OPTS", str(opts), *yaml_options(detector)]
            fixed = [*FIXED, "OUTPUT_DIR", fresh(tmp_path / "run"), "DATASETS.TEST", "()"]
            last = fixed if rng.random() < 0.95 else fixed[:-2]
            overrides = [x for edit in edits for x in edit]
            ends.add((i, detector, method, edits), ["--config-file", DISTILL, *student, *overrides, *last])

    fuzz(examples, record_property, request)


def yaml_options(detector):
    return ["MODEL.FCOS.BOX_EXP", "True"] if detector == "FCOS" else []


def unused(path, detector, method):
    """Whether a key is one of another detector or method."""
    others = {*(d.upper() for d in DETECTORS), *(m.upper() for m in method_names())} - {detector.upper()}
    return bool((others - {method.upper()}) & set(path))


@pytest.mark.slow
def test_lazy_overrides(weights, tmp_path, record_property, request):
    def examples(ends):
        for i in range(EXAMPLES):
            rng = random.Random(f"{SEED}/lazy/{i}")
            detector, method = rng.choice(PAIRS)
            config = tmp_path / f"{detector}_{method}.py"
            config.write_text(
                LAZY_STUDENT.format(
                    quick=str(CONFIGS / "lazy" / "quick_crosskd_retinanet.py"),
                    own=str(CONFIGS / "lazy" / f"{detector.lower()}_R50.py"),
                    detector=detector,
                    method=method,
                    options="cut=1" if method == "CrossKD" else "",
                    teacher_opts=teacher_opts(detector),
                    weights=weights[detector],
                )
            )
            found = [x for x in leaves(LazyConfig.load(str(config))) if "_target_" not in x[0]]
            strings = [value for _, value in found if isinstance(value, str)]
            edits = [
                f"{'.'.join(path)}={lazily(changed(rng, path[-1], value, strings))}"
                for path, value in chosen(rng, found)
            ]
            args = ["--config-file", config, *edits, *LAZY_FIXED, f"train.output_dir={fresh(tmp_path / 'run')}"]
            ends.add((i, detector, method, edits), args)

    fuzz(examples, record_property, request)


def lazily(value):
    """A value in Hydra's syntax of overrides."""
    return value.replace("(", "[").replace(")", "]").replace("None", "null")


TOKEN = re.compile(r'"[^"]*"|-?\d+(?:\.\d+)?')
TOKENS = ["-1", "0", "1e30", "NaN", "-Infinity", "null", "[]", "{}", "true", "1.5", "[1, 2]", "1", "999999"]
TOKENS += ['"x"', '""']


def damaged(rng, text):
    """A JSON text with a few tokens replaced by others, pieces cut out, or bytes changed."""
    for _ in range(rng.choice([1, 1, 2, 4])):
        found = list(TOKEN.finditer(text))
        if rng.random() < 0.8 and found:
            start, end = rng.choice(found).span()
            other = rng.choice([*TOKENS, rng.choice(found).group()])
        else:
            start = rng.randrange(len(text))
            end = rng.choice([start, start + 1, start + rng.randrange(300), len(text)])
            other = rng.choice(["", "", ",", "}", "\u00e9", "\0", '"'])
        text = text[:start] + other + text[end:]
    return text


@pytest.mark.slow
def test_annotation_texts(blood_cells, tmp_path, record_property, request):
    saved = {path: path.read_text() for path in blood_cells.glob("*.json")}

    def examples(ends):
        for i in range(EXAMPLES):
            rng = random.Random(f"{SEED}/annotations/{i}")
            for path, text in saved.items():
                path.write_text(damaged(rng, text) if "train" in path.name or rng.random() < 0.3 else text)
            folder = fresh(tmp_path / "run")
            ends.add(i, ["--config-file", PLAIN, *FIXED, "OUTPUT_DIR", folder])

    try:
        fuzz(examples, record_property, request)
    finally:
        for path, text in saved.items():
            path.write_text(text)
