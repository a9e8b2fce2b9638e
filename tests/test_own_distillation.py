"""tools/distill.py: what it chooses from the data, the configs and runs that follow, and that it resumes."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2kd.config import load_config
from d2kd.errors import D2kdError
from d2kd.experiments import own
from d2kd.experiments.own import LABELS, OwnDistillation, duration
from d2kd.experiments.plan import Images, Measured, choose_anchors, coverage, image_size, measure, write_config

SIZE = (640, 480)


@pytest.fixture
def data(tmp_path):
    """Twenty images of 640 x 480 with a box of 48 x 48 pixels each, of three classes in turn."""
    content = {"images": [], "annotations": [], "categories": [{"id": i, "name": x} for i, x in enumerate("abc", 1)]}
    (tmp_path / "images").mkdir()
    for number in range(1, 21):
        Image.new("RGB", SIZE, (9 * number, 90, 60)).save(tmp_path / "images" / f"{number}.png")
        content["images"].append({"id": number, "file_name": f"{number}.png", "width": SIZE[0], "height": SIZE[1]})
        entry = {"id": number, "image_id": number, "category_id": number % 3 + 1, "bbox": [96, 64, 48, 48]}
        content["annotations"].append({**entry, "area": 2304, "iscrowd": 0})
    (tmp_path / "ann.json").write_text(json.dumps(content))
    return f"{tmp_path}/ann.json:{tmp_path}/images"


@pytest.fixture(autouse=True)
def _nothing_runs(monkeypatch):
    monkeypatch.setattr(own, "measure", lambda configs, data: [Measured(2.0, 0.5, 900.0), Measured(3.0, 1.0, 1500.0)])


def plan(data, tmp_path, **settings):
    series = OwnDistillation(data, output=str(tmp_path / "out"), models="small", plan_only=True, **settings)
    series.run()
    return series


def configs(series):
    return {kind: load_config(str(series.folder / f"{kind}.yaml")) for kind in LABELS}


@pytest.mark.slow
@pytest.mark.parametrize("detector", ["retinanet", "gfl", "atss", "fcos"])
def test_configs_fit_the_data_and_each_other(data, tmp_path, detector, capsys):
    series = plan(data, tmp_path, detector=detector, epochs=40, batch_size=4)
    made = configs(series)
    node = detector.upper()
    for cfg in made.values():
        assert cfg.MODEL[node].NUM_CLASSES == 3
        assert cfg.SOLVER.MAX_ITER == 40 * 4  # 16 of 20 images, 4 in a batch
        assert abs(cfg.SOLVER.BASE_LR - 0.001 * 4 / 8) < 1e-9
        assert cfg.INPUT.MIN_SIZE_TEST == 192
    for key in ("ANCHOR_GENERATOR", node):
        assert made["teacher"].MODEL[key] == made["student"].MODEL[key] == made["distilled"].MODEL[key]
    teacher = made["distilled"].MODEL.DISTILL.TEACHER
    assert Path(teacher.CONFIG_FILE) == series.folder / "teacher.yaml"
    assert Path(teacher.WEIGHTS) == series.folder / "teacher" / "model_final.pth"
    assert made["distilled"].MODEL.DISTILL.CROSSKD.CUT == 1
    said = capsys.readouterr().out
    assert "16 images with 16 boxes to train on, 4 images to evaluate on; 3 classes: a, b, c" in said
    assert ("anchors:" in said) == (detector != "fcos")


def test_the_runs_and_their_time(data, tmp_path, capsys):
    series = plan(data, tmp_path, epochs=50, batch_size=8, seeds=2)
    commands = [" ".join(run.command()) for run in series._runs()]
    assert len(commands) == 5
    assert all("--resume" in x and f"--train-data {series.folder}/data/own_train.json:" in x for x in commands)
    assert not any("DATASETS" in x for x in commands)
    said = capsys.readouterr().out
    # 100 iterations, and 15 s plus 4 evaluations of 4 images; measured: student 2 s, teacher 3 s and 1 s per image.
    assert f"teacher              3.00 s per iteration, about {duration(300 + 31)}" in said
    assert f"student              2.00 s per iteration, about {duration(2 * (200 + 23))}" in said
    assert f"student + CrossKD    10.00 s per iteration, about {duration(2 * (1000 + 23))}" in said
    assert "1.5 GB" in said


@pytest.mark.slow
def test_other_settings_do_not_mix_with_results(data, tmp_path):
    series = plan(data, tmp_path, epochs=5)
    plan(data, tmp_path, epochs=6)  # nothing has run yet
    (series.folder / "teacher").mkdir()
    (series.folder / "teacher" / "run.json").write_text("{}")
    plan(data, tmp_path, epochs=6, seeds=3)  # more seeds may be added
    with pytest.raises(D2kdError, match="epochs was 6 and is 7"):
        plan(data, tmp_path, epochs=7)


@pytest.mark.slow
def test_a_given_teacher_keeps_its_anchors(data, tmp_path):
    base = load_config("configs/demo_teacher.yaml").MODEL.ANCHOR_GENERATOR.SIZES
    write_config(
        tmp_path / "t.yaml", str(own.ROOT / "configs" / "demo_teacher.yaml"), {"MODEL.RETINANET.NUM_CLASSES": 3}
    )
    series = plan(data, tmp_path, teacher_config=str(tmp_path / "t.yaml"), teacher_weights="t.pth")
    made = load_config(str(series.folder / "distilled.yaml")).MODEL
    assert np.allclose(made.ANCHOR_GENERATOR.SIZES, base, atol=1e-3)
    assert Path(made.DISTILL.TEACHER.CONFIG_FILE) == tmp_path / "t.yaml"
    assert [run.label for run in series._runs()] == [LABELS["student"], LABELS["distilled"]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"detector": "yolo"}, "--detector is 'yolo'"),
        ({"teacher_config": "x.yaml"}, "go together"),
        ({"epochs": -1}, "--epochs is -1"),
        ({"seeds": 0}, "--seeds is 0"),
        ({"start": {"student": "gone.pth"}}, "the student starts from cannot be fetched.*--student-start"),
    ],
)
def test_mistakes(data, tmp_path, settings, message):
    with pytest.raises(D2kdError, match=message):
        plan(data, tmp_path, **settings)


def test_anchors_by_hand():
    """A box of 10 x 10 covers a quarter of an anchor of 20 x 20, and 50 / 78 of one of 10 x 12.8 with 10 x 5 of it."""
    boxes = np.array([[10.0, 10.0], [20.0, 20.0]])
    assert coverage(boxes, np.array([[20.0, 20.0]])) == (0.5, 0.625)
    assert coverage(boxes[:1], np.array([[20.0, 5.0]])) == (0.0, pytest.approx(50 / 150))


def test_anchors_follow_the_boxes_and_stay_above_their_distance():
    config = load_config("configs/demo_teacher.yaml")
    first = config.MODEL.ANCHOR_GENERATOR.SIZES[0][0]
    for side, factor in ((560.0, 2.0), (9.0, 0.5), (3.0, 0.5)):
        found = choose_anchors(config, np.full((5, 2), side))
        assert found.settings["MODEL.ANCHOR_GENERATOR.SIZES"][0][0] == pytest.approx(first * factor), side
        assert found.covered == (side > 8)


def test_image_size_is_the_median_of_the_shorter_sides_in_steps_of_32():
    images = Images(np.array([100.0, 300.0, 310.0]), np.array([400.0, 400.0, 400.0]), np.ones((1, 2)), np.array([0]))
    assert image_size(images, 800) == 288
    assert image_size(images, 192) == 192
    assert images.boxes_at(200, 400).tolist() == [[1.0, 1.0]]  # the longer side is at its limit


@pytest.mark.slow
def test_steps_are_measured(data):
    config = str(own.ROOT / "configs" / "quick_retinanet.yaml")
    found = measure([config], ["--train-data", data, "--val-split", "0.2"])[0]
    assert min(found) > 0
