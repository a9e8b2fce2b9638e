"""Every link, path and config that the documents name exists; the commands' help runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "datasets" / "README.md"]
PATH = re.compile(r"(?<![\w/.])((?:configs|tools|d2kd|tests|docs|datasets|scripts)/[\w./-]+\.(?:yaml|py|md|png|sh))")


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
