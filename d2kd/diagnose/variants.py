"""Other ways to use a teacher: if one of them is clearly better than the configured one, it shows what is wrong."""

import copy
from typing import Any, Callable, List, NamedTuple, Sequence

import torch
from torch import Tensor, nn

from ..dense import preprocess
from ..keys import key
from ..teacher import Teacher
from .sample import ImageResult, Sample, average_precision, focal_loss

# Common means and deviations of pixels, BGR.
IMAGENET_MEAN = (103.53, 116.28, 123.675)
PIXEL_STATISTICS = (
    (IMAGENET_MEAN, (1.0, 1.0, 1.0)),  # detectron2's zoo
    (IMAGENET_MEAN, (57.375, 57.12, 58.395)),  # torchvision
    ((0.0, 0.0, 0.0), (255.0, 255.0, 255.0)),
    ((127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
)
#: Label of the way that ignores classes.
ANY_CLASS = "any class"


def where() -> str:
    """Where a teacher's own settings are."""
    return f"in the teacher's own config or by {key('MODEL.DISTILL.TEACHER.OPTS')}"


class Variant(NamedTuple):
    """A way to use a teacher.

    Attributes:
        label: its name in the report.
        diagnosis: what is wrong, and the fix, if this way is clearly better than the configured one.
        teacher: the teacher as used in this way.
        see: changes the sample.
        loss: computes the loss of an image from the teacher's result.
        of_classes: whether it concerns only the classes.
    """

    label: str
    diagnosis: str
    teacher: Teacher
    see: Callable[[Sample], Sample] = lambda sample: sample
    loss: Callable[[Any], Tensor] = lambda result: result.loss()
    of_classes: bool = False

    def measured(self, sample: Sample) -> "Measured":
        """Measures the teacher on a sample."""
        seen = self.see(sample)
        losses = torch.stack([self.loss(result) for result in seen.results(self.teacher)])
        return Measured(self, losses, *average_precision(seen, self.teacher))


class Measured(NamedTuple):
    """How well a teacher detects if it is used in one way.

    Attributes:
        variant: the way.
        losses: of each image, (N,).
        ap: COCO AP, in percent.
        ap50: COCO AP50, in percent.
    """

    variant: Variant
    losses: Tensor
    ap: float
    ap50: float


def pixel_variants(teacher: Teacher) -> List[Variant]:
    """The teacher in the other channel order, and with other pixel statistics."""
    order = teacher.input_format
    own = [x.flatten().tolist() for x in (teacher.detector.pixel_mean, teacher.detector.pixel_std)]
    other = "RGB" if order == "BGR" else "BGR"
    diagnosis = f"the teacher seems to expect {other} and gets {order}: set INPUT.FORMAT {other} {where()}"
    variants = [Variant(f"channel order {other}", diagnosis, with_pixels(teacher, other, *own))]
    for pair in PIXEL_STATISTICS:
        mean, std = ([*x[::-1]] if order == "RGB" else [*x] for x in pair)
        if not torch.allclose(torch.tensor([mean, std]), torch.tensor(own)):
            diagnosis = (
                f"the teacher seems to expect pixels of another scale: set MODEL.PIXEL_MEAN {mean} and MODEL.PIXEL_STD "
                f"{std} {where()}"
            )
            variants.append(Variant(f"pixel mean {mean}, std {std}", diagnosis, with_pixels(teacher, order, mean, std)))
    return variants


def with_pixels(teacher: Teacher, input_format: str, mean: Sequence[float], std: Sequence[float]) -> Teacher:
    """The same teacher with another channel order and other pixel statistics; it shares the weights."""
    changed = with_parts(teacher)
    for name, values in (("pixel_mean", mean), ("pixel_std", std)):
        changed.network._buffers[name] = teacher.detector.pixel_mean.new_tensor(values).view(-1, 1, 1)
    changed.input_format = input_format
    return changed


def with_parts(teacher: Teacher, **parts: Any) -> Teacher:
    """The same teacher with other parts (attributes of the detector); it shares the weights."""
    teacher.prepare()
    detector = copy.copy(teacher.network)
    detector._modules, detector._buffers = dict(detector._modules), dict(detector._buffers)  # not the teacher's own
    for name, part in parts.items():
        setattr(detector, name, part)
    return Teacher(detector, teacher.input_format)


def norm_variants(sample: Sample, teacher: Teacher) -> List[Variant]:
    """The teacher with the BatchNorm statistics of the sample, if it has BatchNorm."""
    teacher.prepare()
    changed = Teacher(copy.deepcopy(teacher.network), teacher.input_format)
    norms = [module for module in changed.network.modules() if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm))]
    if not norms:
        return []
    for norm in norms:
        norm.train().reset_running_stats()
        norm.momentum = None  # a plain average over the images
    with torch.no_grad():
        for image in sample.images:
            images = preprocess(changed.detector, [image], sample.input_format != changed.input_format)
            changed.detector.backbone(images.tensor)
    changed.network.eval()
    diagnosis = (
        "the teacher's BatchNorm statistics do not fit its weights, as if they had been reset: set "
        f"{key('MODEL.DISTILL.TEACHER.WEIGHTS')} to a file that holds running_mean and running_var of its training"
    )
    return [Variant("BatchNorm statistics of these images", diagnosis, changed)]


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
    shares = class_shares(results)
    # There is no other order of a single class, but other classes.
    single = len(sample.theirs) == 1
    order = [best_single_class(sample, teacher)] if single else [sample.theirs[k] for k in best_class_order(results)]
    # Leave out classes that the sample does not show.
    pairs = tuple((own, theirs) for own, theirs, share in zip(sample.own, order, shares) if share > 0)

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
        Variant(f"classes {order}", permuted, teacher, lambda seen: seen.with_classes(order), of_classes=True),
        Variant(ANY_CLASS, unknown, teacher, Sample.without_classes, by_share, of_classes=True),
    ]


def best_single_class(sample: Sample, teacher: Teacher) -> int:
    """The teacher's class with the lowest loss on a sample of one class."""

    def loss(k: int) -> float:
        return float(sum(result.loss() for result in sample.with_classes([k]).results(teacher)))

    return min(range(teacher.detector.num_classes), key=loss)


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
