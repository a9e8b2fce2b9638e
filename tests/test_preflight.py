"""The teacher is checked before the first iteration: each way to get it wrong is named, and sound ones pass."""

import copy
import logging
import os
import re

import pytest
import torch
from detectron2.data import DatasetMapper, get_detection_dataset_dicts
from detectron2.modeling import build_model
from detectron2.utils import comm
from messages import rows_of
from runs import made_once
from small import CONFIGS, build, distill_config, small_config
from teachers import train_by_heart

from d2kd.checkpoint import files
from d2kd.data import register_builtin
from d2kd.data.loader import build_train_loader
from d2kd.diagnose import preflight
from d2kd.diagnose.preflight import check_teacher
from d2kd.engine import main
from d2kd.errors import D2kdError

QUICK = str(CONFIGS / "quick_crosskd_retinanet.yaml")
LAZY = str(CONFIGS / "lazy" / "quick_crosskd_retinanet.py")
BN = ["MODEL.RESNETS.NORM", "BN"]  # with frozen norms and GN, the scale of the pixels would not matter
pytestmark = pytest.mark.slow
IMAGES = 6
ITERATIONS, WEAK = 80, 10


@pytest.fixture(scope="module")
def loader(blood_cells):
    register_builtin(os.environ["DETECTRON2_DATASETS"])
    mapper = DatasetMapper(is_train=True, augmentations=[], image_format="BGR")
    dataset = get_detection_dataset_dicts(["blood_cells_train"])
    return build_train_loader(dataset, mapper=mapper, total_batch_size=IMAGES, seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, loader):
    """Teachers of two kinds that know the first few images by heart, and what the first one was on its way."""

    def train(folder):
        batch = [loader.dataset[index, index] for index in range(IMAGES)]
        for kind in ("RetinaNet", "GFL"):
            cfg = small_config(*BN, "MODEL.META_ARCHITECTURE", kind)
            train_by_heart(cfg, batch, folder / f"{kind}.pth", ITERATIONS, weak=WEAK)

    return made_once(tmp_path_factory, "teachers_of_preflight", train)


@pytest.fixture
def log(caplog):
    """What d2kd logs; runs of other tests stop it from reaching pytest."""
    logger = logging.getLogger("d2kd")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, "d2kd")
    yield caplog
    logger.removeHandler(caplog.handler)


def student(weights, *opts, teacher_opts=(), methods=("CrossKD",), kind="RetinaNet"):
    opts = ["MODEL.META_ARCHITECTURE", f"Distill{kind}", *opts]
    teacher_opts = [*BN, "MODEL.META_ARCHITECTURE", kind, *teacher_opts]
    return build(distill_config(weights, *opts, methods=methods, teacher_opts=teacher_opts))


def altered(folder, tmp_path, change):
    """The trained teacher's file, its weights changed."""
    state = torch.load(folder / "RetinaNet.pth")["model"]
    state = change(state) or state
    torch.save({"model": state}, tmp_path / "altered.pth")
    return tmp_path / "altered.pth"


def random_part(prefix, seed=3):
    def change(state):
        torch.manual_seed(seed)
        fresh = build_model(small_config(*BN)).state_dict()
        state.update({name: fresh[name] for name in state if name.startswith(prefix)})

    return change


def each_slot(reorder):
    """Gives the class outputs of each of the 3 anchors of a place another order."""

    def change(state):
        for name in ("head.cls_score.weight", "head.cls_score.bias"):
            slots = state[name].unflatten(0, (-1, 3))
            state[name] = torch.stack([classes[reorder(slot)] for slot, classes in enumerate(slots)]).flatten(0, 1)

    return change


def not_finite(state):
    state["backbone.fpn_output3.weight"][0, 0, 0, 0] = float("nan")


def prefixed(state):
    return {f"detector.{name}": value for name, value in state.items()}


PERMUTED = each_slot(lambda _: [1, 2, 0])
OTHER_CLASSES = each_slot(lambda slot: [(k + slot) % 3 for k in range(3)])


