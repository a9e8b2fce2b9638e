"""One HTML file about a training run, or about several to compare."""

from .page import write_report
from .runs import find_runs

__all__ = ["find_runs", "write_report"]
