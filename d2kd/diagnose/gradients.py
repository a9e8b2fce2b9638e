"""The gradient of each loss at the FPN, which shows weights that are far too large or too small."""

from types import MappingProxyType
from typing import Dict, List, Mapping, Optional, Sequence

import torch
from torch import Tensor

from ..heads import Features

# Warn about a method whose gradient at the FPN is above or below these multiples of the detection losses' gradient.
TOO_STRONG, TOO_WEAK = 10.0, 0.01
# The weight that a warning suggests makes it this multiple.
SUGGESTED = 1.0
GRADIENT = "gradient/"  # prefix of logged ratios


def gradient_ratios(losses: Mapping[str, Tensor], methods: Sequence[str], features: Features) -> Dict[str, float]:
    """Gradient of each loss at the FPN, relative to that of the sum of the student's own losses.

    Args:
        losses: losses of one forward; their graph is kept.
        methods: names in lower case; losses called ``loss_<method>_...`` are theirs, the others the student's own.
        features: the student's FPN features, per level.

    Returns:
        The norm over all levels, divided by that of the student's own losses, for each loss and for the sum of each
        method's losses.
    """
    own = [value for key, value in losses.items() if method_of(key, methods) is None]
    groups = dict(losses)
    for method in methods:
        parts = [value for key, value in losses.items() if method_of(key, methods) == method]
        groups[method] = torch.stack(parts).sum()
    detection = gradient_norm(torch.stack(own).sum(), features)
    return {key: gradient_norm(value, features) / max(detection, 1e-12) for key, value in groups.items()}


def gradient_norm(loss: Tensor, features: Features) -> float:
    """Norm of a loss's gradient over all levels; 0 if there is none."""
    if not loss.requires_grad:
        return 0.0
    grads = torch.autograd.grad(loss, features, retain_graph=True, allow_unused=True)
    found = [grad.float().norm() for grad in grads if grad is not None]
    return float(torch.stack(found).norm()) if found else 0.0


def method_of(key: str, methods: Sequence[str]) -> Optional[str]:
    """The method that a loss belongs to, by its name; None for the student's own losses."""
    return next((method for method in methods if key.startswith(f"loss_{method}_")), None)


def weight_warnings(
    ratios: Mapping[str, float], methods: Sequence[str], weights: Mapping[str, float] = MappingProxyType({})
) -> List[str]:
    """Warnings about methods whose gradient is far larger or far smaller than that of the student's own losses.

    Args:
        ratios: from :func:`gradient_ratios`.
        methods: names in lower case.
        weights: of methods with a single weight, by name, to suggest another.
    """
    found = []
    for method in methods:
        ratio = ratios[method]
        gradient = f"the gradient of {method} at the FPN is {ratio:.3g} times that of the detection losses"
        if ratio > TOO_STRONG:
            found.append(f"{gradient}; lower its {_suggestion(ratio, weights.get(method))}")
        elif ratio == 0:
            found.append(f"{method} does not reach the FPN: check its weight and its modules, or try another batch")
        elif ratio < TOO_WEAK:
            found.append(f"{gradient}; raise its {_suggestion(ratio, weights.get(method))}")
    return found


def _suggestion(ratio: float, weight: Optional[float]) -> str:
    factor = SUGGESTED / ratio
    what = (
        f"weights, to {factor:.2g} times what they are" if weight is None else f"weight to about {weight * factor:.2g}"
    )
    return f"{what}, so that both pull alike in this batch"
