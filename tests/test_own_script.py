"""The scripts in docs/own_script.md train."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small import CONFIGS, build, save_teacher, small_config

SCRIPTS = re.findall(r"```python\n(.*?)```", (CONFIGS.parent / "docs" / "own_script.md").read_text(), re.DOTALL)


def run(script: str, monkeypatch: pytest.MonkeyPatch, *args: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, args)])
    exec(compile(script, "own_script.md", "exec"), {"__name__": "own_script"})


def test_scripts_are_short() -> None:
    assert len(SCRIPTS) == 2
    assert max(len([line for line in script.splitlines() if line.strip()]) for script in SCRIPTS) <= 21


@pytest.mark.slow
def test_default_trainer(blood_cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opts = ["MODEL.DISTILL.TEACHER.WEIGHTS", save_teacher(tmp_path / "teacher.pth"), "OUTPUT_DIR", tmp_path / "run"]
    opts += ["SOLVER.MAX_ITER", 2, "DATASETS.TEST", "()", "DATALOADER.NUM_WORKERS", 0, "MODEL.DEVICE", "cpu"]
    run(SCRIPTS[0], monkeypatch, CONFIGS / "quick_crosskd_retinanet.yaml", *opts)
    saved = torch.load(tmp_path / "run" / "model_final.pth")
    assert saved["iteration"] == 1
    assert saved["model"].keys() == build(small_config()).state_dict().keys()
    (record,) = map(json.loads, (tmp_path / "run" / "metrics.json").read_text().splitlines())
    assert record["loss_crosskd_cls"] > 0


@pytest.mark.slow
def test_lazy_loop(blood_cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opts = [f"model.teacher.weights={save_teacher(tmp_path / 'teacher.pth')}", "train.max_iter=2"]
    run(SCRIPTS[1], monkeypatch, CONFIGS / "lazy" / "quick_crosskd_retinanet.py", *opts, f"train.output_dir={tmp_path}")
    assert torch.load(tmp_path / "model_final.pth")["iteration"] == 1


def test_a_missing_teacher_shows_before_training(
    blood_cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opts = ["MODEL.DISTILL.TEACHER.WEIGHTS", tmp_path / "gone.pth", "OUTPUT_DIR", tmp_path / "run"]
    with pytest.raises(ValueError, match=r"gone\.pth"):
        run(SCRIPTS[0], monkeypatch, CONFIGS / "quick_crosskd_retinanet.yaml", *opts, "MODEL.DEVICE", "cpu")
    assert not list((tmp_path / "run").glob("*.pth"))
