"""The report of runs: what its page holds, what it draws, and what a browser shows."""

import base64
import io
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import pytest
from PIL import Image
from report_runs import make_runs
from small import CONFIGS

from d2kd.errors import D2kdError
from d2kd.experiments.demo import Demo
from d2kd.report import find_runs, write_report
from d2kd.report.charts import COLORS, bar_chart, line_chart
from d2kd.report.page import MISSING
from d2kd.report.runs import ReportRun

VOID = ("meta", "link", "img")
EVIL = '<script>alert("$x$")</script><img src=x onerror=alert(1)>'
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """The elements and texts of a page; asserts that every element is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: List[Tuple[str, Dict[str, Optional[str]]]] = []
        self.texts: List[Tuple[str, str]] = []  # (innermost element, text)
        self._open: List[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self._open[-1] if self._open else "", data.strip()))

    def all(self, tag: str) -> List[Dict[str, Optional[str]]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def texts_of(self, tag: str) -> List[str]:
        return [text for name, text in self.texts if name == tag]

    def pictures(self, kind: str) -> List[np.ndarray]:
        sources = [str(image["src"]) for image in self.all("img")]
        head = f"data:image/{kind};base64,"
        return [_decode(source[len(head) :]) for source in sources if source.startswith(head)]


def _decode(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))


@pytest.fixture(scope="module")
def runs(blood_cells: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_runs(tmp_path_factory.mktemp("report") / "runs", blood_cells)


@pytest.fixture(scope="module")
def file(runs: Path) -> Path:
    return write_report(find_runs([str(runs)]), runs.parent / "report.html", num_images=2, latency_seconds=0.0)


@pytest.fixture(scope="module")
def page(file: Path) -> Page:
    return Page(file)


@pytest.mark.slow
def test_the_page_is_complete_and_needs_no_other_file(page: Page) -> None:
    expected = ["Results", "AP", "Losses", "Classes and sizes", "Distillation", "Detections on blood_cells_val"]
    assert page.texts_of("h2") == [*expected, "Features and scores: crosskd", "Configs and commands"]
    assert not page.all("script")
    links = [x[key] for _, x in page.elements for key in ("src", "href") if x.get(key)]
    assert all(str(link).startswith(("data:", "#")) for link in links)
    assert not re.search(r"url\((?!#)", page.source)
    assert "prefers-color-scheme: dark" in page.source
    assert any("width=device-width" in str(meta.get("content")) for meta in page.all("meta"))
    assert "python train_net.py --config-file configs/crosskd.yaml" in page.source
    assert "MODEL.DISTILL.METHODS" in page.texts_of("td")


@pytest.mark.slow
def test_the_table_has_a_row_for_each_label_with_the_spread_over_seeds(page: Page, runs: Path) -> None:
    head, cells = page.texts_of("th"), page.texts_of("td")
    width = head.index("s/step") + 2  # the first column has no name
    assert "APl" not in head  # none of the images holds a large object
    rows = {cells[i]: cells[i + 1 : i + width] for i in range(0, 3 * width, width)}
    assert list(rows) == ["teacher", "student", "crosskd"]
    ap = [ReportRun("", runs / f"student_seed{seed}").evaluations[-1]["bbox/AP"] for seed in (1, 2)]
    mean, deviation = sum(ap) / 2, abs(ap[0] - ap[1]) / 2**0.5
    assert rows["student"][:2] == ["2", f"{mean:.1f} ± {deviation:.1f}"]
    assert rows["teacher"][-1] == "0.250"
    assert rows["student"][head.index("parameters")] == rows["crosskd"][head.index("parameters")] != MISSING


@pytest.mark.slow
def test_pictures_show_boxes_and_maps(page: Page) -> None:
    photos, maps = page.pictures("jpeg"), page.pictures("png")
    assert len(photos) == 2 * 4  # ground truth and three labels
    blue = np.array([int(COLORS[0][i : i + 2], 16) for i in (1, 3, 5)])
    for photo in photos:
        assert photo.shape[1] == 480
        assert (np.abs(photo.astype(int) - blue).sum(2) < 60).sum() > 100  # red cells' boxes
    assert len(maps) == 2 * 5  # two features and three scores
    assert all(found.std() > 5 for found in maps)
    assert len({found.tobytes() for found in maps}) == 10


def svgs(source: str) -> List[ElementTree.Element]:
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", source, re.DOTALL)]


def paths(svg: ElementTree.Element, color: str) -> List[List[Tuple[float, float]]]:
    """Points of each path that is stroked or filled with a color."""
    found = []
    for path in svg.iter("{http://www.w3.org/2000/svg}path"):
        if f"stroke: {color}" in path.get("style", "") or f"fill: {color}" in path.get("style", ""):
            numbers = [float(x) for x in re.findall(r"-?\d+\.?\d*", path.get("d", ""))]
            found.append(list(zip(numbers[::2], numbers[1::2])))
    return found


@pytest.mark.slow
def test_charts_take_text_and_lines_from_the_page(page: Page) -> None:
    charts = svgs(page.source)
    assert len(charts) == 8
    for chart in charts:
        text = ElementTree.tostring(chart, encoding="unicode")
        assert "currentColor" in text
        assert "var(--line)" in text
        assert "#000000" not in text
        assert chart.get("aria-label")


def test_lines_go_through_the_points() -> None:
    (chart,) = svgs(
        line_chart([("a", [(0, 1), (10, 3), (20, 2)]), ("b", [(0, 2), (20, 0)]), ("a", [(0, 0)])], "x", "y")
    )
    first, *_ = paths(chart, COLORS[0])
    (x0, y0), (x1, y1), (x2, y2) = first[:3]
    assert x1 - x0 == pytest.approx(x2 - x1, rel=1e-3)
    assert (y0 - y1) == pytest.approx(2 * (y2 - y1), rel=1e-3)  # down is positive
    ((b0, b1),) = [line for line in paths(chart, COLORS[1]) if abs(line[0][0] - x0) < 1e-3][:1]
    assert b0[1] == pytest.approx(y2, abs=1e-3)
    assert b1[0] == pytest.approx(x2, abs=1e-3)
    assert line_chart([("a", [])], "x", "y") == ""


def test_bars_are_as_long_as_their_values() -> None:
    (chart,) = svgs(bar_chart({"small": {"a": 10.0, "b": 30.0}, "large": {"a": 20.0}}, "AP"))
    long = sorted(max(x for x, _ in bar) - min(x for x, _ in bar) for bar in paths(chart, COLORS[0]))[-2:]
    other = max(max(x for x, _ in bar) - min(x for x, _ in bar) for bar in paths(chart, COLORS[1]))
    assert [long[0] / long[1], other / long[1]] == pytest.approx([0.5, 1.5], rel=1e-3)


def test_seconds_are_those_of_training(tmp_path: Path) -> None:
    lines = ['{"iteration": 9, "time": 0.5, "total_loss": 1}', '{"iteration": 19, "time": 1.0, "total_loss": NaN}']
    (tmp_path / "metrics.json").write_text("\n".join(lines))
    run = ReportRun("x", tmp_path)
    assert run.seconds([(9, 1.0), (14, 2.0), (19, 3.0), (20, 4.0)]) == [
        (5.0, 1.0),
        (10.0, 2.0),
        (15.0, 3.0),
        (15.0, 4.0),
    ]
    assert run.own_loss() == [(9, 0)]


@pytest.mark.slow
def test_nothing_in_a_run_becomes_markup(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "inference" / EVIL.replace("/", "")).mkdir(parents=True)
    (run / "inference" / EVIL.replace("/", "") / "coco_instances_results.json").write_text("[]")
    record = {"iteration": 1, "bbox/AP": 1, f"bbox/AP-{EVIL}": 2, f"loss_{EVIL}": 1, "total_loss": 1}
    (run / "metrics.json").write_text(json.dumps(record))
    (run / "commands.txt").write_text(EVIL)
    (run / "run.json").write_text(json.dumps({"MODEL.DISTILL.METHODS": ["PKD"], "X": EVIL}))
    page = Page(write_report([(EVIL, run), ("_b", run)], tmp_path / "report.html", title=EVIL))
    assert not page.all("script")
    assert not page.all("img")
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert page.texts_of("h1") == [EVIL]
    assert any(EVIL in text for text in page.texts_of("text"))
    assert svgs(page.source)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.json").write_text('{"iteration": 1, "total_loss": 1, "loss_cls": 1}')
    page = Page(write_report([("a", tmp_path / "run")], tmp_path / "deep" / "report.html"))
    assert "run.json is missing" in page.texts_of("pre")
    assert len(svgs(page.source)) == 1


@pytest.mark.slow
def test_a_data_set_that_is_not_registered(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "crosskd_seed1", tmp_path / "run")
    (run / "inference" / "blood_cells_val").rename(run / "inference" / "elsewhere")
    (run / "model_final.pth").unlink()
    page = Page(write_report([("a", run)], tmp_path / "report.html"))
    assert "No pictures: the data set elsewhere is not registered in this process." in page.texts_of("p")


@pytest.mark.slow
def test_a_teacher_that_is_gone(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "crosskd_seed1", tmp_path / "run")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(runs / "teacher" / "model_final.pth"), "gone.pth"))
    page = Page(write_report([("a", run)], tmp_path / "report.html", num_images=1, latency_seconds=0.0))
    assert any(text.startswith("Not shown: ") and "gone.pth" in text for text in page.texts_of("p"))
    assert len(page.pictures("jpeg")) == 2


@pytest.mark.slow
def test_runs_are_found_and_named(runs: Path, tmp_path: Path) -> None:
    found = find_runs([str(runs)])
    assert [label for label, _ in found] == ["teacher", "student", "student", "crosskd"]
    assert find_runs([f"mine={runs / 'teacher'}"]) == [("mine", runs / "teacher")]
    with pytest.raises(D2kdError, match="holds no run"):
        find_runs([str(tmp_path)])
    with pytest.raises(D2kdError, match="holds no metrics"):
        write_report([("a", tmp_path)], tmp_path / "report.html")
    with pytest.raises(D2kdError, match="needs a run"):
        write_report([], tmp_path / "report.html")


@pytest.mark.slow
def test_a_run_with_a_lazy_config(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "crosskd_seed1", tmp_path / "run")
    words = ["cd", str(CONFIGS.parent), "&&", "python", "train_net.py", "--config-file"]
    words += [
        "configs/lazy/quick_crosskd_retinanet.py",
        f"model.teacher.weights={runs / 'student_seed1/model_final.pth'}",
    ]
    (run / "commands.txt").write_text(f"{' '.join(words)}  # 2026-01-01 12:00:00\n")
    methods = [{"_target_": "d2kd.methods.crosskd.CrossKD", "cut": 1}]
    (run / "run.json").write_text(json.dumps({"model.methods": methods, "train.seed": 1}))
    page = Page(write_report([("lazy", run)], tmp_path / "report.html", num_images=1, latency_seconds=0.0))
    assert "Features and scores: lazy" in page.texts_of("h2")
    assert len(page.pictures("png")) == 5
    assert any(text.endswith(" G") for text in page.texts_of("td"))


@pytest.mark.parametrize("script", ["train_net.py", "own.py --own-flag"])
def test_a_lazy_run_on_own_data_keeps_its_classes(tmp_path: Path, script: str) -> None:
    command = f"python {script} --config-file c.py --train-data a.json:b --val-split 0.1 train.max_iter=2"
    (tmp_path / "commands.txt").write_text(f"cd /d2kd && {command}  # 2026-01-01 12:00:00\n")
    (tmp_path / "run.json").write_text('{"model.num_classes": 1}')
    assert ReportRun("x", tmp_path).config == ("/d2kd/c.py", ["train.max_iter=2", "model.num_classes=1"])


def test_methods_of_both_styles(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"model.methods": [{"_target_": "d2kd.methods.crosskd.CrossKD", "cut": 1}]}')
    assert ReportRun("x", tmp_path).methods == ["CrossKD"]


@pytest.mark.slow
def test_the_demo_ends_with_a_report(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for other in ("draw_curves", "draw_grid"):
        monkeypatch.setattr(f"d2kd.experiments.demo.{other}", lambda *_: None)
    monkeypatch.setattr("d2kd.experiments.demo.costs_of", lambda *_: {})
    demo = Demo(output=str(runs))
    demo._report([demo._make_run(kind, 1, 200) for kind in ("teacher", "student", "crosskd")])
    assert f"wrote {runs / 'report.html'}" in capsys.readouterr().out
    page = Page(runs / "report.html")
    labels = ["teacher", "student", "student + CrossKD"]
    assert page.texts_of("figcaption").count(labels[2]) == 4
    assert [text for text in page.texts_of("td") if text in labels] == labels
    assert any(text.endswith(" ms") for text in page.texts_of("td"))


def browse(url: str, folder: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    command = [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder / 'profile'}", "--allow-file-access-from-files", "--enable-logging=stderr"]
    command += ["--virtual-time-budget=2000", *options, url]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed; the other tests read the page without one")
def test_a_browser_shows_it_in_light_and_dark_and_on_a_phone(file: Path, tmp_path: Path) -> None:
    papers = {"light": (1, [255, 255, 255]), "dark": (0, [0x12, 0x16, 0x1C])}
    for name, (scheme, paper) in papers.items():
        picture = tmp_path / f"{name}.png"
        options = [f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1200,1600"]
        done = browse(file.as_uri(), tmp_path, *options, f"--screenshot={picture}")
        assert "CONSOLE" not in done.stderr, done.stderr
        seen = np.asarray(Image.open(picture).convert("RGB")).astype(int)
        assert seen[2, 2].tolist() == paper
        for color in COLORS[:3]:  # the lines of the three labels
            rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
            assert (np.abs(seen - rgb).sum(2) < 40).sum() > 100, (name, color)
    frame = tmp_path / "phone.html"
    frame.write_text(
        f'<iframe src="{file.as_uri()}" width="390" height="800" onload="document.title = '
        '[this.contentDocument.documentElement.scrollWidth, this.contentDocument.images.length]"></iframe>'
    )
    title = re.search(r"<title>(.*)</title>", browse(frame.as_uri(), tmp_path, "--dump-dom").stdout)
    assert title is not None
    width, images = map(int, title[1].split(","))
    assert width <= 390
    assert images == 2 * 4 + 2 * 5


def test_an_axis_over_less_than_a_decade_is_linear() -> None:
    """A logarithmic one from 0.9 to 1.5 would show a single number."""
    for values, numbers in (((0.9, 1.5), 4), ((0.1, 50.0), 6)):
        chart = line_chart([("a", list(enumerate(values)))], "x", "y", log=True)
        labels = re.findall(r">([\d.]+)</text>", chart[chart.index('id="matplotlib.axis_2"') :])
        assert len(labels) >= numbers, labels
