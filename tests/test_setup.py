"""Setting up: what scripts/setup.sh installs, switches and refuses, and what the source distribution contains."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import d2kd

pytestmark = pytest.mark.slow  # most of them start bash and pip
ROOT = Path(__file__).parent.parent


def setup(**variables):
    # `make test VENV=... DETECTRON2=...` passes these on to the tests.
    inherited = {key: value for key, value in os.environ.items() if key not in ("VENV", "DETECTRON2")}
    environment = {**inherited, "PYTHON": sys.executable, **variables}
    return subprocess.run(["bash", ROOT / "scripts" / "setup.sh"], env=environment, capture_output=True, text=True)


def test_without_detectron2_one_sentence_says_how_to_get_it():
    code = "import sys; sys.modules['detectron2'] = None; import d2kd"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.strip().splitlines()[-1].startswith("ImportError: d2kd needs detectron2")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"DETECTRON2": "newest"}, "use registry, official, or the path or URL of a checkout"),
        ({"DETECTRON2": str(ROOT)}, "use registry, official, or the path or URL of a checkout"),
        ({"DETECTRON2": "official", "VENV": "system"}, "VENV=system installs nothing"),
        ({"PYTHON": "/no/python"}, "name one with: make setup PYTHON="),
        ({"VENV": str(ROOT / "docs")}, "is not a virtual environment"),
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


# Stands in for an environment's python: keeps the installed distributions in a file and records pip's and uv's calls.
FAKE_PYTHON = """#!{python}
import sys
from pathlib import Path

venv, arguments = Path("{venv}"), sys.argv[1:]
state, site = venv / "state", venv / "lib" / "python3" / "site-packages"
installed = state.read_text().split() if state.exists() else []
if "-c" in arguments:
    print(*installed if "-I" in arguments else [site])
    sys.exit()
with open(venv / "calls", "a") as calls:
    print(*arguments[1:], file=calls)
command, last = arguments[2:3], arguments[-1]
if command == ["download"]:
    Path(arguments[arguments.index("--dest") + 1], "sal_detectron2-0.7.2-cp310-none-any.whl").touch()
elif command == ["wheel"]:
    if "broken" in last:
        sys.exit(1)
    name = "other" if "other" in last else "detectron2"
    Path(arguments[arguments.index("--wheel-dir") + 1], name + "-0.6-cp311-cp311-linux_x86_64.whl").touch()
elif command == ["uninstall"]:
    installed = [name for name in installed if not name.startswith(last + "==")]
elif command == ["install"] and last.endswith(".whl"):
    name, version = Path(last).name.split("-")[:2]
    installed.append(name.replace("_", "-") + "==" + version)
    info = site / "sal_detectron2-0.7.2.dist-info"
    if name == "sal_detectron2":
        info.mkdir(parents=True, exist_ok=True)
        (info / "WHEEL").write_text("Wheel-Version: 1.0\\nTag: cp310-cp310-linux_x86_64\\n")
        (info / "METADATA").write_text("Name: sal-detectron2\\nRequires-Dist: numpy<2\\nRequires-Dist: black\\n")