@pytest.mark.parametrize("kind", ["RetinaNet", "GFL"])
def test_a_sound_teacher_passes_and_is_described(kind, folder, loader, log):
    model = student(folder / f"{kind}.pth", kind=kind)
    before = copy.deepcopy(model.teacher.detector.state_dict())
    check_teacher(model, loader, IMAGES)
    (report,) = {record.getMessage() for record in log.records if "pre-flight" in record.getMessage()}
    rows = {cells[0]: cells[1] for cells in (re.split("  +", line.strip()) for line in report.splitlines()[1:])}
    ap, ap50, loss = (float(x) for x in rows["as configured"].split(", "))
    assert 20 < ap < ap50 <= 100
    assert f"{kind}, 3 classes" in rows["detector"]
    assert "tensors matched, none missing" in rows["weights"]
    assert "evaluation" in rows["mode"]
    assert "no tensors trainable" in rows["parameters"]
    assert "BGR, pixel mean [103.53, 116.28, 123.675]" in rows["input"]
    shuffled_ap, _, shuffled_loss = (float(x) for x in rows["all weights shuffled"].split(", "))
    assert shuffled_ap < 5
    assert loss < 0.5 * shuffled_loss
    assert not [label for label in rows if "images x" in label]  # looked for only if it detects badly
    assert not [record for record in log.records if record.levelno >= logging.WARNING]
    after = model.teacher.detector.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


