"""Setting up: what it refuses, and what a user without detectron2 reads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def setup(**variables):
    environment = {**os.environ, "PYTHON": sys.executable, **variables}
    return subprocess.run(["bash", ROOT / "scripts" / "setup.sh"], env=environment, capture_output=True, text=True)


def test_without_detectron2_one_sentence_says_how_to_get_it():
    code = "import sys; sys.modules['detectron2'] = None; import d2kd"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.strip().splitlines()[-1].startswith("ImportError: d2kd needs detectron2")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"DETECTRON2": "newest"}, "use registry or official"),
        ({"PYTHON": "/no/python"}, "name one with: make setup PYTHON="),
        ({"VENV": str(ROOT / "docs")}, "is no virtual environment"),
    ],
)
def test_setup_refuses(variables, message):
    done = setup(**variables)
    assert done.returncode == 1
    assert message in done.stderr


def test_system_environment_is_only_checked(tmp_path):
    """This very environment has all; an empty one is told what it lacks. Neither is changed."""
    assert setup(VENV="system").returncode == 0
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    done = setup(VENV="system", PYTHON=str(bare / "bin" / "python"))
    assert done.returncode == 1
    assert "has no torch" in done.stderr
