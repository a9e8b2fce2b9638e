"""Options are the keyword arguments of the classes that they configure; this module reads them from signatures."""

import ast
import collections.abc
import inspect
import os
import textwrap
from functools import cache
from typing import Any, Callable, Dict, List, Literal, Mapping, Set, Union, get_args, get_origin

import torch

try:
    from types import UnionType
except ImportError:  # Python 3.9
    UnionType = Union  # type: ignore[assignment, misc]

#: What stands for an annotation or a default that there is not.
ANY = inspect.Parameter.empty
LISTS = (list, tuple, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)
MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)
#: Classes that a text stands for.
FROM_TEXT = (torch.device, os.PathLike)


def arguments(maker: Callable[..., Any], base: type = object) -> Dict[str, inspect.Parameter]:
    """Named arguments of a function, or of a class including those that it passes on to its bases.

    Args:
        maker: a function or class.
        base: the last of the bases to read.
    """
    return {name: p for name, p in _parameters(maker, base).items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def takes_any(maker: Callable[..., Any]) -> bool:
    """Whether a function or class takes arguments of any name."""
    return any(p.kind is p.VAR_KEYWORD for p in _parameters(maker, object).values())


def defaults(maker: Callable[..., Any], base: type = object) -> Dict[str, Any]:
    """Default values of those :func:`arguments` that have one."""
    return {name: p.default for name, p in arguments(maker, base).items() if p.default is not ANY}


def _parameters(maker: Callable[..., Any], base: type) -> Dict[str, inspect.Parameter]:
    """Those of a class's constructor, with its base's in place of ``**kwargs`` and so on; bases' come first."""
    classes = inspect.getmro(maker) if inspect.isclass(maker) else ()
    makers = [vars(cls)["__init__"] for cls in classes if "__init__" in vars(cls) and issubclass(cls, base)]
    levels: List[Dict[str, inspect.Parameter]] = []
    fixed = {"self"}
    for make in [make for make in makers if make is not object.__init__] or [maker]:
        own = {name: p for name, p in _signature(make).items() if name not in fixed}
        levels = [{name: p for name, p in own.items() if p.kind is not p.VAR_KEYWORD}, *levels]
        if len(levels[0]) == len(own):
            return _merged(levels)
        fixed |= passed_on(make)
    return _merged([*levels, own])


def _merged(levels: List[Dict[str, inspect.Parameter]]) -> Dict[str, inspect.Parameter]:
    return {name: p for level in levels for name, p in level.items()}


def _signature(make: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(make).parameters
    except ValueError:  # C functions may have none
        return {"kwargs": inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)}


@cache
def passed_on(constructor: Callable[..., Any]) -> Set[str]:
    """Names of arguments that a constructor itself gives its base, so that nobody else may."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(constructor)))
    except (OSError, TypeError):  # it has no source
        return set()
    calls = [x for x in ast.walk(tree) if isinstance(x, ast.Call) and getattr(x.func, "attr", "") == "__init__"]
    return {keyword.arg for call in calls for keyword in call.keywords if keyword.arg}


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value as configs have them is of the type that an argument is annotated with.

    Args:
        value: what is no number, text, list, mapping or None is an object, or the node of one (``_target_``), and fits.
        annotation: a type; one that is not understood takes all values.
    """
    if annotation in (ANY, Any) or is_object(value):
        return True
    origin, args = get_origin(annotation) or annotation, get_args(annotation)
    if origin in (Union, UnionType):
        return any(fits(value, x) for x in args)
    if annotation in (None, type(None)) or value is None:
        return value is None and annotation in (None, type(None))
    if origin is Literal:
        return value in args
    if origin in LISTS:
        return isinstance(value, (list, tuple)) and _elements_fit(value, origin, args)
    if origin in MAPPINGS:
        return isinstance(value, MAPPINGS) and all(fits(x, args[1]) for x in value.values() if args)
    if origin is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(origin, type):
        return isinstance(value, str) if issubclass(origin, FROM_TEXT) else isinstance(value, origin)
    return True


def _elements_fit(values: Any, origin: Any, args: Any) -> bool:
    if origin is not tuple or Ellipsis in args or len(args) < 2:  # detectron2 writes Tuple[int] for any length
        return all(fits(value, args[0]) for value in values if args)
    return len(values) == len(args) and all(map(fits, values, args))


def is_object(value: Any) -> bool:
    """Whether a value of a config is an object, or the node of one."""
    if isinstance(value, MAPPINGS):
        return "_target_" in value
    return not (value is None or isinstance(value, (bool, int, float, str, list, tuple)))
