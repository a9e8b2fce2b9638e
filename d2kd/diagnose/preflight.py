"""The pre-flight: checks before the first iteration that the teacher sees what it should.

It runs the teacher on a few training images as configured and in other ways: in the other channel order, with other
pixel statistics, with its classes in another order. If it detects badly, the other ways include images of other sizes,
other anchors and box coders and other statistics of BatchNorm, and parts of its weights are shuffled. A way is named as
the cause only if the teacher's AP comes back with it.
"""

import contextlib
import logging
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Sequence, Tuple

from detectron2.utils import comm
from tabulate import tabulate
from torch import Tensor, nn

from ..complexity import num_parameters
from ..contract import channel_order, num_classes
from ..data.loader import SeededDataset
from ..errors import D2kdError, known_mistakes
from ..keys import key, setting
from ..meta_arch import DistillMetaArch
from ..teacher import Teacher
from .geometry import anchor_variants, coder_variants, size_variants
from .reduced_teacher import check_precision
from .sample import ImageResult, Sample, at_scale, draw
from .variants import ANY_CLASS, Measured, Variant, class_variants, norm_variants, pixel_variants, shuffled

# A loss is clearly lower than another if its mean is below this fraction of the other's, and most images agree.
# Measured on small teachers of three kinds: a trained teacher's loss is 0.05 to 0.92 times that with all weights
# shuffled, a random network's at least 0.96 times.
CLEARLY_LOWER = 0.95
MOST_IMAGES = 0.8  # of those on which the two differ
PRECISION_IMAGES = 4  # on which the gradients of a teacher in reduced precision are compared
# AP50 in percent, on training images. A teacher below the first is examined; networks with random weights stay far
# below the second, so a way with less restores nothing.
WEAK_AP50, RANDOM_AP50 = 25.0, 10.0
# A teacher whose AP is a smaller share of its AP50 localizes badly, and is examined too.
IMPRECISE = 0.45
# AP is clearly higher if it is so many times the configured one, and so many points above it.
RESTORED, POINTS = 1.25, 3.0

_LOG = logging.getLogger(__name__)


class Part(NamedTuple):
    """Weights of a teacher that may be random.

    Attributes:
        prefix: of the names of its parameters.
        name: in messages.
        loss: what grows if they are shuffled.
        below: what a trained part's loss is of that with the part shuffled, at most.
    """

    prefix: str
    name: str
    loss: Callable[[Any], Tensor] = lambda result: result.loss()
    below: float = CLEARLY_LOWER


# From the whole to its parts: if all weights are random, so is each part.
PARTS = [
    Part("", "all weights"),
    Part("backbone.", "the backbone's weights"),
    Part("head.cls", "the class branch of the head", ImageResult.class_loss, 0.98),
    Part("head.bbox", "the box branch of the head", lambda result: result.box_loss, 0.98),
]


def _skip() -> str:
    return f"{setting('MODEL.DISTILL.PREFLIGHT', 0)} skips this check"


def check_teacher(model: nn.Module, loader: Any, num_images: int, amp_dtype: str = "") -> None:
    """Loads a student's teacher if necessary, and checks it on rank 0, which logs a report; the other ranks wait.

    Training is the same with and without this check.

    Args:
        model: the student, not wrapped. Other models are not checked.
        loader: d2kd's training loader.
        num_images: number of images to use, spread evenly over the training set; 0 only loads the teacher.
        amp_dtype: type of mixed precision in training, "" for none.

    Raises:
        D2kdError: on all ranks: the teacher cannot be loaded or is clearly broken; names the cause.
    """
    if not isinstance(model, DistillMetaArch):
        return
    model.prepare_teacher()
    if not (num_images and model.methods):
        return
    verdict = ""
    if comm.is_main_process():
        try:
            with model.teacher.engine.exact():
                examine(model, getattr(loader, "dataset", None), num_images)
        except D2kdError as error:
            verdict = str(error)
    verdict = comm.all_gather(verdict)[0]
    if verdict:
        raise D2kdError(verdict)
    dataset = getattr(loader, "dataset", None)
    if model.teacher.engine.makes_copies and isinstance(dataset, SeededDataset):
        images = draw(dataset, min(num_images, PRECISION_IMAGES), range(model.num_classes))
        check_precision(model, images, amp_dtype)


