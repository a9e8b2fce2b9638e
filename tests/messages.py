"""The table of docs/troubleshooting.md."""

import re
from typing import List

from small import CONFIGS

PAGE = CONFIGS.parent / "docs" / "troubleshooting.md"


def documented() -> List[str]:
    """Messages as the page writes them, "…" for what depends on the run."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    return re.findall(r"^\| `(.+?)` \|", "\n".join(lines), re.MULTILINE)


def rows_of(message: str) -> List[str]:
    """The rows that a message belongs to."""
    return [row for row in documented() if _fits(row, message)]


def _fits(row: str, message: str) -> bool:
    end = 0
    for part in row.split("…"):
        start = message.find(part, end)
        if start < 0:
            return False
        end = start + len(part)
    return True
