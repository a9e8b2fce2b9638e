"""Comparisons: rows, the runs they make, pseudo-labels, statistics, and the whole with runs that pretend to train."""

import csv
import json
import math
import sys
from argparse import Namespace

import pytest
import torch
from small import CONFIGS, save_teacher

from d2kd.errors import D2kdError
from d2kd.experiments import comparison
from d2kd.experiments import costs as costs_module
from d2kd.experiments.comparison import Comparison, from_arguments
from d2kd.experiments.pseudo_labels import add_pseudo_labels
from d2kd.experiments.rows import parse_row
from d2kd.experiments.series import Run
from d2kd.experiments.statistics import paired_difference

# Stands for train_net.py: an AP of ten times the seed, one more with methods; a step takes twice as long with methods.
SCRIPT = """
import json, pathlib, shutil, sys
folder, seed, distills, weights = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True", sys.argv[4]
time = 0.2 if distills else 0.1
records = [{"iteration": i, "time": time, "total_loss": 1.0, "bbox/AP": 10.0 * seed + i + distills} for i in range(3)]
records[-1].update({"bbox/AP50": 50.0, "bbox/APs": 1.0, "bbox/APm": 2.0, "bbox/APl": 3.0})
(folder / "metrics.json").write_text("\\n".join(map(json.dumps, records)))
shutil.copy(weights, folder / "model_final.pth")
"""


@pytest.mark.parametrize(
    ("text", "label", "options"),
    [
        ("plain", "plain", {}),
        ("same-time", "plain, same time", {}),
        ("CrossKD", "CrossKD", {"METHODS": ("CrossKD",)}),
        (
            "CrossKD+PKD PKD.WEIGHT=0.5",
            "CrossKD+PKD PKD.WEIGHT=0.5",
            {"METHODS": ("CrossKD", "PKD"), "PKD.WEIGHT": "0.5"},
        ),
        ("FGD INHERIT=neck,head", "FGD INHERIT=neck,head", {"METHODS": ("FGD",), "INHERIT": ("neck", "head")}),
    ],
)
def test_rows(text, label, options):
    row = parse_row(text)
    assert (row.label, row.options, row.distills) == (label, options, bool(options))
    assert not set(row.folder) & set(" ,+=/")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("CrosKD", "did you mean CrossKD.*plain, same-time, pseudo-labels"),
        ("PKD WEIGHT", "WEIGHT is not KEY=VALUE"),
        ("PKD PKD.WEIGHT=", "is not KEY=VALUE"),
    ],
)
def test_wrong_rows(text, message):
    with pytest.raises(D2kdError, match=message):
        parse_row(text)


def test_paired_difference():
    """Differences 1, 2, 3: mean 2, deviation 1; the interval is 4.303 / sqrt(3) wide on each side."""
    found = paired_difference([11.0, 22.0, 33.0], [10.0, 20.0, 30.0])
    assert found.mean == 2
    assert found.half_width == pytest.approx(4.303 / math.sqrt(3))
    assert str(found) == "+2.0 [-0.5, +4.5]"
    assert str(paired_difference([1.0], [2.0])) == "-1.0"


def test_pseudo_labels():
    """Of four detections one is new: the others repeat a label, have a low score, or lie elsewhere by class only."""
    label = {"id": 7, "image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10], "area": 100, "iscrowd": 0}
    truth = {"images": [{"id": 1}], "categories": [], "annotations": [label]}
    found = {"image_id": 1, "category_id": 1, "score": 0.9}
    detections = [
        {**found, "bbox": [1, 0, 10, 10]},
        {**found, "bbox": [50, 50, 10, 10], "score": 0.4},
        {**found, "bbox": [50, 50, 10, 20]},
        {**found, "bbox": [0, 0, 10, 10], "category_id": 2},
    ]
    content, count = add_pseudo_labels(truth, detections)
    assert count == 2
    assert [a["id"] for a in content["annotations"]] == [7, 8, 9]
    assert content["annotations"][1] == {
        **{"id": 8, "image_id": 1, "category_id": 1, "bbox": [50, 50, 10, 20], "area": 200, "iscrowd": 0}
    }
    assert content["annotations"][2]["category_id"] == 2
    assert len(truth["annotations"]) == 1


@pytest.fixture
def settings(tmp_path, monkeypatch):
    weights = save_teacher(tmp_path / "weights.pth")

    class Fake(Run):
        def command(self):
            distills = "CrossKD" in str(self.overrides.get("MODEL.DISTILL.METHODS"))
            return [sys.executable, "-c", SCRIPT, str(self.folder), str(self.seed), str(distills), str(weights)]

    monkeypatch.setattr(comparison, "Run", Fake)
    truth = {"images": [{"id": 1}], "categories": [], "annotations": []}
    (tmp_path / "train.json").write_text(json.dumps(truth))
    detection = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "score": 0.9}
    (tmp_path / "found.json").write_text(json.dumps([detection]))
    monkeypatch.setattr(comparison, "evaluate", lambda *_: tmp_path / "found.json")
    config = str(CONFIGS / "quick_retinanet.yaml")
    data = f"{tmp_path / 'train.json'}:{tmp_path}"
    teacher = str(CONFIGS / "demo_teacher.yaml")
    return {
        "student": config,
        "teacher": teacher,
        "train": data,
        "val": data,
        "output": str(tmp_path / "out"),
        "iterations": 10,
    }


