"""The code in docs/python_api.md and README.md runs, from the first block to the last, as a reader would type it."""

import re
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from small import CONFIGS

import d2kd

PAGE = (CONFIGS.parent / "docs" / "python_api.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
README = (CONFIGS.parent / "README.md").read_text()


@pytest.mark.slow
def test_the_page_runs(
    blood_cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(CONFIGS)
    detector = build_model(d2kd.load_config("configs/demo_teacher.yaml"))
    torch.save({"model": detector.state_dict()}, "teacher.pth")
    assert len(BLOCKS) == 7
    page: dict = {}
    for block in BLOCKS:
        exec(compile(block.replace("num_images=300", "num_images=12"), "python_api.md", "exec"), page)
    assert "loss_crosskd_cls" in capsys.readouterr().out  # the dry run
    assert page["losses"]["loss_pkd_feature"] > 0
    saved = torch.load("student.pth")
    assert saved.keys() == page["plain"].state_dict().keys()
    assert "loss_crosskd_cls" in page["student"](page["batch"])
    check_readme(page["batch"])


def check_readme(batch: list) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {"batch": batch}
    Path("student.pth").unlink()
    exec(compile(block, "README.md", "exec"), names)
    assert {"loss_cls", "loss_crosskd_cls", "loss_pkd_feature"} <= names["losses"].keys()
    assert torch.load("student.pth").keys() == names["detector"].state_dict().keys()
