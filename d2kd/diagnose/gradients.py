"""How strongly each loss pulls at the FPN, and whose weight is far off."""

from typing import Any, Dict, List, Mapping, Sequence

import torch
from torch import Tensor

from ..heads import Features

# A method's gradient at the FPN beyond these multiples of the detection losses' is worth a warning.
TOO_STRONG, TOO_WEAK = 10.0, 0.01
GRADIENT = "gradient/"  # prefix of the logged numbers


def gradient_ratios(losses: Mapping[str, Tensor], methods: Sequence[str], features: Features) -> Dict[str, float]:
    """How strongly each loss pulls at the FPN, relative to the student's own losses together.

    Args:
        losses: of one forward; the graph is kept.
        methods: names in lower case; losses named ``loss_<method>_...`` are theirs, the others the student's own.
        features: the student's FPN features, per level.

    Returns:
        For each loss, and for each method's losses together, the norm of the gradient over all levels, divided by that
        of the sum of the student's own losses.
    """
    own = [value for key, value in losses.items() if method_of(key, methods) is None]
    groups = dict(losses)
    for method in methods:
        parts = [value for key, value in losses.items() if method_of(key, methods) == method]
        groups[method] = torch.stack(parts).sum()
    detection = gradient_norm(torch.stack(own).sum(), features)
    return {key: gradient_norm(value, features) / max(detection, 1e-12) for key, value in groups.items()}


def gradient_norm(loss: Tensor, features: Features) -> float:
    """Norm of a loss's gradient over all levels; 0 where there is none."""
    if not loss.requires_grad:
        return 0.0
    grads = torch.autograd.grad(loss, features, retain_graph=True, allow_unused=True)
    found = [grad.float().norm() for grad in grads if grad is not None]
    return float(torch.stack(found).norm()) if found else 0.0


def method_of(key: str, methods: Sequence[str]) -> Any:
    """The method that a loss belongs to by its name; None for the student's own."""
    return next((method for method in methods if key.startswith(f"loss_{method}_")), None)


def warnings(ratios: Mapping[str, float], methods: Sequence[str]) -> List[str]:
    """What to say of methods that pull far more or far less than the student's own losses."""
    found = []
    for method in methods:
        pull = f"{method} pulls {ratios[method]:.3g} times as strongly at the FPN as the detection losses"
        if ratios[method] > TOO_STRONG:
            found.append(f"{pull}; lower its weight")
        elif ratios[method] == 0:
            found.append(
                f"{method} does not reach the FPN: its weight, its modules or this batch leave it nothing to do"
            )
        elif ratios[method] < TOO_WEAK:
            found.append(f"{pull}; raise its weight")
    return found
