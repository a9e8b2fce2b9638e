"""tools/benchmark.py measures any config, compares with an earlier run, and shows growth."""

import json
import runpy
import sys

import pytest
import torch
from small import CONFIGS

SMALL = ["--config-file", str(CONFIGS / "quick_crosskd_retinanet.yaml"), "--size", "64", "96", "--repeats", "1"]


@pytest.fixture
def benchmark(monkeypatch):
    def run(*options):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", "--device", "cpu", *map(str, options)])
        return runpy.run_path(str(CONFIGS.parent / "tools" / "benchmark.py"))["main"]()

    yield run
    torch.set_flush_denormal(False)


@pytest.mark.slow
def test_it_compares_and_grows(benchmark, tmp_path, capsys):
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    assert benchmark(*SMALL, "--json", before) == 0
    wanted = {"step / floor", "kept for distilling (MiB)", "peak of teacher forward (MiB)", "images per second"}
    assert wanted <= json.loads(before.read_text())["result"].keys()
    capsys.readouterr()
    more = ["--growth", "classes=9", "boxes=40", "--", "MODEL.DISTILL.TEACHER.DTYPE", "bfloat16"]
    assert benchmark(*SMALL, "--compare", before, "--json", after, *more) == 0
    shown = capsys.readouterr().out
    assert "| before" in shown
    kept = {name: x["kept by the plain step (MiB)"] for name, x in json.loads(after.read_text())["growth"].items()}
    assert kept["classes 9"] > json.loads(before.read_text())["result"]["kept by the plain step (MiB)"]
    assert "| boxes 40" in shown


@pytest.mark.parametrize("wrong", [["--compare", "none.json"], ["--growth", "classes=x"]])
def test_a_mistake_is_told(benchmark, wrong, capsys):
    assert benchmark(*SMALL, *wrong) == 2
    assert f"{wrong[0]} {wrong[1]}" in capsys.readouterr().err
