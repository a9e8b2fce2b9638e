"""The pre-flight: checks before the first iteration that the teacher sees what it should.

It runs the teacher on a few training images as configured, and in other ways: with shuffled weights, in the other
channel order, with other pixel statistics, with its classes in another order. A sound teacher is clearly better than
with shuffled weights, and no other way is clearly better than the configured one; if one is, it shows what is wrong.
"""

import logging
from typing import Any, Dict, List, Tuple

from detectron2.utils import comm
from tabulate import tabulate
from torch import Tensor, nn

from ..complexity import num_parameters
from ..contract import channel_order, num_classes
from ..data.loader import SeededDataset
from ..errors import D2kdError
from ..keys import key, setting
from ..meta_arch import DistillMetaArch
from ..teacher import Teacher
from .reduced_teacher import check_precision
from .sample import Sample, at_scale, average_precision, draw
from .variants import Variant, class_variants, pixel_variants, shuffled

# A loss is clearly lower than another if its mean is below this fraction of the other's, and most images agree.
# Measured on small teachers of three kinds, good and poor ones, on their own and on other data: with other pixels or
# classes the loss is 0.98 (hardly trained) to 44 times the configured one, or at most 0.7 times if that fixes a
# mistake. A trained teacher's loss is 0.05 to 0.92 times that with all weights shuffled, a random network's at least
# 0.96 times.
CLEARLY_LOWER = 0.95
MOST_IMAGES = 0.8  # of those on which the two differ
PRECISION_IMAGES = 4  # on which the gradients of a teacher in reduced precision are compared
# In percent. Networks with random weights stay far below.
WEAK_AP50 = 10.0
PARTS = {"": "all weights", "backbone.": "the backbone's weights"}  # a random head already shows by the first

_LOG = logging.getLogger(__name__)


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
    precision = average_precision(sample, teacher)
    best, losses = look(sample, teacher)
    what = "detection loss" if teacher.is_dense else "1 - AP of boxes without classes"
    numbers = {"AP, AP50": "{:.1f}, {:.1f}".format(*precision), what: ""}
    numbers.update({f"  {label}": f"{values.mean():.3f}" for label, values in losses.items()})
    report({**description(model.teacher), **numbers, "images": f"{len(sample.images)} of the training set"})
    is_weak = precision[1] < WEAK_AP50
    judge(best, losses, is_weak, class_is_read=any(method.reads_head for method in model.methods))
    if is_weak:
        _LOG.warning("The teacher is weak: AP50 %.1f on these images; a student will hardly benefit.", precision[1])


def look(sample: Sample, teacher: Teacher) -> Tuple[Variant, Dict[str, Tensor]]:
    """Runs the teacher on the sample in all ways.

    Returns:
        The best way, which is the configured one unless another is clearly better, and the loss of each image by way:
        first as configured, then in the other ways, and last in the best way with each of ``PARTS`` shuffled.
    """
    configured = Variant("as configured", "", teacher)
    others = [*pixel_variants(teacher), *(class_variants(sample, teacher) if teacher.is_dense else [])]
    losses = {variant.label: variant.losses(sample) for variant in [configured, *others]}
    better = [v for v in others if clearly_lower(losses[v.label], losses[configured.label])]
    best = min([configured, *better], key=lambda variant: float(losses[variant.label].mean()))
    for part, name in PARTS.items():
        losses[f"{best.label}, {name} shuffled"] = best._replace(teacher=shuffled(best.teacher, part)).losses(sample)
    return best, losses


def judge(best: Variant, losses: Dict[str, Tensor], is_weak: bool, class_is_read: bool) -> None:
    """Raises D2kdError with the cause if the teacher is clearly broken.

    Args:
        best: from :func:`look`.
        losses: from :func:`look`.
        is_weak: whether its AP50 may be that of a random network.
        class_is_read: whether a method reads class predictions; otherwise wrong classes are only a warning.
    """
    configured, found = next(iter(losses.values())), losses[best.label]
    if not found.isfinite().all():
        raise D2kdError(f"the teacher's outputs are not finite: its weights hold NaN or infinity; {_skip()}")
    for name, values in zip(PARTS.values(), list(losses.values())[-len(PARTS) :]):
        if is_weak and not clearly_lower(found, values):
            raise D2kdError(
                f"the teacher detects no better (loss {found.mean():.3f}) than with {name} shuffled "
                f"({values.mean():.3f}), as if these were random: set {key('MODEL.DISTILL.TEACHER.WEIGHTS')} to the "
                f"file of a trained detector; {_skip()}"
            )
    verdict = f"{best.diagnosis} (loss {found.mean():.3f} then, {configured.mean():.3f} now); {_skip()}"
    if best.of_classes and not class_is_read:
        _LOG.warning("No method reads classes, but %s", verdict)
    elif best.diagnosis:
        raise D2kdError(verdict)


def clearly_lower(losses: Tensor, others: Tensor) -> bool:
    """Whether losses (N,) are on average clearly below others, and lower on most images."""
    differ = (losses - others).abs() > 1e-3 * others
    agree = (losses < others)[differ].float().mean()
    return bool(losses.mean() < CLEARLY_LOWER * others.mean() and agree >= MOST_IMAGES)


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


def report(rows: Dict[str, str]) -> None:
    """Logs a table."""
    _LOG.info("Teacher pre-flight:\n%s", tabulate(rows.items(), tablefmt="plain", disable_numparse=True))
