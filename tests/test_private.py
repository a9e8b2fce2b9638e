"""Private names of detectron2 and fvcore: each that d2kd relies on is listed and there, and there are no others."""

import ast
import inspect
from pathlib import Path

import pytest
from detectron2.utils.registry import locate

import d2kd
from d2kd.private import PRIVATE_NAMES

SOURCES = sorted(Path(d2kd.__file__).parent.rglob("*.py"))
# Of torch and Python; their owners document them for subclasses, or keep them for compatibility.
OF_OTHERS = {"_apply", "_asdict", "_buffers", "_exit", "_fields", "_modules", "_parameters", "_replace", "_target_"}
OF_OTHERS.add("_version")  # of a tensor: counts changes in place
# Written as attributes of numpy's modules in a list of what pickles may name.
OF_OTHERS |= {"_core", "_reconstruct", "_frombuffer"}


@pytest.mark.parametrize("name", PRIVATE_NAMES)
def test_each_is_there(name):
    module, _, path = name.partition(":")
    owner, _, attribute = path.rpartition(".")
    found = locate(f"{module}.{owner}") if owner else locate(f"{module}.{path}")
    assert found is not None, PRIVATE_NAMES[name]
    if owner:  # a method, or set in one
        sources = [inspect.getsource(cls) for cls in inspect.getmro(found) if cls is not object]
        assert any(attribute in source for source in sources), PRIVATE_NAMES[name]


def test_there_are_no_others():
    """Names with an underscore that d2kd uses and does not define are on the list."""
    used, defined = set(), set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                defined.add(node.attr)
            elif isinstance(node, ast.Attribute):
                used.add(node.attr)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                defined.add(node.name)
            elif isinstance(node, ast.ImportFrom) and not node.level and path.name != "private.py":
                used.update(x.name for x in node.names)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                defined.add(node.id)
    private = {name for name in used - defined if name.startswith("_") and not name.endswith("__")}
    listed = {name.rpartition(":")[2].rpartition(".")[2] for name in PRIVATE_NAMES}
    assert private - OF_OTHERS <= listed
