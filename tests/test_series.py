"""Series of runs: what is started, what is not started again, what is refused, and the table."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from d2kd.errors import D2kdError
from d2kd.experiments.pictures import draw_curves, draw_grid
from d2kd.experiments.series import Run, run_all, spread, table

# Stands for train_net.py: writes what a run leaves in its folder, with an AP of ten times the seed.
SCRIPT = """
import json, pathlib, shutil, sys
folder, seed = pathlib.Path(sys.argv[1]), int(sys.argv[2])
if seed == 9:
    sys.exit("the disk burns")
records = [{"iteration": 0, "time": 0.5, "total_loss": 1.0}, {"iteration": 1, "time": 0.5, "bbox/AP": 10.0 * seed}]
records[-1].update({"bbox/AP50": 50.0, "bbox/AP-cell": 1.0})
(folder / "metrics.json").write_text("\\n".join(map(json.dumps, records)))
shutil.copy(folder.parent / "weights.pth", folder / "model_final.pth")
with (folder / "starts").open("a") as file:
    file.write("x")
"""


@pytest.fixture(autouse=True)
def _weights(tmp_path):
    torch.save({}, tmp_path / "weights.pth")


class Fake(Run):
    def command(self):
        return [sys.executable, "-c", SCRIPT, str(self.folder), str(self.seed)]


def make(tmp_path, label, seed, **options):
    return Fake(label, "configs/demo_student.yaml", tmp_path / f"{label}{seed}", seed, 2, "bccd", **options)


def test_runs_once_and_tells_a_table(tmp_path, capsys):
    runs = [make(tmp_path, label, seed) for label in ("plain", "other") for seed in (1, 3)]
    called = []
    run_all(runs, jobs=2, after_each=lambda: called.append(1))
    assert len(called) == 4
    assert all(run.threads >= 1 for run in runs)
    again = [make(tmp_path, label, seed) for label in ("plain", "other") for seed in (1, 3)]
    run_all(again)
    assert all((run.folder / "starts").read_text() == "x" for run in runs)
    assert "[4/4] other (seed 3): already done, AP 30.0" in capsys.readouterr().out
    row = next(line for line in table(again).splitlines() if line.startswith("| plain"))
    assert [cell.strip() for cell in row.split("|")[2:4]] == ["2", "20.0 ± 14.1"]
    assert "10.0 / 30.0" in row
    assert again[0].row()["training s"] == 1.0


def test_remains_of_another_run_are_refused(tmp_path):
    run_all([make(tmp_path, "plain", 1)])
    with pytest.raises(D2kdError, match="has a run with different settings"):
        run_all([make(tmp_path, "plain", 1, overrides={"SOLVER.BASE_LR": 0.1})])


def test_a_failure_shows_the_end_of_the_log(tmp_path):
    with pytest.raises(D2kdError, match=r"plain \(seed 9\) failed(.|\n)*the disk burns"):
        run_all([make(tmp_path, "plain", 9), make(tmp_path, "plain", 1)], jobs=2)


def test_the_real_command_names_everything(tmp_path):
    run = Run("x", "configs/demo_crosskd.yaml", tmp_path, 3, 40, "bccd", {"MODEL.DISTILL.PKD.WEIGHT": 2.0})
    text = " ".join(run.command())
    for words in ("--resume", "SEED 3", "SOLVER.MAX_ITER 40", "('bccd_val',)", "MODEL.DISTILL.PKD.WEIGHT 2.0"):
        assert words in text
    assert json.loads(json.dumps(run.settings())) == run.settings()


def test_spread():
    assert spread([1.0]) == "1.0"
    assert spread([1.0, 3.0], 2) == "2.00 ± 1.41"


@pytest.mark.slow
def test_pictures_are_drawn(tmp_path):
    run = make(tmp_path, "plain", 1)
    run_all([run])
    image = {"id": 1, "file_name": "a.png", "width": 40, "height": 30}
    box = {"image_id": 1, "category_id": 3, "bbox": [4, 5, 20, 10], "score": 0.9}
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    truth = {"images": [image], "categories": [{"id": 3, "name": "cell"}], "annotations": [box]}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "found.json").write_text(json.dumps([box, {**box, "score": 0.1}]))
    draw_curves({"plain": run.folder}, tmp_path / "curves.png")
    draw_grid(tmp_path / "truth.json", tmp_path, {"plain": tmp_path / "found.json"}, tmp_path / "grid.png")
    for name in ("curves.png", "grid.png"):
        assert np.asarray(Image.open(tmp_path / name)).std() > 0