MISTAKES = {
    "weights not loaded": (random_part(""), [], "with all weights shuffled .*TEACHER.WEIGHTS to the file of a trained"),
    "head not loaded": (random_part("head."), [], "with all weights shuffled"),
    "RGB for BGR": (
        None,
        ["INPUT.FORMAT", "RGB"],
        "expect BGR and gets RGB: set INPUT.FORMAT BGR in the teacher's own",
    ),
    "pixel std": (None, ["MODEL.PIXEL_STD", "[1.0,1.0,1.0]"], r"MODEL.PIXEL_STD \[57.375, 57.12, 58.395\]"),
    "classes permuted": (PERMUTED, [], r"CLASS_MAP, pairs .*, to \(\(0, 2\), \(1, 0\), \(2, 1\)\)"),
    "other classes": (OTHER_CLASSES, [], "seems to know other classes"),
    "NaN": (not_finite, [], "not finite"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_broken_teacher_is_refused_with_the_cause(mistake, folder, loader, tmp_path):
    change, teacher_opts, message = MISTAKES[mistake]
    weights = altered(folder, tmp_path, change) if change else folder / "RetinaNet.pth"
    with pytest.raises(D2kdError, match=message) as error:
        check_teacher(student(weights, teacher_opts=teacher_opts), loader, IMAGES)
    assert "MODEL.DISTILL.PREFLIGHT 0" in str(error.value)
    assert rows_of(str(error.value))


@pytest.mark.parametrize("seed", [1, 2])
def test_a_random_backbone_is_not_silent(seed, folder, loader, tmp_path, log):
    """A trained head makes something of random features, so this is no clear case for every network."""
    model = student(altered(folder, tmp_path, random_part("backbone.", seed)))
    said = ""
    try:
        check_teacher(model, loader, IMAGES)
    except D2kdError as error:
        said = str(error)
    assert "the backbone's weights shuffled" in said or "The teacher is weak: AP50" in log.text


def test_a_key_prefix_that_matches_nothing(folder, tmp_path):
    with pytest.raises(D2kdError, match=r"none of its .* keys match .first: detector.backbone.*expected e.g. backbone"):
        student(altered(folder, tmp_path, prefixed))


def test_another_number_of_classes(folder):
    with pytest.raises(D2kdError, match=r"the student has 4 classes and the teacher 3.*MODEL.DISTILL.CLASS_MAP"):
        student(folder / "RetinaNet.pth", "MODEL.RETINANET.NUM_CLASSES", 4)


def test_train_mode(folder, loader):
    model = student(folder / "RetinaNet.pth")
    model.teacher.detector.backbone.train()
    with pytest.raises(D2kdError, match="training mode"):
        check_teacher(model, loader, IMAGES)


def test_the_class_map_that_it_names_mends_the_order(folder, loader, tmp_path):
    weights = altered(folder, tmp_path, PERMUTED)
    check_teacher(student(weights, "MODEL.DISTILL.CLASS_MAP", "((0,2),(1,0),(2,1))"), loader, IMAGES)
    check_teacher(student(weights, "MODEL.DISTILL.CLASS_MAP", "((2,1),)"), loader, IMAGES)
    with pytest.raises(D2kdError, match=r"to \(\(1, 0\), \(2, 1\)\)"):
        check_teacher(student(weights, "MODEL.DISTILL.CLASS_MAP", "((1,1),(2,0))"), loader, IMAGES)


def test_classes_do_not_matter_to_feature_methods(folder, loader, tmp_path, log):
    check_teacher(student(altered(folder, tmp_path, PERMUTED), methods=("PKD",)), loader, IMAGES)
    assert "No method reads classes, but the teacher counts its classes in another order" in log.text
    more = ["MODEL.RETINANET.NUM_CLASSES", 4]
    check_teacher(student(folder / "RetinaNet.pth", *more, methods=("PKD",)), loader, IMAGES)
    assert "not checked: it has other classes" in log.text


def test_a_weak_teacher_is_a_warning(folder, loader, log):
    check_teacher(student(folder / "weak_RetinaNet.pth"), loader, IMAGES)
    assert "The teacher is weak: AP50" in log.text


def test_other_ranks_learn_the_verdict(folder, loader, monkeypatch):
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    monkeypatch.setattr(preflight, "examine", None)
    monkeypatch.setattr(comm, "all_gather", lambda own: ["what rank 0 said", own])
    with pytest.raises(D2kdError, match="what rank 0 said"):
        check_teacher(student(folder / "RetinaNet.pth"), loader, IMAGES)


def yaml_command(weights, output, images):
    opts = [*BN, "MODEL.DISTILL.TEACHER.OPTS", str(BN), "MODEL.DISTILL.TEACHER.WEIGHTS", str(weights)]
    opts += ["MODEL.DISTILL.PREFLIGHT", str(images), "OUTPUT_DIR", str(output), "DATASETS.TEST", "()", "SEED", "5"]
    return ["--config-file", QUICK, *opts]


def lazy_command(weights, output, images):
    opts = [f"model.teacher.weights={weights}", f"model.teacher.opts={BN}".replace("'", "")]
    return ["--config-file", LAZY, *opts, f"train.preflight={images}", f"train.output_dir={output}", "train.max_iter=2"]


@pytest.mark.parametrize("command", [yaml_command, lazy_command])
def test_a_run_is_stopped_before_its_first_iteration(command, folder, tmp_path, capfd):
    weights = altered(folder, tmp_path, random_part(""))
    assert main(command(weights, tmp_path / "run", IMAGES)) == 2
    captured = capfd.readouterr()
    assert captured.err.strip().splitlines()[-1].startswith("error: the teacher detects no better")
    assert "Starting training" not in captured.out
    assert not list((tmp_path / "run").glob("*.pth"))
    assert main(command(weights, tmp_path / "run", 0)) == 0
    again = command(weights, tmp_path / "run", IMAGES)
    assert main([*again[:2], "--resume", *again[2:]]) == 0  # a resumed run has passed already


def test_a_teacher_that_detects_is_not_called_random(folder, loader):
    """GFL's class scores start low: after few iterations its loss is hardly below that with shuffled weights."""
    check_teacher(student(folder / "weak_GFL.pth", kind="GFL"), loader, IMAGES)


def test_training_is_the_same_with_and_without(folder, blood_cells, tmp_path):
    for images in (0, 3):
        assert main(yaml_command(folder / "RetinaNet.pth", tmp_path / str(images), images)) == 0
    one, two = (files.read(str(tmp_path / run / "model_final.pth"))["model"] for run in ("0", "3"))
    assert all(torch.equal(one[name], two[name]) for name in one)
