"""How student, teacher and methods are wired, and how strongly each loss pulls at the FPN."""

from typing import Any, Dict, List, Mapping, Sequence

import torch
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import Tensor, nn

from .dense import Features, level_channels, level_strides

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


def dry_run(model: Any, batch: List[Dict[str, Any]]) -> str:
    """Runs one batch through a student and its teacher and describes what happens; trains nothing.

    Args:
        model: a :class:`DistillMetaArch` with methods, in training mode.
        batch: images with annotations, as :class:`DatasetMapper` gives them.

    Returns:
        The wiring, what each method reads, and every loss with its gradient, then warnings, if any.
    """
    period, model.gradient_period = model.gradient_period, 1
    try:
        with EventStorage() as storage:
            losses = model(batch)
    finally:
        model.gradient_period = period
    logged = storage.latest()
    ratios = {key[len(GRADIENT) :]: value for key, (value, _) in logged.items() if key.startswith(GRADIENT)}
    said = [f"warning: {text}" for text in warnings(ratios, list(model.distill))]
    return "\n\n".join([wiring(model), readings(model), loss_table(losses, ratios), *said])


def wiring(model: Any) -> str:
    """A table of what student and teacher have, level by level and as a whole.

    Args:
        model: a :class:`DistillMetaArch` with a teacher.
    """
    teacher = model.teacher.detector
    rows: List[List[Any]] = []
    names = zip(model.head_in_features, teacher.head_in_features)
    numbers = [zip(f(model), f(teacher)) for f in (level_strides, level_channels)]
    anchors = zip(model.anchor_generator.num_anchors, teacher.anchor_generator.num_anchors)
    for name, stride, channels, slots in zip(names, *numbers, anchors):
        for what, pair in (("level", name), ("stride", stride), ("channels", channels), ("anchors per place", slots)):
            rows.append([f"{what} {len(rows) // 4 + 1}" if what == "level" else f"  {what}", *pair])
    for what, value in (
        ("detector", lambda d: type(d).__name__),
        ("parameters", lambda d: f"{parameters(d) / 1e6:.2f} M"),
        ("classes", lambda d: d.num_classes),
    ):
        rows.append([what, value(model), value(teacher)])
    rows.append(["channel order", getattr(model, "input_format", "BGR"), model.teacher.input_format])
    return tabulate(rows, headers=["", "student", "teacher"], tablefmt="simple", disable_numparse=True)


def parameters(detector: nn.Module) -> int:
    """Number of a detector's parameters, without the methods' adapters."""
    return sum(value.numel() for name, value in detector.named_parameters() if not name.startswith("distill."))


def readings(model: Any) -> str:
    """A table of what each method reads and which adapters it has."""
    rows = []
    maps = ", ".join(own if own == theirs else f"{own} : {theirs}" for own, theirs in model.paths) or "FPN features"
    for method in model.methods:
        reads = "predictions" if method.reads_head else maps
        cuts = ", ".join(f"cut {cut.convs}{' before activation' if cut.pre_activation else ''}" for cut in method.cuts)
        trained = sum(p.numel() for p in method.parameters())
        shapes = [f"{m.in_channels}->{m.out_channels}" for m in method.modules() if isinstance(m, nn.Conv2d)]
        adapters = f"{trained} parameters: conv {', '.join(dict.fromkeys(shapes))}" if trained else "none"
        rows.append([type(method).__name__, f"{reads}, {cuts}" if cuts else reads, adapters])
    return tabulate(rows, headers=["method", "reads", "adapters"], tablefmt="simple")


def loss_table(losses: Mapping[str, Tensor], ratios: Mapping[str, float]) -> str:
    """A table of each loss and of its gradient relative to the student's own losses."""
    rows = [[key, f"{value.item():.4g}", f"{ratios[key]:.3g}"] for key, value in losses.items()]
    return tabulate(rows, headers=["loss", "value", "gradient at the FPN"], tablefmt="simple", disable_numparse=True)


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
