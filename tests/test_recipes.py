"""The table of costs in docs/methods.md."""

import pytest
from small import CONFIGS, build, small_config

from d2kd.complexity import cpu_milliseconds
from d2kd.experiments.recipes import costs_table, recipes

PAGE = (CONFIGS.parent / "docs" / "methods.md").read_text()
TABLE = [line for line in PAGE.partition("### What the detectors cost")[2].splitlines() if line.count("|") == 5]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["retinanet_R18_64", "gfl_R18_128", "retinanet_lite0"])
def test_the_page_has_what_the_tool_counts(name):
    if name.endswith("lite0"):
        pytest.importorskip("timm")
    text = costs_table([CONFIGS / f"{name}.yaml", CONFIGS / f"crosskd_{name}.yaml"])
    rows = text.splitlines()[2:]
    assert len(rows) == 1, "a student costs what its plain detector costs"
    names, macs, parameters = (cell.strip() for cell in rows[0].strip("|").split("|"))
    assert names == f"`{name}`, `crosskd_{name}`"
    row = next(line for line in TABLE if f"`{name}`" in line)
    assert [macs, parameters] == [cell.strip() for cell in row.strip("|").split("|")[1:3]]


def test_every_recipe_is_in_the_table():
    assert not [path.stem for path in recipes() if not any(f"`{path.stem}`" in row for row in TABLE)]
    assert not [path for path in recipes() if path.name.startswith(("Base-", "demo_", "quick_"))]


def test_cpu_time_is_measured():
    detector = build(small_config()).eval()
    assert cpu_milliseconds(detector, (128, 160), repeats=1) > 0