state.write_text(" ".join(installed))
"""


class Environment:
    """A virtual environment in name only."""

    def __init__(self, folder):
        self.folder = folder
        python = folder / "bin" / "python"
        python.parent.mkdir(parents=True)
        (folder / "pyvenv.cfg").touch()
        python.write_text(FAKE_PYTHON.format(python=sys.executable, venv=folder))
        python.chmod(0o755)

    def setup(self, **variables):
        """Runs the script and returns it together with the pip commands about detectron2 that it gave."""
        (self.folder / "calls").write_text("")
        done = setup(VENV=str(self.folder), **variables)
        calls = (self.folder / "calls").read_text().splitlines()
        return done, [call.split()[1] for call in calls if re.match(r"pip (download|wheel|uninstall|.*\.whl$)", call)]

    @property
    def installed(self):
        return (self.folder / "state").read_text()

    @installed.setter
    def installed(self, names):
        (self.folder / "state").write_text(names)


@pytest.fixture
def environment(tmp_path):
    return Environment(tmp_path / "environment")


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "check out"
    (folder / "detectron2").mkdir(parents=True)
    (folder / "detectron2" / "__init__.py").touch()
    return folder


REGISTRY, OFFICIAL = "sal-detectron2==0.7.2", "detectron2==0.6"


def test_a_new_environment_gets_the_registry_build_once(environment):
    done, calls = environment.setup()
    assert done.returncode == 0, done.stderr
    assert calls == ["download", "install"]
    assert environment.installed == REGISTRY
    assert environment.setup()[1] == []
    assert environment.setup(DETECTRON2="registry")[1] == []


def test_the_registry_build_no_longer_claims_python_310_and_numpy_1(environment):
    environment.setup()
    (info,) = environment.folder.glob("lib/*/site-packages/*.dist-info")
    assert sorted(path.name for path in info.iterdir()) == ["METADATA", "WHEEL"]
    assert "Tag: py3-none-any\n" in (info / "WHEEL").read_text()
    assert "Requires-Dist: numpy\nRequires-Dist: black\n" in (info / "METADATA").read_text()


def test_what_was_chosen_stays_until_another_is_chosen(environment, checkout):
    environment.setup()
    done, calls = environment.setup(DETECTRON2="official")
    assert done.returncode == 0, done.stderr
    assert calls == ["wheel", "uninstall", "install"]
    assert environment.installed == OFFICIAL
    assert environment.setup()[1] == []
    assert environment.setup(DETECTRON2="official")[1] == []

    assert environment.setup(DETECTRON2=str(checkout))[1] == ["wheel", "uninstall", "install"]
    assert environment.setup(DETECTRON2=f"{checkout}/../check out")[1] == []

    assert environment.setup(DETECTRON2="registry")[1] == ["download", "uninstall", "install"]
    assert environment.installed == REGISTRY


def test_changed_requirements_leave_a_chosen_build_alone(environment):
    environment.setup(DETECTRON2="official")
    (environment.folder / ".d2kd-ready").write_text("other requirements")
    done, calls = environment.setup()
    assert "setup: ready" in done.stdout
    assert calls == []
    assert environment.installed == OFFICIAL


def test_a_build_installed_by_hand_stays(environment):
    environment.installed = "detectron2==0.5"
    assert environment.setup()[1] == []
    assert environment.installed == "detectron2==0.5"


def test_an_older_registry_build_is_replaced(environment):
    environment.installed = "sal-detectron2==0.7.1"
    assert environment.setup()[1] == ["download", "uninstall", "install"]
    assert environment.installed == REGISTRY


@pytest.mark.parametrize(("choice", "left"), [("", REGISTRY), ("official", OFFICIAL)])
def test_two_builds_at_once_are_both_removed(environment, choice, left):
    environment.installed = f"{OFFICIAL} {REGISTRY}"
    assert environment.setup(DETECTRON2=choice)[1][1:] == ["uninstall", "uninstall", "install"]
    assert environment.installed == left


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("git+https://broken/detectron2.git", "needs a C++ compiler"),
        ("git+https://other", "is not detectron2, but other-"),
    ],
)
def test_a_build_that_fails_changes_nothing(environment, url, message):
    environment.setup()
    done, calls = environment.setup(DETECTRON2=url)
    assert done.returncode == 1
    assert message in done.stderr
    assert "uninstall" not in calls
    assert environment.installed == REGISTRY
    assert environment.setup()[1] == []


def test_the_sdist_builds_the_wheel_by_itself(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "d2kd", copy / "d2kd", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "requirements", copy / "requirements")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, copy)
    sources = {path.relative_to(copy).as_posix() for path in copy.glob("d2kd/**/*") if path.is_file()}

    run = {"check": True, "capture_output": True, "text": True}
    subprocess.run([sys.executable, "setup.py", "-q", "sdist"], cwd=copy, **run)
    (sdist,) = (copy / "dist").iterdir()
    assert sdist.name == f"d2kd-{d2kd.__version__}.tar.gz"
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / f"d2kd-{d2kd.__version__}"
    subprocess.run([sys.executable, "setup.py", "-q", "bdist_wheel"], cwd=unpacked, **run)
    with zipfile.ZipFile(next((unpacked / "dist").iterdir())) as wheel:
        assert sources <= set(wheel.namelist())
        metadata = wheel.read(f"d2kd-{d2kd.__version__}.dist-info/METADATA").decode()
        wheel.extractall(tmp_path / "site")
    assert f"\nVersion: {d2kd.__version__}\n" in metadata
    assert "\nRequires-Dist: torch>=" in metadata

    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    code = "import d2kd; print(d2kd.__version__, d2kd.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, **run)
    assert done.stdout.split() == [d2kd.__version__, str(tmp_path / "site" / "d2kd" / "__init__.py")]
