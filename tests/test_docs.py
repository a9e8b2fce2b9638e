"""Every link, path and config that the documents name exists; the commands' help runs."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "datasets" / "README.md"]
PATH = re.compile(
    r"(?<![\w/.])((?:configs|tools|d2kd|tests|docs|datasets|scripts)/[\w./-]+\.(?:yaml|py|md|png|svg|sh))"
)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_paths_exist(page):
    text = page.read_text()
    links = [page.parent / link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    named = [ROOT / path for path in PATH.findall(text)]
    # docs/custom_data.md lets the user write the files my_*.yaml.
    missing = [path for path in [*links, *named] if not path.exists() and not path.name.startswith("my_")]
    assert not missing


TOOLS = [f"tools/{path.name}" for path in (ROOT / "tools").glob("*.py")]


@pytest.mark.parametrize(
    "script", [pytest.param("train_net.py", marks=pytest.mark.slow), "datasets/prepare_bccd.py", *TOOLS]
)
def test_help_runs_and_is_clean(script):
    done = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "usage:" in done.stdout
    assert "Warning" not in done.stderr, done.stderr


@pytest.mark.parametrize("script", ["datasets/prepare_bccd.py", *TOOLS])
def test_help_does_not_wait_for_imports(script):
    """The parser of train_net.py is detectron2's, which needs torch."""
    run = f"import runpy, sys; sys.argv = ['x', '--help']; runpy.run_path({str(ROOT / script)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", run], capture_output=True, text=True)
    assert "usage:" in done.stdout
    assert "torch" not in done.stderr


def test_readme_is_short_and_has_the_commands():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 90
    for command in (
        "make demo\nmake test\n",
        "python train_net.py --config-file configs/crosskd_retinanet_R18.yaml --num-gpus 8\n",
        "python tools/distill.py --train-data ",
        "--eval-only MODEL.WEIGHTS ",
        "python train_net.py --config-file configs/lazy/",
    ):
        assert command in text


def test_numbers_of_the_readme_are_those_of_the_recipes():
    readme, methods = (ROOT / "README.md").read_text(), (ROOT / "docs" / "methods.md").read_text()
    rows = re.findall(r"^\| `(\w+)\.yaml` \| [^|]+ \| (.+?) \| (.+) \|$", readme, re.MULTILINE)
    assert len(rows) == 7
    for config, published, costs in rows:
        assert re.search(rf"^\|.*`{config}`.* \| {re.escape(costs)} \|$", methods, re.MULTILINE), config
        assert published == "—" or re.search(rf"^\| `{config}` \|.* \| {published} \|", methods, re.MULTILINE), config


def test_every_option_is_on_its_page():
    """`python scripts/options.py` writes the page."""
    pytest.importorskip("griffe")
    script = runpy.run_path(str(ROOT / "scripts" / "options.py"))
    text = (ROOT / "docs" / "options.md").read_text()
    assert text == script["page"]()
    keys = [key for key, _ in script["new_keys"]()]
    assert {"MODEL.FCOS.CLIP_BEFORE_NMS", "MODEL.DISTILL.CROSSKD.CUT", "SOLVER.ACCUMULATE"} <= {*keys}
    assert [key for key in keys if f"\n| `{key.rpartition('.')[2]}` | `" not in text] == []


def test_every_method_has_a_citation():
    from d2kd.methods import method_names

    text = (ROOT / "docs" / "citations.md").read_text()
    entries = dict(re.findall(r"^## (\w+)\n\n```bibtex\n(.*?)```", text, re.MULTILINE | re.DOTALL))
    assert entries.keys() >= {*method_names()}
    methods = (ROOT / "docs" / "methods.md").read_text()
    numbers = [re.search(r"eprint += {([\d.]+)}", entry).group(1) for entry in entries.values()]
    assert [number for number in numbers if f"arxiv.org/abs/{number}" not in methods] == []


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    """Strictly: a link to nothing, or a page that the navigation does not have, is an error."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "CLIP_BEFORE_NMS" in (tmp_path / "options.html").read_text()
    assert "loads into stock detectron2" in (tmp_path / "index.html").read_text()
    assert (tmp_path / "d2kd" / "meta_arch.py").is_file()  # pages link to it
    api = (tmp_path / "api.html").read_text()
    assert "Makes a student out of a detector" in api
    assert ":func:" not in api
