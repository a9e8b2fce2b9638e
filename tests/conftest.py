"""Shared by all tests: quiet, two threads, and what the parity test ran, printed at the end."""

import os
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("D2KD_GOLDENS", str(Path(__file__).parent / "goldens"))
sys.path.insert(0, str(Path(__file__).parent))

import d2kd  # noqa: E402, F401

torch.set_num_threads(2)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says how many golden cases ran and which are not covered, so that none counts as passed unseen."""
    from goldens import GOLDENS, covered_cases, uncovered_cases

    ran = [r for r in terminalreporter.stats.get("passed", []) if "test_parity.py" in r.nodeid and "[" in r.nodeid]
    if not ran:
        return
    terminalreporter.write_line(f"parity: {len(ran)} checks passed over {len(covered_cases())} cases of {GOLDENS}")
    for reason, cases in uncovered_cases().items():
        terminalreporter.write_line(f"parity: {len(cases)} not covered ({reason}): {', '.join(sorted(cases))}")
