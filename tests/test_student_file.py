"""student.yaml: what detectron2 loads without d2kd."""

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any, List

import pytest
import torch
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.modeling import RetinaNet, build_model
from small import CONFIGS
from torch import nn

from d2kd.config import load_config
from d2kd.engine.student_file import STUDENT_FILE, write_student, yaml_student
from d2kd.engine.styles import to_recipe
from d2kd.engine.styles.lazy_style import load_lazy
from d2kd.export import load_detector
from d2kd.nodes import located

CLASSES = 3
YAML, LAZY = CONFIGS / "crosskd_retinanet_R18.yaml", CONFIGS / "lazy" / "crosskd_retinanet_R18.py"
SMALL = ["MODEL.DEVICE", "cpu", "MODEL.FPN.OUT_CHANNELS", "32", "MODEL.RETINANET.NUM_CLASSES", str(CLASSES)]
SMALL += ["MODEL.RETINANET.SCORE_THRESH_TEST", "0.01"]
LAZY_SMALL = ["train.device=cpu", "model.backbone.out_channels=32", f"model.num_classes={CLASSES}"]
LAZY_SMALL += ["model.test_score_thresh=0.01", "model.head.conv_dims=[32,32]", "model.head.input_shape.0.channels=32"]
# detectron2's own way from a config to detections, by style.
STOCK = """
import sys
sys.modules["d2kd"] = None  # cannot be imported
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.modeling import RetinaNet, build_model

cfg = get_cfg()
cfg.merge_from_file(sys.argv[1] + "/student.yaml")
lazy = LazyConfig.load(sys.argv[2] + "/student.yaml")
image = torch.load("image.pth")
for folder, model, weights in (
    (sys.argv[1], build_model(cfg), cfg.MODEL.WEIGHTS),
    (sys.argv[2], instantiate(lazy.model).to(lazy.train.device), lazy.train.init_checkpoint),
):
    DetectionCheckpointer(model).load(weights)
    found = model.eval()([{"image": image}])[0]["instances"]
    torch.save([type(model).__name__, found.pred_boxes.tensor, found.scores, found.pred_classes], folder + "/found.pth")
"""


def flat(node: CfgNode, prefix: str = "") -> dict:
    values = {}
    for key, value in node.items():
        values.update(flat(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else {prefix + key: value})
    return values


@pytest.mark.parametrize("name", ["retinanet_R50", "crosskd_retinanet_R18", "fgd_retinanet_R50"])
def test_detectron2_reads_the_values_of_the_run(tmp_path: Path, name: str) -> None:
    cfg = load_config(str(CONFIGS / f"{name}.yaml"))
    (tmp_path / "student.yaml").write_text(yaml_student(cfg, "weights.pth").dump(default_flow_style=None))
    stock = get_cfg()
    stock.merge_from_file(str(tmp_path / "student.yaml"))
    ours, theirs = flat(cfg), flat(stock)
    changed = {key: value for key, value in theirs.items() if value != ours[key]}
    assert changed.keys() <= {"MODEL.META_ARCHITECTURE", "MODEL.WEIGHTS", "OUTPUT_DIR"}
    assert (stock.MODEL.META_ARCHITECTURE, stock.MODEL.WEIGHTS) == ("RetinaNet", "weights.pth")
    assert len((tmp_path / "student.yaml").read_text().splitlines()) < 100  # what differs, not all that there is


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ("demo_student.yaml", "build_extra_fpn_backbone"),
        ("crosskd_gfl_R18.yaml", "GFL, build_extra_fpn_backbone"),
        ("retinanet_lite0.yaml", "build_timm_fpn_backbone"),
        ("lazy/gfl_R18.py", "GFL, make_resnet, ExtraLevels, GFLHead"),
        ("lazy/retinanet_lite0.py", "TimmBackbone"),
    ],
)
def test_parts_that_detectron2_does_not_have_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, config: str, part: str
) -> None:
    path = str(CONFIGS / config)
    recipe = load_lazy(path, [], True) if path.endswith(".py") else to_recipe(load_config(path))
    with caplog.at_level(logging.INFO, "d2kd"):
        write_student(recipe.config, str(tmp_path))
    assert not list(tmp_path.iterdir())
    assert f"No {STUDENT_FILE}: detectron2 without d2kd has no {part}" in caplog.text


def test_a_lazy_config_keeps_no_key_of_d2kd(tmp_path: Path) -> None:
    write_student(load_lazy(str(LAZY), [], False).config, str(tmp_path))
    loaded = LazyConfig.load(str(tmp_path / STUDENT_FILE))
    assert located(loaded.model._target_) is RetinaNet
    text = (tmp_path / STUDENT_FILE).read_text()
    assert not [word for word in ("d2kd", "teacher", "methods", "ema_decay", "preflight", "bfloat16") if word in text]
    assert loaded.train.init_checkpoint == str(tmp_path / "model_final.pth")
    assert loaded.dataloader.test.dataset.names == "coco_2017_val"


def save_run(folder: Path, config: Any, model: nn.Module) -> None:
    """What a run leaves, with random weights and those of an adapter."""
    folder.mkdir()
    nn.init.normal_(model.head.cls_score.weight, std=0.1)
    state = {**model.state_dict(), "distill.pkd.adapters.0.weight": torch.ones(1)}
    torch.save({"model": state, "iteration": 1}, folder / "model_final.pth")
    write_student(config, str(folder))


@pytest.mark.slow
def test_detectron2_alone_detects_the_same(tmp_path: Path) -> None:
    yaml_cfg = load_config(str(YAML), SMALL)
    lazy_cfg = load_lazy(str(LAZY), LAZY_SMALL, False).config
    plain = load_lazy(str(LAZY), LAZY_SMALL, True).config
    save_run(tmp_path / "yaml", yaml_cfg, build_model(load_config(str(YAML), SMALL, with_teacher=False)))
    save_run(tmp_path / "lazy", lazy_cfg, instantiate(plain.model))
    image = 255 * torch.rand(3, 96, 128)
    torch.save(image, tmp_path / "image.pth")
    command: List[str] = [sys.executable, "-c", STOCK, str(tmp_path / "yaml"), str(tmp_path / "lazy")]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    for folder, config, opts in (("yaml", YAML, SMALL), ("lazy", LAZY, LAZY_SMALL)):
        name, *found = torch.load(tmp_path / folder / "found.pth")
        detector = load_detector(str(config), str(tmp_path / folder / "model_final.pth"), opts)
        expected = detector([{"image": image}])[0]["instances"]
        assert (name, type(detector).__name__) == ("RetinaNet", "DistillRetinaNet")
        assert len(expected) > 5
        wanted = (expected.pred_boxes.tensor, expected.scores, expected.pred_classes)
        assert all(torch.equal(one, two) for one, two in zip(found, wanted))