@pytest.mark.slow
def test_the_whole(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(costs_module, "cost_columns", lambda config, weights, *_: {"GMACs": weights.parent.name})
    methods = ["CrossKD", "same-time", "plain", "pseudo-labels"]
    Comparison(**settings, methods=methods, seeds=2).run()
    said = capsys.readouterr().out
    assert "1 detections of the teacher are pseudo-labels" in said
    table = (tmp_path / "out" / "table.md").read_text()
    rows = {cells[1].strip(): cells for cells in (line.split("|") for line in table.splitlines())}
    assert list(rows)[2:] == ["teacher", "plain", "CrossKD", "plain + pseudo-labels", "plain, same time"]
    assert rows["CrossKD"][-2].strip() == "+1.0 [+1.0, +1.0]"
    assert rows["plain"][-2].strip() == ""
    assert "APs" in table
    assert rows["plain, same time"][3].strip() == "20", "of twice the iterations, since a step takes half the time"
    with (tmp_path / "out" / "runs.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 1 + 2 * 4
    assert (tmp_path / "out" / "curves.png").stat().st_size > 1000


def test_what_runs_are_told(settings):
    """A plain row of a distilling student has no methods; a row with methods has the teacher of the command line."""
    settings["student"] = str(CONFIGS / "quick_crosskd_retinanet.yaml")
    made = Comparison(**settings, weights="teacher.pth", teacher_opts=["A", "1"], distill_opts=["PKD.WEIGHT", "3"])
    plain, distilled = (made._student_run(parse_row(text), 1, 10).overrides for text in ("plain", "PKD INHERIT=head"))
    assert plain["MODEL.META_ARCHITECTURE"] == "RetinaNet"
    assert plain["MODEL.DISTILL.METHODS"] == "()"
    assert distilled["MODEL.META_ARCHITECTURE"] == "DistillRetinaNet"
    assert distilled["MODEL.DISTILL.METHODS"] == ("PKD",)
    assert distilled["MODEL.DISTILL.INHERIT"] == ("head",)
    assert distilled["MODEL.DISTILL.TEACHER.WEIGHTS"] == "teacher.pth"
    assert distilled["MODEL.DISTILL.TEACHER.OPTS"] == ["A", "1"]
    assert distilled["MODEL.DISTILL.PKD.WEIGHT"] == "3"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "/nowhere.pth"}, "/nowhere.pth is no file"),
        ({"student": "nothing.yaml"}, "nothing.yaml"),
        ({"methods": ["plain", "same-time"]}, "same-time needs the rows plain and one with methods"),
        ({"student": str(CONFIGS / "lazy" / "retinanet_R18.py")}, "takes YAML configs"),
        ({"student_opts": ["A"]}, "overrides come in pairs"),
    ],
)
def test_mistakes(settings, changes, message):
    with pytest.raises(D2kdError, match=message):
        Comparison(**{**settings, **changes}).run()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": "", "data": ["train=a.json:b", "val=c.json:d"]}, "without --student there are only"),
        ({"data": ["bccd"]}, "--data takes train=annotations.json:images val="),
        ({"data": ["train=a.json", "val=c.json:d"]}, "--data takes train="),
        ({"teacher": ""}, "--student needs a --teacher"),
    ],
)
def test_arguments_that_do_not_fit(changes, message):
    given = {"student": "s.yaml", "teacher": "t.yaml", "data": ["train=a.json:b", "val=c.json:d"], **changes}
    with pytest.raises(D2kdError, match=message):
        from_arguments(Namespace(**given))


def test_arguments(tmp_path, monkeypatch):
    """Files are found wherever the command starts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.pth").write_text("")
    given = {"student": "s.yaml", "data": ["train=a.json:b", "val=c.json:d"], "methods": ["plain"], "seeds": 2}
    made = from_arguments(Namespace(**given, teacher="t.yaml:t.pth", output=""))
    assert (made.train, made.val) == (f"{tmp_path}/a.json:{tmp_path}/b", f"{tmp_path}/c.json:{tmp_path}/d")
    assert (made.teacher, made.weights) == ("t.yaml", f"{tmp_path}/t.pth")
    assert (made.methods, made.seeds, made.output) == (["plain"], 2, "output/comparison")


@pytest.mark.slow
def test_costs(tmp_path, monkeypatch):
    monkeypatch.setattr(costs_module, "SECONDS", 0.01)
    weights = save_teacher(tmp_path / "weights.pth")
    config = tmp_path / "config.yaml"
    quick = CONFIGS / "quick_retinanet.yaml"
    config.write_text(f'_BASE_: "{quick}"\nMODEL: {{RETINANET: {{SCORE_THRESH_TEST: 0.0}}}}\n')
    found = costs_module.cost_columns(str(config), weights, tmp_path / "costs.json")
    costs = json.loads((tmp_path / "costs.json").read_text())
    assert found == {"GMACs": f"{costs['macs'] / 1e9:.2f}", "params": f"{costs['parameters'] / 1e6:.2f} M"} | {
        "latency ms": f"{costs['latency_ms']:.0f}"
    }
    assert costs["size"] == [128, 256]
    assert costs["threads"] == torch.get_num_threads()
    (tmp_path / "costs.json").write_text(json.dumps({**costs, "macs": 5e9}))
    assert costs_module.cost_columns(str(config), weights, tmp_path / "costs.json")["GMACs"] == "5.00", "measured once"
