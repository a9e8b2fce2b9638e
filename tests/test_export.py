"""Exported files do what the detector does; every checkpoint of a run is a stock detectron2 checkpoint."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, List

import numpy as np
import onnxruntime
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from small import CONFIGS, save_teacher
from torch import Tensor, nn

from d2kd import export
from d2kd.checkpoint import files
from d2kd.config import load_config
from d2kd.engine import main
from d2kd.errors import D2kdError
from d2kd.export import Detections, Exportable, check_agreement, export_onnx, export_torchscript, load_detector
from d2kd.predict import open_predictor

SIZE = (96, 128)
SIZES = [SIZE, (128, 96), (100, 131)]
DISTILL = str(CONFIGS / "quick_crosskd_retinanet.yaml")
LAZY = str(CONFIGS / "lazy" / "quick_crosskd_retinanet.py")
every = pytest.mark.parametrize("name", ["RetinaNet", "GFL", "ATSS", "FCOS"])


def detector(folder: Path, name: str = "RetinaNet") -> DenseDetector:
    """A tiny distilled detector out of a file; its teacher does not exist."""
    weights = save_teacher(folder / f"{name}.pth", "MODEL.META_ARCHITECTURE", name)
    return load_detector(DISTILL, str(weights), ["MODEL.META_ARCHITECTURE", f"Distill{name}"])


def image(size: Any = (112, 120)) -> Tensor:
    return 255 * torch.rand(3, *size, generator=torch.Generator().manual_seed(1))


def plain(model: nn.Module, picture: Tensor) -> Detections:
    found = model([{"image": picture}])[0]["instances"]
    return found.pred_boxes.tensor, found.scores, found.pred_classes


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("export_tool", CONFIGS.parent / "tools" / "export.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def call(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def run(*args: Any, size: Any = ("--size", *SIZE)) -> int:
        short = ["--device", "cpu", "--seconds", "0.01", *size]
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, [*args, *short])])
        return tool.main()

    return run


# --- files


@pytest.mark.slow
@every
@pytest.mark.parametrize("write", [export_torchscript, export_onnx])
def test_files_agree_with_the_detector(tmp_path: Path, name: str, write: Any) -> None:
    model = detector(tmp_path, name)
    threshold = model.test_score_thresh
    run = write(model, tmp_path / "file", SIZE)
    agreements = check_agreement("file", run, model, SIZES)
    assert all(x.detections > 5 for x in agreements)
    for every, better in zip(agreements[::2], agreements[1::2]):
        assert every.threshold == 0 < better.threshold
        assert better.detections < every.detections or name == "ATSS"  # which ranks by another score
    assert max(x.unmatched for x in agreements) == 0
    assert max(x.box for x in agreements) < 1e-3
    assert max(x.score for x in agreements) < 1e-5
    picture = image()
    expected = plain(model, picture)  # with the config's own threshold, which exporting leaves alone
    assert model.test_score_thresh == threshold
    for ours, theirs in zip(run(picture, torch.tensor(threshold)), expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    # Of one candidate, all levels but one are empty.
    only = Exportable(model)(picture, torch.tensor(0.0))[1][:2].mean()
    for ours, theirs in zip(run(picture, only), Exportable(model)(picture, only)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
        assert len(theirs) < 5 or name == "ATSS"  # its threshold is not of the score that ranks


def spoil(kind: str, found: Detections, threshold: Tensor) -> Detections:
    boxes, scores, classes = found
    if kind == "only the best missing" and threshold > 0:
        return tuple(x[len(x) // 3 :] for x in found)
    return {
        "boxes": (boxes + 1, scores, classes),
        "scores": (boxes, 0.9 * scores, classes),
        "classes": (boxes, scores, (classes + 1) % 3),
        "too few": (boxes[::2], scores[::2], classes[::2]),
        "nothing": (boxes[:0], scores[:0], classes[:0]),
        "only the best missing": found,
        "another order": (boxes.flip(0), scores.flip(0), classes.flip(0)),
    }[kind]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["boxes", "scores", "classes", "too few", "nothing", "only the best missing"])
def test_a_wrong_file_is_refused(tmp_path: Path, kind: str) -> None:
    model = detector(tmp_path)
    exportable = Exportable(model)
    with pytest.raises(D2kdError, match=r"wrong\.ts does not do what the detector does: .* \d+ have no counterpart"):
        check_agreement("wrong.ts", lambda x, t: spoil(kind, exportable(x, t), t), model, [SIZE])


def test_a_fixed_threshold_is_refused_and_another_order_is_not(tmp_path: Path) -> None:
    model = detector(tmp_path)
    exportable = Exportable(model)
    with pytest.raises(D2kdError, match=r"of \d+ and \d+ detections"):
        check_agreement("fixed.ts", lambda x, t: exportable(x, torch.tensor(0.0)), model, [SIZE])
    run = lambda x, t: spoil("another order", exportable(x, t), t)  # noqa: E731
    assert check_agreement("file", run, model, [SIZE])[0].box == 0


def test_without_onnx_one_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    with pytest.raises(D2kdError, match="needs onnxruntime: pip install onnxruntime, or --format torchscript"):
        export_onnx(detector(tmp_path), tmp_path / "model.onnx", SIZE)


# --- loading


@pytest.mark.slow
def test_a_lazy_config_needs_no_teacher_either(tmp_path: Path) -> None:
    weights = str(save_teacher(tmp_path / "weights.pth"))
    ours = load_detector(LAZY, weights, ["model.teacher.weights=gone.pth"])
    assert ours.teacher is None
    theirs = load_detector(DISTILL, weights)  # whose anchors differ in the last digits
    torch.testing.assert_close(plain(ours, image())[1], plain(theirs, image())[1], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_other_detectors_are_refused() -> None:
    with pytest.raises(D2kdError, match="makes a GeneralizedRCNN, not a dense detector"):
        load_detector("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", "any.pth")


# --- the tool


@pytest.mark.parametrize(
    ("config", "opts", "size"),
    [
        (DISTILL, [], (128, 256)),
        (DISTILL, ["INPUT.MIN_SIZE_TEST", "300"], (256, 256)),
        (DISTILL, ["INPUT.MIN_SIZE_TEST", "0"], (256, 256)),
        (str(CONFIGS / "retinanet_R18.yaml"), [], (800, 1333)),
        (LAZY, [], (128, 1333)),
        (LAZY, ["dataloader.test.mapper.augmentations.0.max_size=200"], (128, 200)),
        (LAZY, ["dataloader.test.mapper.augmentations=[]"], (800, 1333)),
    ],
)
def test_images_for_the_checks_are_of_the_configs_test_size(config: str, opts: List[str], size: Any) -> None:
    assert export.evaluation_size(config, opts) == size


def test_a_detector_without_detections_cannot_be_checked(tmp_path: Path) -> None:
    model = detector(tmp_path)
    model.test_topk_candidates = 0
    with pytest.raises(D2kdError, match=r"x\.ts cannot be checked: the detector finds nothing in an image of 96 x 128"):
        check_agreement("x.ts", Exportable(model), model, [SIZE])


@pytest.mark.slow
def test_tool_writes_files_and_a_table(tmp_path: Path, call: Callable[..., int], capsys: Any) -> None:
    student = save_teacher(tmp_path / "student.pth")
    teacher = save_teacher(tmp_path / "teacher.pth", "MODEL.FPN.OUT_CHANNELS", "64")
    wide = tmp_path / "wide.yaml"
    wide.write_text(f'_BASE_: "{CONFIGS}/quick_retinanet.yaml"\nMODEL: {{FPN: {{OUT_CHANNELS: 64}}}}\n')
    compare = [f"teacher={wide}:{teacher}", f"plain={CONFIGS}/quick_retinanet.yaml:{student}"]
    output = tmp_path / "new" / "folder"
    assert call("--config-file", DISTILL, "--weights", student, "--output", output, "--compare", *compare) == 0
    report = json.loads((output / "export.json").read_text())
    rows = {row["model"]: row for row in report["models"]}
    assert list(rows) == ["teacher", "plain", "student", "model.ts", "model.onnx (opset 17, onnxruntime, CPU)"]
    assert rows["teacher"]["parameters (M)"] > rows["plain"]["parameters (M)"] == rows["student"]["parameters (M)"]
    assert rows["model.ts"]["size (MB)"] == (output / "model.ts").stat().st_size / 1e6
    assert all(row["ms (median)"] > 0 for row in rows.values())
    # The weights alone, without what torch.save adds.
    assert 0.9 < rows["student"]["size (MB)"] / (student.stat().st_size / 1e6) < 1
    assert report["input_format"] == "BGR"
    assert {(x["file"], *x["size"]) for x in report["checks"]} == {
        (file, *size) for file in ("model.ts", "model.onnx") for size in ((96, 128), (128, 96), (72, 85))
    }
    printed = capsys.readouterr().out
    assert all(re.search(rf"^\| {re.escape(name)} ", printed, re.M) for name in rows)
    assert "largest box difference (px)" in printed
    # The files stand alone: plain torch and plain onnxruntime run them.
    inputs = image(), torch.tensor(0.05)
    traced = torch.jit.load(output / "model.ts")(*inputs)
    session = onnxruntime.InferenceSession(output / "model.onnx", providers=["CPUExecutionProvider"])
    assert [x.name for x in session.get_outputs()] == ["boxes", "scores", "classes"]
    found = session.run(None, {"image": inputs[0].numpy(), "score_threshold": inputs[1].numpy()})
    assert len(traced[0]) > 5
    for ours, theirs in zip(found, traced):
        torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_the_table_has_the_ap_of_each_file(tmp_path: Path, call: Callable[..., int], blood_cells: Path) -> None:
    weights = save_teacher(tmp_path / "student.pth")
    args = ["--config-file", DISTILL, "--weights", weights, "--evaluate", "--output", tmp_path / "out"]
    assert call(*args, "--compare", f"same={CONFIGS}/quick_retinanet.yaml:{weights}") == 0
    report = json.loads((tmp_path / "out" / "export.json").read_text())
    aps = {row["model"]: row["AP"] for row in report["models"]}
    expected = evaluate_command(weights, tmp_path)
    assert expected > 0
    assert len(aps) == 4
    assert aps == {name: pytest.approx(expected, rel=1e-3) for name in aps}
    assert report["edges"] == [128, 256]
    assert [name for _, name in report["categories"]] == ["RBC", "WBC", "Platelets"]


@pytest.mark.slow
def test_the_int8_file_is_calibrated_evaluated_and_used_like_others(
    tmp_path: Path, call: Callable[..., int], blood_cells: Path, capsys: Any
) -> None:
    weights, output = save_teacher(tmp_path / "student.pth"), tmp_path / "out"
    train, val = (f"{blood_cells}/instances_{split}.json:{blood_cells}/images" for split in ("train", "val"))
    args = ["--config-file", DISTILL, "--weights", weights, "--output", output, "--format", "onnx"]
    assert call(*args, "--int8", train, "--calibration-images", 3, "--evaluate", val) == 0
    assert MetadataCatalog.get("own_val").json_file.endswith("val.json")  # though --int8 gave train that name
    report = json.loads((output / "export.json").read_text())
    assert (report["opset"], report["threads"], report["calibrated_with"]) == (17, torch.get_num_threads(), 3)
    assert [row["model"].split(" ")[0] for row in report["models"]] == ["student", "model.onnx", "model_int8.onnx"]
    row = report["models"][-1]
    assert row["model"] == "model_int8.onnx (INT8, opset 17, onnxruntime, CPU)"
    assert row["size (MB)"] == (output / "model_int8.onnx").stat().st_size / 1e6
    assert row["AP"] >= 0
    printed = capsys.readouterr().out
    assert re.search(r"^ms: one image of 96 x 128, \d+ threads?; ONNX opset 17$", printed, re.M)
    assert "model_int8.onnx: calibrated with 3 images\n" in printed
    found = open_predictor(str(output / "model_int8.onnx"))(np.full((96, 128, 3), 90, np.uint8))
    assert found.image_size == (96, 128)


def evaluate_command(weights: Path, folder: Path) -> float:
    """AP by train_net.py --eval-only."""
    output = folder / "eval"
    args = ["--config-file", DISTILL, "--eval-only", "MODEL.WEIGHTS", str(weights), "OUTPUT_DIR", str(output)]
    assert main([*args, "DATALOADER.NUM_WORKERS", "0"]) == 0
    metadata = MetadataCatalog.get("blood_cells_val")
    results = output / "inference" / "blood_cells_val" / "coco_instances_results.json"
    truth = COCO(metadata.json_file)
    evaluation = COCOeval(truth, truth.loadRes(str(results)), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return 100 * evaluation.stats[0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--evaluate", "gone.json"], r"gone\.json does not exist"),
        (["--int8", "gone.json"], r"gone\.json does not exist"),
        (["--int8", "{folder}"], r".* holds no image"),
        (["--int8", "--format", "torchscript"], r"--int8 quantizes the ONNX file: use --format onnx or both"),
        (["--config-file", "gone.yaml"], r"config gone\.yaml is no file"),
        (["--weights", "gone.pth"], r"gone\.pth: no such file"),
        (["--config-file", str(CONFIGS / "quick_retinanet.yaml"), "--weights", "{wide}"], r"wide\.pth does not fit"),
        (["--compare", "teacher"], r"--compare teacher: write label=config:weights"),
        (["--compare", "teacher=gone.yaml:x.pth"], r"config gone\.yaml is no file"),
        (["--output", "{wide}"], r"--output .*wide\.pth: File exists; choose a folder"),
    ],
)
def test_mistakes_end_with_one_sentence(
    tmp_path: Path, call: Callable[..., int], capsys: Any, args: List[str], message: str
) -> None:
    wide = save_teacher(tmp_path / "wide.pth", "MODEL.FPN.OUT_CHANNELS", "64")
    student = save_teacher(tmp_path / "student.pth")
    good = ["--config-file", DISTILL, "--weights", student, "--output", tmp_path / "out"]
    assert call(*good, *(arg.format(wide=wide, folder=tmp_path) for arg in args)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(f"error: .*{message}", error), error
    assert not (tmp_path / "out").exists()


def test_tool_removes_a_wrong_file(
    tmp_path: Path, tool: ModuleType, call: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(model: DenseDetector, path: Path, size: Any) -> export.Run:
        path.write_text("no model")
        return lambda x, t: spoil("boxes", Exportable(model)(x, t), t)

    monkeypatch.setattr(export, "export_torchscript", write)
    weights = save_teacher(tmp_path / "student.pth")
    args = ["--config-file", DISTILL, "--weights", weights, "--output", tmp_path / "out", "--format", "torchscript"]
    assert call(*args) == 2
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.slow
def test_the_tool_takes_the_configs_test_size(
    tmp_path: Path, call: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    monkeypatch.setattr(
        export, "export_torchscript", lambda model, path, size: path.write_text("") or Exportable(model)
    )
    monkeypatch.setattr(export, "check_agreement", lambda name, run, model, of: sizes.extend(of) or [])
    weights = save_teacher(tmp_path / "student.pth")
    args = ["--config-file", DISTILL, "--weights", weights, "--output", tmp_path / "out", "--format", "torchscript"]
    assert call(*args, size=()) == 0
    assert sizes == [(128, 256), (256, 128), (96, 170)]
    assert "'" not in json.loads((tmp_path / "out" / "export.json").read_text())["settings"]["device"]


# --- checkpoints of a run


@pytest.mark.slow
def test_every_checkpoint_of_a_run_is_one_of_stock_detectron2(tmp_path: Path, blood_cells: Path) -> None:
    """Also those of the middle and the averaged weights; a config that detectron2 knows without this project."""
    few = ["MODEL.DEVICE", "cpu", "MODEL.RETINANET.NUM_CLASSES", "3", "MODEL.WEIGHTS", "", "MODEL.FPN.OUT_CHANNELS"]
    shared = [*few, "32", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"]
    config = str(CONFIGS / "retinanet_R18.yaml")
    teacher = build_model(load_config(config, [*few, "48"]))
    torch.save(teacher.state_dict(), tmp_path / "teacher.pth")
    run = tmp_path / "run"
    opts = [*shared, "OUTPUT_DIR", str(run), "MODEL.DISTILL.METHODS", "('PKD',)", "MODEL.DISTILL.PREFLIGHT", "0"]
    opts += ["MODEL.DISTILL.TEACHER.CONFIG_FILE", "retinanet_R18.yaml"]
    opts += ["MODEL.DISTILL.TEACHER.OPTS", repr([*few, "48"])]
    opts += ["MODEL.DISTILL.TEACHER.WEIGHTS", str(tmp_path / "teacher.pth")]
    opts += ["DATASETS.TRAIN", "('blood_cells_train',)", "DATASETS.TEST", "()", "INPUT.MIN_SIZE_TRAIN", "(96,)"]
    opts += ["SOLVER.IMS_PER_BATCH", "1", "SOLVER.MAX_ITER", "2", "SOLVER.CHECKPOINT_PERIOD", "1"]
    opts += ["SOLVER.EMA_DECAY", "0.5", "DATALOADER.NUM_WORKERS", "0", "TEST.EVAL_PERIOD", "0"]
    distill = str(CONFIGS / "crosskd_retinanet_R18.yaml")
    assert main(["--config-file", distill, *opts]) == 0

    cfg = get_cfg()
    cfg.merge_from_file(str(run / "student.yaml"))
    assert str(run / "model_final.pth") == cfg.MODEL.WEIGHTS
    checkpoints = {path.name: path for path in run.glob("*.pth")}
    assert {"model_0000000.pth", "model_final.pth", "model_ema_final.pth"} <= checkpoints.keys()
    biases = set()
    for name, path in checkpoints.items():
        stock = build_model(cfg).eval()
        DetectionCheckpointer(stock).load(str(path), checkpointables=[])
        saved = files.read(str(path))["model"]
        own = {key: value for key, value in saved.items() if not key.startswith("distill.")}
        state = stock.state_dict()
        assert own.keys() == state.keys(), name
        assert all(torch.equal(state[key], value) for key, value in own.items()), name
        biases.add(tuple(state["head.cls_score.bias"].tolist()))
    assert len(biases) == 3  # of the middle, the end and their average
    middle = str(checkpoints["model_0000000.pth"])
    ours = load_detector(distill, middle, shared)
    DetectionCheckpointer(stock).load(middle, checkpointables=[])
    expected = plain(stock, image())
    assert len(expected[0]) > 5
    assert all(torch.equal(one, two) for one, two in zip(plain(ours, image()), expected))