def examine(model: DistillMetaArch, dataset: Any, num_images: int) -> None:
    """Reports on and judges a student's teacher; see :func:`check_teacher`."""
    assert model.teacher is not None
    own, theirs = shared_classes(model, model.teacher)
    if not own or not isinstance(dataset, SeededDataset):
        report(description(model.teacher))
        reason = "the data loader is not d2kd's" if own else "it has other classes than the student"
        _LOG.warning("Whether the teacher detects anything was not checked: %s.", reason)
        return
    images, teacher = draw(dataset, num_images, own), model.teacher
    if teacher.scale != 1:  # judged in its own pixels
        images, teacher = at_scale(images, teacher.scale), Teacher(teacher.network, teacher.input_format)
    sample = Sample(images, channel_order(model), own, theirs)
    ways = look(sample, teacher)
    parts = shuffle_parts(sample, ways[0])
    measured = [*ways, *(shuffled_part for _, _, shuffled_part in parts)]
    numbers = {"way": "AP, AP50, loss", **{f"  {x.variant.label}": numbers_of(x) for x in measured}}
    report({**description(model.teacher), "images": f"{len(sample.images)} of the training set", **numbers})
    judge(ways, parts, class_is_read=any(method.reads_head for method in model.methods))


def look(sample: Sample, teacher: Teacher) -> List[Measured]:
    """Measures a teacher as configured, and then in other ways; in all of them if it detects badly.

    Raises:
        D2kdError: its outputs are not finite.
    """
    ways = [Variant("as configured", "", teacher).measured(sample)]
    if not ways[0].losses.isfinite().all():
        raise D2kdError(f"the teacher's outputs are not finite: its weights hold NaN or infinity; {_skip()}")
    others = [*pixel_variants(teacher), *(class_variants(sample, teacher) if teacher.is_dense else [])]
    if is_doubtful(ways[0]):
        _LOG.info("The teacher detects badly (AP %.1f, AP50 %.1f); looking for the cause", ways[0].ap, ways[0].ap50)
        others += [*size_variants(teacher), *norm_variants(sample, teacher)]
        others += [*anchor_variants(teacher), *coder_variants(teacher)] if teacher.is_dense else []
    return [*ways, *measurable(sample, others)]


def measurable(sample: Sample, variants: Sequence[Variant]) -> Iterator[Measured]:
    """Measures those ways that the teacher can be used in: it may have norms that small images are too small for."""
    for variant in variants:
        with contextlib.suppress(D2kdError), known_mistakes():
            yield variant.measured(sample)


def is_doubtful(way: Measured) -> bool:
    """Whether a teacher detects hardly anything, or finds objects but not their boxes."""
    return way.ap50 < WEAK_AP50 or way.ap < IMPRECISE * way.ap50


def cause_of(ways: Sequence[Measured]) -> Measured:
    """The way with the highest AP of those that restore it; the first, which is the configured one, if none does."""
    configured = ways[0]
    return max([x for x in ways[1:] if restores(x, configured)], key=lambda x: x.ap, default=configured)


def improves(way: Measured, configured: Measured) -> bool:
    """Whether AP is clearly higher in a way."""
    return way.ap >= RESTORED * configured.ap + POINTS


def restores(way: Measured, configured: Measured) -> bool:
    """Whether AP comes back in a way: it is clearly higher, and not as if something else were wrong too."""
    if not improves(way, configured) or way.ap50 < RANDOM_AP50 or way.ap < IMPRECISE * way.ap50:
        return False
    # Ignoring classes raises the AP of many a sound teacher.
    return way.variant.label != ANY_CLASS or clearly_lower(way.losses, configured.losses)


def shuffle_parts(sample: Sample, configured: Measured) -> List[Tuple[Part, Tensor, Measured]]:
    """Measures a teacher with parts of its weights shuffled; only as a whole if it is sound.

    Returns:
        For each part the losses (N,) that show whether it is random, as configured and with the part shuffled.
    """
    teacher = configured.variant.teacher
    found = []
    for part in PARTS if is_doubtful(configured) and teacher.is_dense else PARTS[:1]:
        own = configured.variant._replace(loss=part.loss).measured(sample).losses
        other = Variant(f"{part.name} shuffled", "", shuffled(teacher, part.prefix), loss=part.loss).measured(sample)
        found.append((part, own, other))
    return found


