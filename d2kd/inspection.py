"""How student, teacher and methods are wired, and how strongly each loss pulls at the FPN."""

from collections import Counter
from typing import Any, Dict, List, Mapping, Sequence

import torch
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import Tensor, nn

from .dense import Features, level_channels, level_strides, run_dense
from .errors import D2kdError

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


@torch.no_grad()
def levels_not_finite(model: Any, batch: List[Dict[str, Any]]) -> List[str]:
    """Levels on which features or predictions of a detector, or of its teacher, are not finite for a batch.

    Args:
        model: any :class:`DenseDetector`.
        batch: images, as :class:`DatasetMapper` gives them.

    Returns:
        Such as "student p3"; empty where all are finite, or the model is none.
    """
    if not isinstance(model, DenseDetector):
        return []
    outputs = {"student": run_dense(model, model.preprocess_image(batch))}
    if getattr(model, "teacher", None) is not None:
        outputs["teacher"] = model.teacher(batch, getattr(model, "input_format", "BGR"))
    found = []
    for who, out in outputs.items():
        for name, *maps in zip(out.detector.head_in_features, out.features, *out.predictions):
            if not all(level.isfinite().all() for level in maps):
                found.append(f"{who} {name}")
    return found


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
