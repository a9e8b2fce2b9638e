"""Predictions on images, folders and videos, from checkpoints and exported files; detectors side by side."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, List

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.data.detection_utils import read_image
from detectron2.structures import Boxes, Instances
from small import CONFIGS, save_teacher, small_config

from d2kd.export import export_onnx, export_torchscript, load_detector
from d2kd.exported import REPORT, ExportReport
from d2kd.predict import compare, describe_export, find_inputs, predictor_of
from d2kd.predict.compare import SUMMARY
from d2kd.predict.inputs import Video, video_writer
from d2kd.predict.write import IMAGES
from d2kd.report.runs import RESULTS

DISTILL = str(CONFIGS / "quick_crosskd_retinanet.yaml")
LAZY = str(CONFIGS / "lazy" / "quick_crosskd_retinanet.py")
NAMES = ["RBC", "WBC", "Platelets"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("weights") / "weights.pth")


@pytest.fixture(scope="module")
def images(blood_cells: Path) -> List[Path]:
    return sorted((blood_cells / "images").glob("val*"))


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    spec = importlib.util.spec_from_file_location("predict_tool", CONFIGS.parent / "tools" / "predict.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*args: Any) -> int:
        monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, args), "--device", "cpu"])
        return module.main()

    return run


def last_error(capsys: pytest.CaptureFixture) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def exported(folder: Path, weights: Path, kind: str) -> Path:
    """A file as tools/export.py writes it, without its checks."""
    detector = load_detector(DISTILL, str(weights))
    file = folder / f"model.{kind}"
    (export_onnx if kind == "onnx" else export_torchscript)(detector, file, (96, 128))
    report = describe_export(DISTILL, [], str(weights), detector)
    (folder / REPORT).write_text(json.dumps(report.to_json()))
    return file


# --- images


@pytest.mark.parametrize("kind", ["yaml", "lazy", *(pytest.param(x, marks=pytest.mark.slow) for x in ("ts", "onnx"))])
@pytest.mark.slow
def test_results_are_those_of_detectron2s_evaluation(
    tmp_path: Path, weights: Path, images: List[Path], call: Callable[..., int], kind: str
) -> None:
    source = {"yaml": ("--config-file", DISTILL), "lazy": ("--config-file", LAZY)}.get(kind, ())
    file = weights if source else exported(tmp_path, weights, kind)
    output = tmp_path / "new" / "folder"
    assert call(images[0], "--weights", file, *source, "--output", output) == 0
    results = json.loads((output / RESULTS).read_text())
    given = DatasetMapper(small_config(), is_train=False)({"file_name": str(images[0]), "height": 128, "width": 170})
    expected = load_detector(DISTILL, str(weights))([given])[0]["instances"]
    assert len(results) == len(expected) > 5
    corners = np.array([x["bbox"] for x in results])
    corners[:, 2:] += corners[:, :2]
    np.testing.assert_allclose(corners, expected.pred_boxes.tensor.numpy(), atol=0.05)
    np.testing.assert_allclose(
        [x["score"] for x in results], expected.scores.numpy(), atol=1e-3
    )  # the anchors' last digits
    assert [x["category_id"] - 1 for x in results] == expected.pred_classes.tolist()  # the file's ids begin at 1
    described = json.loads((output / IMAGES).read_text())
    assert described["images"] == [{"id": 1, "file_name": str(images[0]), "height": 128, "width": 170}]
    assert [x["name"] for x in described["categories"]] == NAMES
    drawn = read_image(str(output / images[0].name))
    assert drawn.shape == (128, 170, 3)
    assert (drawn != read_image(str(images[0]))).any()


@pytest.mark.parametrize(("order", "first"), [("BGR", 10.0), ("RGB", 30.0)])
def test_images_have_the_channel_order_of_the_detector(order: str, first: float) -> None:
    seen = {}

    class Seeing(torch.nn.Module):
        def forward(self, inputs: List[Dict[str, Any]]) -> List[Dict[str, Instances]]:
            seen.update(inputs[0])
            nothing = Boxes(torch.zeros(0, 4)), torch.zeros(0), torch.zeros(0).long()
            return [{"instances": Instances((8, 16), **dict(zip(("pred_boxes", "scores", "pred_classes"), nothing)))}]

    blue_green_red = np.full((8, 16, 3), (10, 20, 30), np.uint8)
    found = predictor_of(Seeing(), ExportReport(order, (16, 64), 0.05, {}))(blue_green_red)
    assert len(found) == 0
    assert seen["image"].shape == (3, 16, 32)
    assert seen["image"][:, 0, 0].tolist() == [first, 20.0, 40.0 - first]
    assert (seen["height"], seen["width"]) == (8, 16)


def test_nothing_is_drawn_below_the_least_score(
    tmp_path: Path, weights: Path, images: List[Path], call: Callable[..., int]
) -> None:
    args = ["--weights", weights, "--config-file", DISTILL, "--output", tmp_path, "--min-score", "1.1"]
    assert call(images[0], *args) == 0
    np.testing.assert_array_equal(read_image(str(tmp_path / images[0].name)), read_image(str(images[0])))
    assert json.loads((tmp_path / RESULTS).read_text())


def test_folders_are_searched_and_no_output_is_lost(tmp_path: Path, images: List[Path]) -> None:
    for name in ("a/x.png", "a/b/x.png", "x.png", "clip.avi", "clip.MP4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(images[0], tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    names = [x.name for x in find_inputs([str(tmp_path), str(tmp_path / "a")])]
    assert names == ["a/b/x.png", "a/x.png", "clip.mp4", "clip_2.mp4", "x.png", "b/x.png", "x_2.png"]


@pytest.mark.slow
def test_a_damaged_image_is_left_out(
    tmp_path: Path, weights: Path, images: List[Path], call: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(images[0].read_bytes()[:300])
    args = ["--weights", weights, "--config-file", DISTILL, "--output", tmp_path / "out", "--names", "a", "b", "c"]
    assert call(damaged, images[0], *args) == 0
    assert "in 1 images and frames; 1 images cannot be read" in capsys.readouterr().out
    described = json.loads((tmp_path / "out" / IMAGES).read_text())
    assert [x["file_name"] for x in described["images"]] == [str(images[0])]
    assert [x["name"] for x in described["categories"]] == ["a", "b", "c"]
    assert call(damaged, *args) == 2
    assert "damaged.png cannot be read" in last_error(capsys)


@pytest.mark.slow
def test_a_run_tells_config_and_names(
    tmp_path: Path, weights: Path, blood_cells: Path, images: List[Path], call: Callable[..., int]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    cfg = small_config("DATASETS.TRAIN", "('own_train',)", "DATASETS.TEST", "()")
    (run / "config.yaml").write_text(cfg.dump())
    (run / "run.json").write_text(json.dumps({"MODEL.META_ARCHITECTURE": "RetinaNet"}))
    (run / "data.json").write_text(json.dumps({"own_train": {"file": str(blood_cells / "instances_val.json")}}))
    shutil.copy(weights, run / "model_final.pth")
    assert call(images[0], "--weights", run / "model_final.pth", "--output", tmp_path / "out") == 0
    described = json.loads((tmp_path / "out" / IMAGES).read_text())
    assert [x["name"] for x in described["categories"]] == NAMES


# --- videos


def write_video(path: Path, frames: int) -> None:
    writer = video_writer(path, 10.0, (128, 96))
    for shade in range(frames):
        writer.write(np.full((96, 128, 3), 40 * shade, np.uint8))
    writer.release()


@pytest.mark.slow
def test_videos_stay_videos(tmp_path: Path, weights: Path, call: Callable[..., int]) -> None:
    write_video(tmp_path / "clip.mp4", 3)
    args = ["--weights", weights, "--config-file", DISTILL, "--output", tmp_path / "out"]
    assert call(tmp_path / "clip.mp4", *args) == 0
    made = Video(tmp_path / "out" / "clip.mp4")
    assert (made.size, made.fps, len(made)) == ((128, 96), 10.0, 3)
    assert [frame.shape for frame in made] == [(96, 128, 3)] * 3
    described = json.loads((tmp_path / "out" / IMAGES).read_text())["images"]
    assert [(x["id"], x["frame"]) for x in described] == [(1, 0), (2, 1), (3, 2)]
    assert {x["image_id"] for x in json.loads((tmp_path / "out" / RESULTS).read_text())} == {1, 2, 3}


# --- side by side


class Known:
    """Finds a part of the ground truth."""

    def __init__(self, data_set: str, part: Callable[[int], slice]) -> None:
        self.model = SimpleNamespace(num_classes=3)
        self.categories: Dict[Any, str] = dict(enumerate(NAMES, 1))
        entries = DatasetCatalog.get(data_set)
        self._found = {
            read_image(x["file_name"], "BGR").tobytes(): x["annotations"][part(i)] for i, x in enumerate(entries)
        }

    def __call__(self, image: np.ndarray) -> Instances:
        boxes = self._found[image.tobytes()]
        corners = torch.tensor([x["bbox"] for x in boxes]).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        classes = torch.tensor([x["category_id"] for x in boxes], dtype=torch.int64)
        return Instances(
            image.shape[:2], pred_boxes=Boxes(corners), pred_classes=classes, scores=torch.ones(len(boxes))
        )


@pytest.mark.slow
def test_images_come_first_on_which_detectors_differ(tmp_path: Path, blood_cells: Path) -> None:
    every = Known("blood_cells_val", lambda i: slice(None))
    none_of_third = Known("blood_cells_val", lambda i: slice(0 if i == 2 else None))
    found = compare({"one": every, "two": none_of_third}, "blood_cells_val", tmp_path, count=2)
    assert found.whole["one"] == pytest.approx((100, 100))
    assert 0 < found.whole["two"].ap < 100
    third = DatasetCatalog.get("blood_cells_val")[2]["file_name"]
    assert found.images[0].entry["file_name"] == third
    assert found.images[0].scores["two"] == (0, 0)
    assert [image.difference("recall") for image in found.images] == pytest.approx([100, 0, 0, 0])
    pictures = sorted(tmp_path.glob("*.jpg"))
    assert [x.name[:4] for x in pictures] == ["001_", "002_"]
    assert Path(third).stem in pictures[0].name
    height, width = cv2.imread(str(pictures[0])).shape[:2]
    assert width > 3 * height  # ground truth and two detectors
    summary = json.loads((tmp_path / SUMMARY).read_text())
    assert summary["images"][0]["two"] == {"ap": 0, "recall": 0}


@pytest.mark.slow
def test_the_tool_compares_checkpoints_and_exported_files(
    tmp_path: Path, weights: Path, call: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    file = exported(tmp_path, weights, "ts")
    detectors = [f"student={DISTILL}:{weights}", f"file={file}"]
    args = ["--val-data", "blood_cells_val", "--images", "1", "--min-score", "1", "--output", tmp_path / "out"]
    assert call("--compare", *detectors, *args) == 0
    printed = capsys.readouterr().out
    whole = next(line for line in printed.splitlines() if "all images" in line).split("|")
    assert whole[2].split() == whole[3].split()  # the file does what the checkpoint does
    assert len(list((tmp_path / "out").glob("*.jpg"))) == 1


# --- mistakes


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "name images, folders or videos"),
        (["{image}"], "name a checkpoint or an exported file"),
        (["gone.png", "--weights", "{weights}"], "gone.png: no such file or folder"),
        (["{empty}", "--weights", "{weights}"], "empty holds no image and no video"),
        (["{weights}", "--weights", "{weights}"], "weights.pth is no image and no video by its suffix"),
        (["{image}", "--weights", "{weights}"], "weights.pth does not lie in the folder of its run"),
        (["{image}", "--weights", "gone.pth"], "gone.pth: no such file"),
        (["{image}", "--weights", "gone.onnx"], "gone.onnx does not tell how to resize images"),
        (["{image}", "--weights", "x.onnx", "--config-file", DISTILL], "x.onnx is an exported file, which needs no"),
        (["{image}", "--weights", "{wide}", "--config-file", DISTILL], "wide.pth does not fit the model"),
        (["{image}", "--weights", "{weights}", "--config-file", DISTILL, "--names", "a"], "the detector has 3 classes"),
        (["{video}", "--weights", "{weights}", "--config-file", DISTILL], "clip.mp4 cannot be read"),
        (["--compare", "teacher"], "needs images with ground truth"),
        (["--compare", "x", "--val-data", "blood_cells_val"], "--compare x: write label=config:weights"),
        (["--compare", f"a={DISTILL}:{{weights}}", "--val-data", "blood_cells_val"], "needs two or more detectors"),
        (["--compare", "a=b:c", "--val-data", "gone.json"], "gone.json does not exist"),
    ],
)
def test_mistakes_end_with_one_sentence(
    tmp_path: Path,
    weights: Path,
    images: List[Path],
    call: Callable[..., int],
    capsys: pytest.CaptureFixture,
    args: List[str],
    message: str,
) -> None:
    places = {"image": images[0], "weights": weights, "empty": tmp_path / "empty", "video": tmp_path / "clip.mp4"}
    places["empty"].mkdir()
    places["video"].write_text("no video")
    if "{wide}" in args:
        places["wide"] = save_teacher(tmp_path / "wide.pth", "MODEL.FPN.OUT_CHANNELS", "64")
    assert call(*(arg.format(**places) for arg in args), "--output", tmp_path / "out") == 2
    error = last_error(capsys)
    assert error.startswith("error: ")
    assert message in error


def test_inputs_are_not_overwritten(
    weights: Path, images: List[Path], call: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    args = ["--weights", weights, "--config-file", DISTILL, "--output", images[0].parent]
    assert call(images[0], *args) == 2
    assert "would overwrite" in last_error(capsys)


def test_classes_of_another_data_set_are_refused(tmp_path: Path, blood_cells: Path) -> None:
    every = Known("blood_cells_val", lambda i: slice(None))
    other = Known("blood_cells_val", lambda i: slice(None))
    other.categories = {1: "WBC", 2: "RBC", 3: "Platelets"}
    with pytest.raises(ValueError, match=r"other has 3 classes \(WBC, RBC, Platelets\), but data set blood_cells_val"):
        compare({"every": every, "other": other}, "blood_cells_val", tmp_path)