def judge(ways: Sequence[Measured], parts: Sequence[Tuple[Part, Tensor, Measured]], class_is_read: bool) -> None:
    """Raises D2kdError with the cause if the teacher is clearly broken; warns if it is weak.

    Args:
        ways: from :func:`look`.
        parts: from :func:`shuffle_parts`.
        class_is_read: whether a method reads class predictions; otherwise wrong classes are only a warning.
    """
    configured, cause = ways[0], cause_of(ways)
    if cause is not configured:
        verdict = f"{cause.variant.diagnosis} (AP {cause.ap:.1f} then, {configured.ap:.1f} now); {_skip()}"
        if class_is_read or not cause.variant.of_classes:
            raise D2kdError(verdict)
        _LOG.warning("No method reads classes, but %s", verdict)
    elif is_doubtful(configured):
        # What another use improves is not random.
        for part, own, other in [] if any(improves(way, configured) for way in ways) else parts:
            # Nor is the whole of a network that detects something, though its backbone may matter little.
            if configured.ap50 < RANDOM_AP50 or part.prefix.startswith("head"):
                check_part(part, own, other.losses)
        _LOG.warning(
            "The teacher is weak: AP50 %.1f, AP %.1f on these images; a student will hardly benefit. None of the usual "
            "causes restores it; tried: %s.",
            *(configured.ap50, configured.ap),
            ", ".join(way.variant.label for way in ways[1:]),
        )


def check_part(part: Part, losses: Tensor, others: Tensor) -> None:
    """Raises D2kdError if a teacher's losses (N,) are not clearly below those with a part of its weights shuffled."""
    if not clearly_lower(losses, others, part.below):
        raise D2kdError(
            f"the teacher detects no better (loss {losses.mean():.3f}) than with {part.name} shuffled "
            f"({others.mean():.3f}), as if these were random: set {key('MODEL.DISTILL.TEACHER.WEIGHTS')} to the file "
            f"of a trained detector; {_skip()}"
        )


def clearly_lower(losses: Tensor, others: Tensor, below: float = CLEARLY_LOWER) -> bool:
    """Whether losses (N,) are on average below a fraction of others, and lower on most images."""
    differ = (losses - others).abs() > 1e-3 * others
    agree = (losses < others)[differ].float().mean()
    return bool(losses.mean() < below * others.mean() and agree >= MOST_IMAGES)


def shared_classes(model: DistillMetaArch, teacher: Teacher) -> Tuple[List[int], List[int]]:
    """Indices of the shared classes in student and teacher; none if their numbers of classes differ."""
    if model.shared_classes is not None:
        return model.shared_classes
    same = range(model.num_classes if model.num_classes == num_classes(teacher.detector) else 0)
    return list(same), list(same)


def description(teacher: Teacher) -> Dict[str, str]:
    """Facts about a teacher that need no images."""
    detector = teacher.detector
    trainable = sum(parameter.requires_grad for _, parameter in detector.named_parameters())
    tensors = sum(not name.endswith("num_batches_tracked") for name in detector.state_dict())
    mean, std = ([round(x, 3) for x in v.flatten().tolist()] for v in (detector.pixel_mean, detector.pixel_std))
    return {
        "detector": f"{type(detector).__name__}, {num_classes(detector)} classes",
        "weights": f"{teacher.weights}: all {tensors} tensors matched, none missing"
        if teacher.weights
        else "set in Python",
        "mode": "training" if any(module.training for module in detector.modules()) else "evaluation",
        "parameters": f"{num_parameters(teacher.network) / 1e6:.2f} M, {trainable or 'no'} tensors trainable",
        "input": f"{teacher.input_format}, pixel mean {mean}, std {std}",
    }


def numbers_of(way: Measured) -> str:
    """AP, AP50 and mean loss, for the report."""
    return f"{way.ap:.1f}, {way.ap50:.1f}, {way.losses.mean():.3f}"


def report(rows: Dict[str, str]) -> None:
    """Logs a table."""
    _LOG.info("Teacher pre-flight:\n%s", tabulate(rows.items(), tablefmt="plain", disable_numparse=True))
