"""Random edits of valid configs and annotation files: each runs, or ends with one sentence."""

import contextlib
import copy
import json

import hypothesis
import pytest
import yaml
from fuzzing import EXAMPLES, SEED, cheap_runs, fresh, fuzz
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from small import CONFIGS, save_teacher

from d2kd.config import load_config

PLAIN = str(CONFIGS / "quick_retinanet.yaml")
CONFIG = yaml.safe_load(load_config(str(CONFIGS / "quick_crosskd_retinanet.yaml")).dump())
OF_OTHER_DETECTORS = ("PANOPTIC_FPN", "PROPOSAL_GENERATOR", "RPN", "ROI_", "SEM_SEG")
# A cheap run of a few images, whatever is edited.
FIXED = [
    "SOLVER.MAX_ITER",
    "2",
    "SOLVER.IMS_PER_BATCH",
    "2",
    "INPUT.MIN_SIZE_TRAIN",
    "(64,)",
    "INPUT.MIN_SIZE_TEST",
    "64",
]
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory, blood_cells):
    return save_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pth")


@pytest.fixture(autouse=True)
def _cheap():
    with cheap_runs():
        yield


def leaves(node, path=()):
    """Paths of all values in nested dicts and lists, the containers too."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from leaves(child, (*path, key))


def config_leaves():
    """Those of the config that concern a dense detector."""
    return [p for p in leaves(CONFIG) if not any(str(key).startswith(OF_OTHER_DETECTORS) for key in p)]


def parent(root, path):
    for key in path[:-1]:
        root = root[key]
    return root


# No big numbers: as sizes they would only test this machine's memory.
numbers = st.one_of(st.integers(-2, 9), st.sampled_from([-1.5, 0.0, 0.3, 1e-30, 1e30, float("nan"), float("inf")]))
words = st.sampled_from(["", "x", "res9", "GN", "RGB", "cuda", "None", "1", "(1, 2)", "[", "../", "\u00e9"])
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, words), lambda inner: st.lists(inner, max_size=3), max_leaves=4
)


@st.composite
def edited(draw, root, paths):
    """Nested dicts and lists with one to three edits, a value replaced, removed, doubled or renamed, and which."""
    root = copy.deepcopy(root)
    edits = []
    for path in draw(st.lists(st.sampled_from(paths), min_size=1, max_size=3, unique=True)):
        with contextlib.suppress(KeyError, IndexError, TypeError):  # an edit before this one has removed it
            node = parent(root, path)
            how = edit(draw, node, path[-1])
            now = node[path[-1]] if how in ("like", "replace") else ""
            edits.append(f"{'.'.join(map(str, path))}: {how} {now!r}")
    return root, edits


def like(value):
    """Other values of the same type."""
    if isinstance(value, bool):
        return st.just(not value)
    if isinstance(value, (int, float)):
        return numbers.filter(lambda x: isinstance(x, type(value)))
    return words if isinstance(value, str) else values


def edit(draw, node, key):
    how = draw(st.sampled_from(["like", "like", "like", "replace", "remove", "repeat", "rename"]))
    old = node[key]
    if how == "like":
        node[key] = draw(like(old))
    elif how == "replace":
        node[key] = draw(values)
    elif how == "remove":
        del node[key]
    elif isinstance(node, list):
        node.append(copy.deepcopy(old))
    elif how == "rename":
        node[f"{key}S"] = node.pop(key)
    return how


@pytest.mark.slow
def test_configs(teacher_file, tmp_path, record_property, request):
    teacher = ["MODEL.DISTILL.TEACHER.CONFIG_FILE", PLAIN, "MODEL.DISTILL.TEACHER.WEIGHTS", teacher_file]

    def examples(ends):
        @hypothesis.seed(SEED)
        @FUZZ
        @given(edited(CONFIG, config_leaves()))
        def run(example):
            content, edits = example
            folder, config = fresh(tmp_path / "run"), tmp_path / "edited.yaml"
            config.write_text(yaml.safe_dump(content))
            ends.add(edits, ["--config-file", config, *FIXED, *teacher, "OUTPUT_DIR", folder, "DATASETS.TEST", "()"])

        run()

    fuzz(examples, record_property, request)


@pytest.mark.slow
def test_annotations(blood_cells, tmp_path, record_property, request):
    content = json.loads((blood_cells / "instances_train.json").read_text())
    ids = {image["id"] for image in content["images"][:4]}
    content["images"] = content["images"][:4]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]

    def examples(ends):
        @hypothesis.seed(SEED)
        @FUZZ
        @given(edited(content, list(leaves(content))))
        def run(example):
            content, edits = example
            for split in ("train", "val"):
                (blood_cells / f"instances_{split}.json").write_text(json.dumps(content))
            ends.add(edits, ["--config-file", PLAIN, *FIXED, "OUTPUT_DIR", fresh(tmp_path / "run")])

        run()

    saved = {path: path.read_bytes() for path in blood_cells.glob("*.json")}
    try:
        fuzz(examples, record_property, request)
    finally:
        for path, data in saved.items():
            path.write_bytes(data)
