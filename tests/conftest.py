"""Shared by all tests: threads, isolation of tests from each other, a small data set, and the parity summary."""

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, Iterator

# Before torch is imported. More threads gain nothing at these sizes, and lose much where cores are busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from detectron2.engine import SimpleTrainer

os.environ.setdefault("D2KD_GOLDENS", str(Path(__file__).parent / "goldens"))
os.environ["DETECTRON2_DATASETS"] = DATASETS = tempfile.mkdtemp(prefix="d2kd_datasets_")  # one per xdist worker
sys.path.insert(0, str(Path(__file__).parent))

from isolation import restored_catalogs, restored_process, seed_everything
from small import save_teacher

from d2kd.data import write_blood_cells


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[Any]:
    """Around a test and the setup and teardown of its fixtures."""
    with restored_process():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup() -> Iterator[Any]:
    """Every fixture starts from the same seeds, so that shared ones do not depend on which test comes first."""
    seed_everything()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[Any]:
    """Every test starts from the same seeds."""
    seed_everything()
    return (yield)


@pytest.fixture(scope="module", autouse=True)
def _catalogs() -> Iterator[None]:
    with restored_catalogs():
        yield


@pytest.fixture(scope="session", autouse=True)
def _plain_jit() -> Iterator[None]:
    """Runs scripted functions, such as fvcore's focal loss, as written: optimized, their last bits may change after
    the first calls, and a test would depend on how often the process called them before.
    """
    with torch.jit.optimized_execution(False):
        yield


@pytest.fixture(scope="session")
def blood_cells() -> Path:
    """A few images under the registered names blood_cells_train and blood_cells_val."""
    folder = Path(DATASETS) / "blood_cells"
    write_blood_cells(folder, "train", num_images=12, seed=1)
    write_blood_cells(folder, "val", num_images=4, seed=2)
    return folder


@pytest.fixture(scope="session")
def teachers(tmp_path_factory: pytest.TempPathFactory, blood_cells: Path) -> Path:
    """A folder with teacher.pth, and wide.pth with twice the channels, both of random weights."""
    folder = tmp_path_factory.mktemp("teachers")
    save_teacher(folder / "wide.pth", "MODEL.FPN.OUT_CHANNELS", "64")
    save_teacher(folder / "teacher.pth")
    return folder


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Calls ``act`` once in ``at(iteration, act)``, after the backward pass of an iteration."""
    write_metrics = SimpleTrainer._write_metrics

    def set_up(iteration: int, act: Callable[[], None]) -> None:
        def step(self: SimpleTrainer, *args: Any, **kwargs: Any) -> None:
            if self.iter == iteration:
                monkeypatch.setattr(SimpleTrainer, "_write_metrics", write_metrics)
                act()
            return write_metrics(self, *args, **kwargs)

        monkeypatch.setattr(SimpleTrainer, "_write_metrics", step)

    return set_up


def pytest_unconfigure() -> None:
    shutil.rmtree(DATASETS, ignore_errors=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Reports how many golden cases ran and which are not covered, so that none counts as passed unseen."""
    from goldens import GOLDENS, covered_cases, uncovered_cases

    for report in [*terminalreporter.stats.get("passed", []), *terminalreporter.stats.get("failed", [])]:
        for line in [value for name, value in report.user_properties if name == "fuzz" and report.when == "call"]:
            terminalreporter.write_line(f"fuzz: {line}")
    stems = [f"[{path.stem}" for path in covered_cases()]
    ran = [r for r in terminalreporter.stats.get("passed", []) if any(stem in r.nodeid for stem in stems)]
    if not ran:
        return
    terminalreporter.write_line(f"parity: {len(ran)} checks passed over {len(covered_cases())} cases of {GOLDENS}")
    for reason, cases in uncovered_cases().items():
        terminalreporter.write_line(f"parity: {len(cases)} not covered ({reason}): {', '.join(sorted(cases))}")
