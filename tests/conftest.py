"""Shared by all tests: quiet, two threads, and what the parity test ran, printed at the end."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from fvcore.nn import sigmoid_focal_loss_jit

os.environ.setdefault("D2KD_GOLDENS", str(Path(__file__).parent / "goldens"))
os.environ["DETECTRON2_DATASETS"] = DATASETS = tempfile.mkdtemp(prefix="d2kd_datasets_")
sys.path.insert(0, str(Path(__file__).parent))

from d2kd.data import write_blood_cells

torch.set_num_threads(2)


@pytest.fixture(scope="session", autouse=True)
def _warm_focal_loss() -> None:
    """The scripted focal loss of fvcore has other last bits in its first calls, before the JIT has optimised it."""
    for _ in range(4):
        logits = torch.randn(8, 3, requires_grad=True)
        loss = sigmoid_focal_loss_jit(logits, torch.zeros(8, 3), alpha=0.25, gamma=2.0, reduction="sum")
        loss.backward()


@pytest.fixture(scope="session")
def blood_cells() -> Path:
    """A few images under the registered names blood_cells_train and blood_cells_val."""
    folder = Path(DATASETS) / "blood_cells"
    write_blood_cells(folder, "train", num_images=12, seed=1)
    write_blood_cells(folder, "val", num_images=4, seed=2)
    return folder


def pytest_unconfigure() -> None:
    shutil.rmtree(DATASETS, ignore_errors=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says how many golden cases ran and which are not covered, so that none counts as passed unseen."""
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
