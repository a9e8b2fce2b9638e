"""Options are the keyword arguments of the classes that they configure; this reads them there."""

import inspect
from typing import Any, Callable, Dict


def parameters(maker: Callable[..., Any], base: type = object) -> Dict[str, inspect.Parameter]:
    """Named parameters of a function; of a class with those of its bases, to which it passes on.

    Args:
        maker: the function or class.
        base: how far up bases are read.
    """
    classes = list(reversed(inspect.getmro(maker))) if inspect.isclass(maker) else []
    own = [vars(cls)["__init__"] for cls in classes if issubclass(cls, base) and "__init__" in vars(cls)]
    found = {name: p for make in own or [maker] for name, p in inspect.signature(make).parameters.items()}
    return {name: p for name, p in found.items() if name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def defaults(maker: Callable[..., Any], base: type = object) -> Dict[str, Any]:
    """Those of :func:`parameters` that have defaults, with these."""
    return {name: p.default for name, p in parameters(maker, base).items() if p.default is not p.empty}
