"""Other ways to use a teacher: if one of them is clearly better than the configured one, it shows what is wrong."""

import copy
from typing import Any, Callable, List, NamedTuple, Sequence

import torch
from torch import Tensor

from ..keys import key
from ..teacher import Teacher
from .sample import ImageResult, Sample, focal_loss

# Common means and deviations of pixels, BGR.
IMAGENET_MEAN = (103.53, 116.28, 123.675)
PIXEL_STATISTICS = (
    (IMAGENET_MEAN, (1.0, 1.0, 1.0)),  # detectron2's zoo
    (IMAGENET_MEAN, (57.375, 57.12, 58.395)),  # torchvision
    ((0.0, 0.0, 0.0), (255.0, 255.0, 255.0)),
    ((127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
)


def _where() -> str:
    return f"in the teacher's own config or by {key('MODEL.DISTILL.TEACHER.OPTS')}"


class Variant(NamedTuple):
    """A way to use a teacher.

    Attributes:
        label: its name in the report.
        diagnosis: what is wrong, and the fix, if this way is clearly better than the configured one.
        teacher: the teacher as used in this way.
        loss: computes the loss of an image from the teacher's result.
        of_classes: whether it concerns only the classes.
    """

    label: str
    diagnosis: str
    teacher: Teacher
    loss: Callable[[Any], Tensor] = lambda result: result.loss()
    of_classes: bool = False

    def losses(self, sample: Sample) -> Tensor:
        """Loss of each image, (N,)."""
        return torch.stack([self.loss(result) for result in sample.results(self.teacher)])


def pixel_variants(teacher: Teacher) -> List[Variant]:
    """The teacher in the other channel order, and with other pixel statistics."""
    order = teacher.input_format
    own = [x.flatten().tolist() for x in (teacher.detector.pixel_mean, teacher.detector.pixel_std)]
    other = "RGB" if order == "BGR" else "BGR"
    diagnosis = f"the teacher seems to expect {other} and gets {order}: set INPUT.FORMAT {other} {_where()}"
    variants = [Variant(f"channel order {other}", diagnosis, with_pixels(teacher, other, *own))]
    for pair in PIXEL_STATISTICS:
        mean, std = ([*x[::-1]] if order == "RGB" else [*x] for x in pair)
        if not torch.allclose(torch.tensor([mean, std]), torch.tensor(own)):
            diagnosis = (
                f"the teacher seems to expect pixels of another scale: set MODEL.PIXEL_MEAN {mean} and MODEL.PIXEL_STD "
                f"{std} {_where()}"
            )
            variants.append(Variant(f"pixel mean {mean}, std {std}", diagnosis, with_pixels(teacher, order, mean, std)))
    return variants


def with_pixels(teacher: Teacher, input_format: str, mean: Sequence[float], std: Sequence[float]) -> Teacher:
    """The same teacher with another channel order and other pixel statistics; it shares the weights."""
    teacher.prepare()
    detector = copy.copy(teacher.network)
    detector._buffers = dict(detector._buffers)  # do not change the teacher's own
    for name, values in (("pixel_mean", mean), ("pixel_std", std)):
        detector._buffers[name] = teacher.detector.pixel_mean.new_tensor(values).view(-1, 1, 1)
    return Teacher(detector, input_format)


def shuffled(teacher: Teacher, part: str) -> Teacher:
    """A copy of the teacher with the values inside each parameter shuffled, if its name starts with ``part``."""
    teacher.prepare()
    detector = copy.deepcopy(teacher.network)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in detector.named_parameters():
        if name.startswith(part):
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.data = parameter.flatten()[order].view_as(parameter)
    return Teacher(detector, teacher.input_format)


def class_variants(sample: Sample, teacher: Teacher) -> List[Variant]:
    """The teacher with its classes in the order that fits best, and with classes guessed by their frequency."""
    results = sample.results(teacher)
    order = best_class_order(results)
    shares = class_shares(results)
    # Leave out classes that the sample does not show.
    pairs = tuple((sample.own[i], sample.theirs[k]) for i, k in enumerate(order) if shares[i] > 0)

    def by_share(result: ImageResult) -> Tensor:
        objectness = result.logits.sigmoid().amax(1, keepdim=True)
        return result.loss_with(torch.logit(objectness * shares, eps=1e-6))

    permuted = (
        "the teacher counts its classes in another order than the student: set "
        f"{key('MODEL.DISTILL.CLASS_MAP')}, pairs of student's and teacher's, to {pairs}"
    )
    unknown = (
        "the teacher finds the objects but seems to know other classes, since guessing by frequency would be better: "
        "train it on the student's classes, or use methods that read features only"
    )
    return [
        Variant(f"classes {order}", permuted, teacher, lambda r: r.loss_with(r.logits[:, order]), of_classes=True),
        Variant("classes guessed by frequency", unknown, teacher, by_share, of_classes=True),
    ]


def best_class_order(results: Sequence[ImageResult]) -> List[int]:
    """For each class, the output of the teacher to use for the lowest loss, (S,).

    Starts from the present order and swaps two classes as long as that helps.
    """
    logits, labels = (torch.cat([getattr(r, name) for r in results]) for name in ("logits", "labels"))
    size = logits.shape[1]
    of_output = focal_loss(logits, torch.ones_like(logits)) - focal_loss(logits, torch.zeros_like(logits))
    cost = torch.zeros(size, size).index_add_(0, labels, of_output)  # [class, output]
    order = torch.arange(size)
    for _ in range(size):
        now = cost[:, order]
        change = now + now.T - now.diagonal() - now.diagonal()[:, None]  # from swapping two classes
        if not change.min() < -1e-6:
            break
        one, two = divmod(int(change.argmin()), size)
        order[[one, two]] = order[[two, one]]
    return order.tolist()


def class_shares(results: Sequence[ImageResult]) -> Tensor:
    """Share of each class in the positive anchors, (S,)."""
    counts = torch.bincount(torch.cat([r.labels for r in results]), minlength=results[0].logits.shape[1])
    return counts / counts.sum().clamp(min=1)
