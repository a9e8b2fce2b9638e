"""The distillation methods: one file each, registered by the import below."""

from .base import METHOD_REGISTRY, Method, build_method, method_defaults, method_names
from .crosskd import CrossKD
from .ld import LD
from .pkd import PKD

__all__ = ["METHOD_REGISTRY", "CrossKD", "LD", "Method", "PKD", "build_method", "method_defaults", "method_names"]
