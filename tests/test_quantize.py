"""INT8 files: what is quantized, with which images, and that they find what the detector finds."""

import importlib.util
from pathlib import Path
from typing import Dict

import numpy as np
import onnx
import pytest
import torch
from detectron2.structures import Boxes, pairwise_iou
from PIL import Image
from small import CONFIGS, save_teacher

from d2kd.errors import D2kdError
from d2kd.export import OPSET, Exportable, export_onnx, load_detector, random_image
from d2kd.predict import calibration_images, describe_export, find_calibration, predictor_of
from d2kd.quantize import check_quantization, quantize_onnx

CONFIG = str(CONFIGS / "quick_retinanet.yaml")
SIZES = [(96, 128), (128, 96), (100, 131)]
LAST = ("cls_score", "bbox_pred", "ctrness")


def is_quantized(graph: onnx.GraphProto) -> Dict[str, bool]:
    """For each convolution, whether its weights are 8-bit integers."""
    makers = {name: node for node in graph.node for name in node.output}
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    found = {}
    for node in graph.node:
        if node.op_type == "Conv":
            maker = makers.get(node.input[1])
            found[node.name] = maker is not None and types[maker.input[0]] == onnx.TensorProto.INT8
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["RetinaNet", "FCOS"])
def test_all_convolutions_but_the_last_have_8_bits(tmp_path: Path, name: str) -> None:
    weights = save_teacher(tmp_path / "weights.pth", "MODEL.META_ARCHITECTURE", name)
    model = load_detector(CONFIG, str(weights), ["MODEL.META_ARCHITECTURE", name])
    export_onnx(model, tmp_path / "model.onnx", SIZES[0])
    images = [random_image(size) for size in SIZES]
    run = quantize_onnx(tmp_path / "model.onnx", tmp_path / "int8.onnx", images, 0.05)
    written = onnx.load(str(tmp_path / "int8.onnx"))
    found = is_quantized(written.graph)
    assert [name for name in found if not found[name]] == [name for name in found if last(name)]
    assert sum(found.values()) > sum(map(last, found)) > 0
    assert [x.version for x in written.opset_import if not x.domain] == [OPSET]
    scores = run(images[0], torch.tensor(0.0))[1]
    assert len(run(images[0], scores[:2].mean())[0]) < 5 or name == "FCOS"  # all levels but one have no candidate
    assert len(run(images[0], torch.tensor(2.0))[0]) == 0
    for image in images:
        boxes, _, classes = (x[:10] for x in Exportable(model)(image, torch.tensor(0.0)))
        ours = run(image, torch.tensor(0.0))
        same = (pairwise_iou(Boxes(boxes), Boxes(ours[0])) > 0.5) & (classes[:, None] == ours[2])
        assert same.any(1).float().mean() >= 0.5
        assert not torch.equal(ours[1][:10], Exportable(model)(image, torch.tensor(0.0))[1][:10])  # it does round


def last(node: str) -> bool:
    return any(part in node for part in LAST)


def test_calibration_takes_images_from_all_of_a_folder(tmp_path: Path) -> None:
    for i in range(10):
        Image.fromarray(np.full((40, 60, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    files = find_calibration(str(tmp_path), [], 4, tmp_path)
    assert [file.name for file in files] == ["0.png", "2.png", "5.png", "7.png"]
    assert len(find_calibration(str(tmp_path), [], 100, tmp_path)) == 10
    with pytest.raises(D2kdError, match="--calibration-images is 0; it must be 1 or more"):
        find_calibration(str(tmp_path), [], 0, tmp_path)


def test_calibration_images_are_prepared_as_for_the_detector(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load_detector(CONFIG, str(save_teacher(tmp_path / "weights.pth")))
    predictor = predictor_of(model, describe_export(CONFIG, [], str(tmp_path / "weights.pth"), model))
    Image.fromarray(np.full((40, 60, 3), (1, 2, 3), np.uint8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("no image")
    (image,) = calibration_images([tmp_path / "bad.png", tmp_path / "good.png"], predictor)
    assert "bad.png is left out" in caplog.text
    assert (image.dtype, image.shape) == (torch.float32, (3, 128, 192))
    assert image[:, 0, 0].tolist() == [3, 2, 1]  # BGR
    with pytest.raises(D2kdError, match=r"none of the 1 images for calibration can be read; fix or replace .*bad\.png"):
        list(calibration_images([tmp_path / "bad.png"], predictor))


def test_a_data_set_that_is_not_here(tmp_path: Path) -> None:
    with pytest.raises(D2kdError, match=r"data set coco_2017_train is not here \(.*json cannot be read\); name images"):
        find_calibration("", ["coco_2017_train"], 4, tmp_path)
    with pytest.raises(D2kdError, match="--int8 has no images for calibration: name a folder"):
        find_calibration("", [], 4, tmp_path)


def test_an_onnxruntime_without_quantization(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime.quantization" else find(name)
    )
    with pytest.raises(D2kdError, match=r"--int8 needs onnxruntime\.quantization, .* or leave --int8 out"):
        check_quantization()
