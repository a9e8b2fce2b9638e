"""The dry run: how student, teacher and methods fit together, and the gradient of each loss at the FPN."""

from collections import Counter
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Tuple, cast

from detectron2.utils.events import EventStorage
from fvcore.nn import parameter_count
from tabulate import tabulate
from torch import Tensor, nn

from ..complexity import Complexity, measure
from ..contract import channel_order, level_names, levels, num_classes
from ..errors import D2kdError
from ..heads import Cut
from ..keys import key
from .gradients import gradient_ratios, weight_warnings

if TYPE_CHECKING:
    from ..meta_arch import DistillMetaArch


# How long the latency of each detector is measured, at least, in seconds.
LATENCY_SECONDS = 0.3


def dry_run(model: nn.Module, batch: List[Dict[str, Any]], size: Optional[Tuple[int, int]] = None) -> str:
    """Runs one batch through a student and its teacher and describes what happens, without training.

    Args:
        model: a :class:`DistillMetaArch` with methods, in training mode.
        batch: images with annotations, as :class:`DatasetMapper` returns them.
        size: height and width in pixels of the image with which the cost of both detectors is measured; by default the
            size of the first one.

    Returns:
        Tables of the detectors, of the methods, and of all losses with their gradients, then warnings, if any.

    Raises:
        D2kdError: the model has no methods.
    """
    if not getattr(model, "methods", ()):
        methods = key("MODEL.DISTILL.METHODS")
        raise D2kdError(f"--dry-run shows what methods do, but the config has none: set {methods}")
    student: DistillMetaArch = model  # type: ignore[assignment]
    with EventStorage():
        observation = student.observe(batch)
        losses = student.losses_of(observation)
    height, width = size or batch[0]["image"].shape[-2:]
    names = list(student.distill)
    ratios = gradient_ratios(losses, names, observation.student.features)
    weighted = {name: method for name, method in student.distill.items() if hasattr(method, "weight")}
    weights = {name: cast(float, method.weight) for name, method in weighted.items()}
    warnings = [f"warning: {text}" for text in weight_warnings(ratios, names, weights)]
    return "\n\n".join(
        [detector_tables(student, (height, width)), method_table(student), loss_table(losses, ratios), *warnings]
    )


def detector_tables(model: "DistillMetaArch", size: Tuple[int, int]) -> str:
    """Tables of student and teacher, as a whole and level by level; size as for :func:`dry_run`."""
    assert model.teacher is not None
    both = (model, model.teacher.architecture)
    costs = [_cost(model, size), _cost(model.teacher.network, size, model.teacher.scale)]
    whole: List[List[Any]] = [
        ["detector", *(type(detector).__name__ for detector in both)],
        ["parameters", *(f"{cost.parameters / 1e6:.2f} M" for cost in costs)],
        [f"MACs, {size[0]} x {size[1]}", *(f"{cost.macs / 1e9:.3g} G" for cost in costs)],
        [f"latency, {model.device.type}", *(f"{cost.latency_ms:.0f} ms" for cost in costs)],
        ["classes", *(num_classes(detector) for detector in both)],
        ["channel order", channel_order(model), model.teacher.input_format],
    ]
    if model.teacher.scale != 1:
        whole.append(["image scale", 1, model.teacher.scale])
    own, theirs = _levels(model), _levels(model.teacher.architecture, model.teacher.scale)
    partners = [(pair.own, theirs[pair.theirs]) for pair in model.level_pairs]
    left_out = [(i, ["none"] * len(level)) for i, level in enumerate(own) if i not in dict(partners)]
    rows = [[f"{x} / {y}" for x, y in zip(own[i], partner)] for i, partner in [*partners, *left_out]]
    headers = ["level (student / teacher)", "stride", "channels", "anchors per place"]
    return "\n\n".join(
        [
            tabulate(whole, headers=["", "student", "teacher"], tablefmt="simple", disable_numparse=True),
            tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True),
        ]
    )


def _cost(detector: nn.Module, size: Tuple[int, int], scale: float = 1.0) -> Complexity:
    """What one image costs, decoding and NMS included, with the weights that the detector has now."""
    height, width = (round(side * scale) for side in size)
    return measure(detector, (height, width), LATENCY_SECONDS)


def _levels(detector: Any, scale: float = 1.0) -> List[List[str]]:
    """Name, stride in the student's pixels, channels and anchors per place of each level."""
    generator = getattr(detector, "anchor_generator", None)  # of a dense detector
    shapes = levels(detector)
    anchors = generator.num_anchors if generator is not None else ["-"] * len(shapes)
    return [
        [name, f"{shape.stride / scale:g}", str(shape.channels), str(count)]
        for name, shape, count in zip(level_names(detector), shapes, anchors)
    ]


def method_table(model: "DistillMetaArch") -> str:
    """A table of what each method reads and of its adapters."""
    rows = []
    maps = ", ".join(own if own == theirs else f"{own} : {theirs}" for own, theirs in model.paths) or "FPN features"
    for method in model.methods:
        reads = "predictions" if method.reads_head else maps
        cuts = ", ".join(describe_cuts(*pair) for pair in zip(method.cuts, method.teacher_cuts))
        trained = parameter_count(method)[""]
        kinds = Counter(type(m).__name__ for m in method.modules() if m._parameters)
        adapters = (
            f"{trained} parameters: {', '.join(f'{n} {kind}' for kind, n in kinds.items())}" if trained else "none"
        )
        rows.append([type(method).__name__, f"{reads}, {cuts}" if cuts else reads, adapters])
    return tabulate(rows, headers=["method", "reads", "trains"], tablefmt="simple")


def describe_cuts(own: Cut, theirs: Cut) -> str:
    """Where a method cuts the towers of student and teacher."""
    convs = f"{own.convs}" if own == theirs else f"{own.convs} : {theirs.convs}"
    return f"cut {convs}{' before activation' if own.pre_activation else ''}"


def loss_table(losses: Mapping[str, Tensor], ratios: Mapping[str, float]) -> str:
    """A table of each loss and its gradient relative to that of the student's own losses."""
    rows = [[key, f"{value.item():.4g}", f"{ratios[key]:.3g}"] for key, value in losses.items()]
    return tabulate(rows, headers=["loss", "value", "gradient at the FPN"], tablefmt="simple", disable_numparse=True)
