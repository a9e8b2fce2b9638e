"""Options are the keyword arguments of the classes that they configure; this module reads them from signatures."""

import inspect
from typing import Any, Callable, Dict


def arguments(maker: Callable[..., Any], base: type = object) -> Dict[str, inspect.Parameter]:
    """Named arguments of a function, or of a class including those that it passes on to its bases.

    Args:
        maker: a function or class.
        base: the last of the bases to read.
    """
    classes = list(reversed(inspect.getmro(maker))) if inspect.isclass(maker) else []
    own = [vars(cls)["__init__"] for cls in classes if issubclass(cls, base) and "__init__" in vars(cls)]
    found = {name: p for make in own or [maker] for name, p in inspect.signature(make).parameters.items()}
    return {name: p for name, p in found.items() if name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def defaults(maker: Callable[..., Any], base: type = object) -> Dict[str, Any]:
    """Default values of those :func:`arguments` that have one."""
    return {name: p.default for name, p in arguments(maker, base).items() if p.default is not p.empty}
