"""How student, teacher and methods are wired, and how strongly each loss pulls at the FPN."""

from collections import Counter
from typing import Any, Dict, List, Mapping

from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import Tensor, nn

from ..contract import level_channels, level_strides
from ..errors import D2kdError
from .gradients import GRADIENT, warnings


def dry_run(model: Any, batch: List[Dict[str, Any]]) -> str:
    """Runs one batch through a student and its teacher and describes what happens; trains nothing.

    Args:
        model: a :class:`DistillMetaArch` with methods, in training mode.
        batch: images with annotations, as :class:`DatasetMapper` gives them.

    Returns:
        The wiring, what each method reads, and every loss with its gradient, then warnings, if any.

    Raises:
        D2kdError: it has no methods.
    """
    if not getattr(model, "methods", ()):
        raise D2kdError("--dry-run shows what methods do, but the config has none: set MODEL.DISTILL.METHODS")
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
    """Tables of what student and teacher have, level by level and as a whole.

    Args:
        model: a :class:`DistillMetaArch` with a teacher.
    """
    both = (model, model.teacher.detector)
    names, strides, channels, anchors = (
        zip(*(of(detector) for detector in both))
        for of in (
            lambda d: d.head_in_features,
            level_strides,
            level_channels,
            lambda d: d.anchor_generator.num_anchors,
        )
    )
    levels = [[" / ".join(map(str, pair)) for pair in level] for level in zip(names, strides, channels, anchors)]
    whole = [
        ["detector", *(type(detector).__name__ for detector in both)],
        ["parameters", *(f"{parameters(detector) / 1e6:.2f} M" for detector in both)],
        ["classes", *(detector.num_classes for detector in both)],
        ["channel order", getattr(model, "input_format", "BGR"), model.teacher.input_format],
    ]
    headers = ["level (student / teacher)", "stride", "channels", "anchors per place"]
    return "\n\n".join(
        [
            tabulate(whole, headers=["", "student", "teacher"], tablefmt="simple", disable_numparse=True),
            tabulate(levels, headers=headers, tablefmt="simple", disable_numparse=True),
        ]
    )


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
        kinds = Counter(type(m).__name__ for m in method.modules() if m._parameters)
        adapters = (
            f"{trained} parameters: {', '.join(f'{n} {kind}' for kind, n in kinds.items())}" if trained else "none"
        )
        rows.append([type(method).__name__, f"{reads}, {cuts}" if cuts else reads, adapters])
    return tabulate(rows, headers=["method", "reads", "trains"], tablefmt="simple")


def loss_table(losses: Mapping[str, Tensor], ratios: Mapping[str, float]) -> str:
    """A table of each loss and of its gradient relative to the student's own losses."""
    rows = [[key, f"{value.item():.4g}", f"{ratios[key]:.3g}"] for key, value in losses.items()]
    return tabulate(rows, headers=["loss", "value", "gradient at the FPN"], tablefmt="simple", disable_numparse=True)
