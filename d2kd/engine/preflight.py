"""Before the first iteration: does the teacher see what it should, through the very path distillation uses?

It reads a few training images as configured, and in other ways: with shuffled weights, in the other channel order, with
other pixel statistics, with its classes in another order. A sound teacher is clearly better than its shuffled self, and
no other way is clearly better than the configured one; if one is, it names what is wrong.
"""

import contextlib
import copy
import io
import logging
from itertools import islice
from typing import Any, Callable, Dict, List, MutableMapping, NamedTuple, Sequence, Tuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from detectron2.structures import Instances
from detectron2.utils import comm
from fvcore.nn import sigmoid_focal_loss
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate
from torch import Tensor, nn

from ..dense import preprocess
from ..distill import DistillMetaArch, Teacher
from ..errors import D2kdError
from ..inspection import parameters
from ..losses import giou_loss
from .loader import SeededDataset

# A loss is clearly lower than another if its mean is below this share of the other's, and most images agree.
# Measured on small teachers of three kinds, good and poor ones, on their own and on other data: with other pixels or
# classes the loss is 0.98 (hardly trained) to 44 times the configured one or, if that mends a mistake, 0.7 times and
# less; a trained teacher's loss is 0.05 to 0.92 times that with all weights shuffled, a random network's 0.96 and more.
CLEARLY_LOWER = 0.95
MOST_IMAGES = 0.8  # of those on which the two differ at all
# Percent. Networks with random weights stay far below it.
WEAK_AP50 = 10.0

# Mean and deviation of pixels, BGR, that detectors are commonly trained with.
IMAGENET_MEAN = (103.53, 116.28, 123.675)
PIXEL_STATISTICS = (
    (IMAGENET_MEAN, (1.0, 1.0, 1.0)),  # detectron2's zoo
    (IMAGENET_MEAN, (57.375, 57.12, 58.395)),  # torchvision
    ((0.0, 0.0, 0.0), (255.0, 255.0, 255.0)),
    ((127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
)
PARTS = {"": "all weights", "backbone.": "the backbone's weights"}  # a random head already shows by the first
WHERE = "in the teacher's own config or by MODEL.DISTILL.TEACHER.OPTS (LazyConfig: model.teacher.opts)"
SKIP = "MODEL.DISTILL.PREFLIGHT 0 (LazyConfig: train.preflight=0) skips this check"

_LOG = logging.getLogger(__name__)


class Reading(NamedTuple):
    """What a teacher says of one image. S classes, P positive anchors.

    Attributes:
        background: class loss of each class if every anchor were background, (S,).
        logits: class logits of the positive anchors, (P, S).
        labels: classes of the positive anchors, (P,) in 0..S-1.
        box_loss: mean GIoU loss of the positive anchors, ().
    """

    background: Tensor
    logits: Tensor
    labels: Tensor
    box_loss: Tensor

    def loss(self) -> Tensor:
        """Detection loss of the image, (): focal loss per positive anchor plus GIoU loss.

        The same for all detectors; their own losses keep running means and wait for other workers.
        """
        return self.loss_with(self.logits)

    def loss_with(self, logits: Tensor) -> Tensor:
        """The same with other logits (P, S) at the positive anchors."""
        one_hot = F.one_hot(self.labels, logits.shape[1])
        positive = focal_loss(logits, one_hot) - focal_loss(self.logits, torch.zeros_like(one_hot))
        class_loss = (self.background.sum() + positive.sum()) / max(len(self.labels), 1)
        return torch.nan_to_num(class_loss + self.box_loss, nan=torch.inf)


class Variant(NamedTuple):
    """A way of reading images with a teacher.

    Attributes:
        label: its name in the report.
        diagnosis: what is wrong, and the mend, if this way is clearly better than the configured one.
        teacher: reads the images.
        loss: judges its readings.
        of_classes: it concerns the classes alone.
    """

    label: str
    diagnosis: str
    teacher: Teacher
    loss: Callable[[Reading], Tensor] = Reading.loss
    of_classes: bool = False


class Sample:
    """Images to read, with ground truth.

    Args:
        images: as the training loader gives them, but with classes that count among the shared ones, 0..S-1.
        input_format: their channel order.
        own: the shared classes as the student counts them.
        theirs: the same as the teacher counts them.
    """

    def __init__(
        self, images: List[Dict[str, Any]], input_format: str, own: Sequence[int], theirs: Sequence[int]
    ) -> None:
        self.images = images
        self.input_format = input_format
        self.own, self.theirs = list(own), list(theirs)
        self._readings: MutableMapping[Teacher, List[Reading]] = WeakKeyDictionary()

    def readings(self, teacher: Teacher) -> List[Reading]:
        """What a teacher says of each image."""
        if teacher not in self._readings:
            self._readings[teacher] = [self._read(teacher, image) for image in self.images]
        return self._readings[teacher]

    def losses(self, variant: Variant) -> Tensor:
        """Loss of each image, (N,)."""
        return torch.stack([variant.loss(reading) for reading in self.readings(variant.teacher)])

    # One image at a time: the loss of each counts, and memory is that of one.
    def _read(self, teacher: Teacher, image: Dict[str, Any]) -> Reading:
        outputs, detector = teacher([image], self.input_format), teacher.detector
        instances = image["instances"].to(detector.device)
        labels, boxes = (found[0] for found in detector.label_anchors(outputs.anchors_per_level, [instances]))
        positive = (labels >= 0) & (labels < detector.num_classes)
        logits = outputs.logits[0][:, self.theirs]
        valid = logits[labels >= 0]
        box_losses = giou_loss(outputs.boxes[0][positive], boxes[positive])
        return Reading(
            background=focal_loss(valid, torch.zeros_like(valid)).sum(0).cpu(),
            logits=logits[positive].cpu(),
            labels=labels[positive].cpu(),
            box_loss=(box_losses.sum() / max(len(box_losses), 1)).cpu(),
        )

    @torch.no_grad()
    def detections(self, teacher: Teacher) -> List[Instances]:
        """Detections of the shared classes in each image."""
        found = []
        for image in self.images:
            outputs = teacher([image], self.input_format)
            images = preprocess(teacher.detector, [image])  # read for its size only
            (instances,) = teacher.detector.forward_inference(images, outputs.features, outputs.predictions)
            found.append(renumbered(instances.to("cpu"), "pred_classes", self.theirs))
        return found


def check_teacher(model: nn.Module, loader: Any, num_images: int) -> None:
    """Checks a student's teacher on rank 0 and logs what it sees; the other ranks wait and learn the verdict.

    Training is the same with and without this check.

    Args:
        model: the student, not wrapped. Without methods there is nothing to check.
        loader: d2kd's training loader.
        num_images: how many images to look at, spread evenly over the training set; 0 skips the check.

    Raises:
        D2kdError: the teacher is clearly broken. Names the cause; on all ranks.
    """
    if not (num_images and isinstance(model, DistillMetaArch) and model.methods):
        return
    verdict = ""
    if comm.is_main_process():
        try:
            examine(model, getattr(loader, "dataset", None), num_images)
        except D2kdError as error:
            verdict = str(error)
    verdict = comm.all_gather(verdict)[0]
    if verdict:
        raise D2kdError(verdict)


def examine(model: DistillMetaArch, dataset: Any, num_images: int) -> None:
    """Describes and judges a student's teacher; see :func:`check_teacher`."""
    assert model.teacher is not None
    own, theirs = shared_classes(model, model.teacher)
    if not own or not isinstance(dataset, SeededDataset):
        report(description(model.teacher))
        reason = "the data loader is not d2kd's" if own else "it has other classes than the student"
        _LOG.warning("Whether the teacher detects anything was not checked: %s.", reason)
        return
    sample = Sample(draw(dataset, num_images, own), getattr(model, "input_format", "BGR"), own, theirs)
    precision = average_precision(sample, model.teacher)
    best, losses = look(sample, model.teacher)
    numbers = {"AP, AP50": "{:.1f}, {:.1f}".format(*precision), "detection loss": ""}
    numbers.update({f"  {label}": f"{values.mean():.3f}" for label, values in losses.items()})
    report({**description(model.teacher), **numbers, "images": f"{len(sample.images)} of the training set"})
    is_weak = precision[1] < WEAK_AP50
    judge(best, losses, is_weak, class_is_read=any(method.reads_head for method in model.methods))
    if is_weak:
        _LOG.warning("The teacher is weak: AP50 %.1f on these images; a student will hardly profit.", precision[1])


def look(sample: Sample, teacher: Teacher) -> Tuple[Variant, Dict[str, Tensor]]:
    """Reads the sample in all ways.

    Returns:
        The best way, which is the configured one unless another is clearly better, and the losses of each image by way:
        first as configured, then the other ways, and last the best way with weights of each of ``PARTS`` shuffled.
    """
    configured = Variant("as configured", "", teacher)
    others = [*pixel_variants(teacher), *class_variants(sample, teacher)]
    losses = {variant.label: sample.losses(variant) for variant in [configured, *others]}
    better = [v for v in others if clearly_lower(losses[v.label], losses[configured.label])]
    best = min([configured, *better], key=lambda variant: float(losses[variant.label].mean()))
    for part, name in PARTS.items():
        losses[f"{best.label}, {name} shuffled"] = sample.losses(best._replace(teacher=shuffled(best.teacher, part)))
    return best, losses


def judge(best: Variant, losses: Dict[str, Tensor], is_weak: bool, class_is_read: bool) -> None:
    """Raises D2kdError with the cause if the teacher is clearly broken.

    Args:
        best: see :func:`look`.
        losses: likewise.
        is_weak: its AP50 is no more than a random network's may be.
        class_is_read: whether a method reads class predictions; else wrong classes are worth a warning only.
    """
    configured, found = next(iter(losses.values())), losses[best.label]
    if not found.isfinite().all():
        raise D2kdError(f"the teacher's outputs are not finite: its weights hold NaN or infinity; {SKIP}")
    for name, values in zip(PARTS.values(), list(losses.values())[-len(PARTS) :]):
        if is_weak and not clearly_lower(found, values):
            raise D2kdError(
                f"the teacher detects no better (loss {found.mean():.3f}) than with {name} shuffled "
                f"({values.mean():.3f}), as if these were random: set MODEL.DISTILL.TEACHER.WEIGHTS to the file of a "
                f"trained detector; {SKIP}"
            )
    verdict = f"{best.diagnosis} (loss {found.mean():.3f} then, {configured.mean():.3f} now); {SKIP}"
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
    """Classes that the student and its teacher share, as each counts them; none where their numbers differ."""
    if model._classes is not None:
        return model._classes
    same = range(model.num_classes if model.num_classes == teacher.detector.num_classes else 0)
    return list(same), list(same)


def draw(dataset: SeededDataset, num_images: int, classes: Sequence[int]) -> List[Dict[str, Any]]:
    """Draws images that show some of the classes, evenly spaced and always the same.

    Args:
        dataset: of the training loader.
        num_images: at most so many.
        classes: what counts; in the result they are numbered from 0.

    Raises:
        D2kdError: no such image is among the first that were looked at.
    """
    size = len(dataset.dataset)
    step = max(size // num_images, 1)
    order = [index for start in range(step) for index in range(start, size, step)][: 8 * num_images]
    samples = (dataset[index, position] for position, index in enumerate(order))
    annotated = ({**x, "instances": renumbered(x["instances"], "gt_classes", classes)} for x in samples)
    found = list(islice((x for x in annotated if len(x["instances"])), num_images))
    if not found:
        raise D2kdError(f"none of {len(order)} training images has an annotation of a class that the teacher knows")
    return found


def renumbered(instances: Instances, field: str, classes: Sequence[int]) -> Instances:
    """The instances of some classes alone, numbered from 0 in the order of ``classes``."""
    known = instances.get(field)
    new = torch.full((max([*known.tolist(), *classes]) + 1,), -1)
    new[list(classes)] = torch.arange(len(classes))
    kept = instances[new[known] >= 0]
    kept.set(field, new[kept.get(field)])
    return kept


def focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Focal loss (arXiv 1708.02002) of each number with its authors' alpha and gamma."""
    return sigmoid_focal_loss(logits.float(), targets.float(), alpha=0.25, gamma=2.0)


def pixel_variants(teacher: Teacher) -> List[Variant]:
    """The teacher in the other channel order, and with other pixel statistics."""
    order = teacher.input_format
    own = [x.flatten().tolist() for x in (teacher.detector.pixel_mean, teacher.detector.pixel_std)]
    other = "RGB" if order == "BGR" else "BGR"
    diagnosis = f"the teacher seems to expect {other} and gets {order}: set INPUT.FORMAT {other} {WHERE}"
    variants = [Variant(f"channel order {other}", diagnosis, with_pixels(teacher, other, *own))]
    for pair in PIXEL_STATISTICS:
        mean, std = ([*x[::-1]] if order == "RGB" else [*x] for x in pair)
        if not torch.allclose(torch.tensor([mean, std]), torch.tensor(own)):
            diagnosis = (
                f"the teacher seems to expect pixels of another scale: set MODEL.PIXEL_MEAN {mean} and MODEL.PIXEL_STD "
                f"{std} {WHERE}"
            )
            variants.append(Variant(f"pixel mean {mean}, std {std}", diagnosis, with_pixels(teacher, order, mean, std)))
    return variants


def with_pixels(teacher: Teacher, input_format: str, mean: Sequence[float], std: Sequence[float]) -> Teacher:
    """The same teacher, its weights shared, with another channel order and other pixel statistics."""
    detector = copy.copy(teacher.detector)
    detector._buffers = dict(detector._buffers)  # otherwise the teacher's own would change
    for name, values in (("pixel_mean", mean), ("pixel_std", std)):
        detector._buffers[name] = detector.pixel_mean.new_tensor(values).view(-1, 1, 1)
    return Teacher(detector, input_format)


def shuffled(teacher: Teacher, part: str) -> Teacher:
    """A copy of the teacher, the numbers within each parameter of a part shuffled; ``part`` starts their names."""
    detector = copy.deepcopy(teacher.detector)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in detector.named_parameters():
        if name.startswith(part):
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.data = parameter.flatten()[order].view_as(parameter)
    return Teacher(detector, teacher.input_format)


def class_variants(sample: Sample, teacher: Teacher) -> List[Variant]:
    """The teacher with its classes in the order that fits best, and without any knowledge of classes."""
    readings = sample.readings(teacher)
    order = best_class_order(readings)
    shares = class_shares(readings)
    # Of classes that the sample does not show nothing is known.
    pairs = tuple((sample.own[i], sample.theirs[k]) for i, k in enumerate(order) if shares[i] > 0)

    def by_share(reading: Reading) -> Tensor:
        objectness = reading.logits.sigmoid().amax(1, keepdim=True)
        return reading.loss_with(torch.logit(objectness * shares, eps=1e-6))

    permuted = (
        "the teacher counts its classes in another order than the student: set MODEL.DISTILL.CLASS_MAP (LazyConfig: "
        f"model.class_map), pairs of student's and teacher's, to {pairs}"
    )
    unknown = (
        "the teacher finds the objects but seems to know other classes, since guessing by frequency would be better: "
        "train it on the student's classes, or use methods that read features only"
    )
    return [
        Variant(f"classes {order}", permuted, teacher, lambda r: r.loss_with(r.logits[:, order]), of_classes=True),
        Variant("classes guessed by frequency", unknown, teacher, by_share, of_classes=True),
    ]


def best_class_order(readings: Sequence[Reading]) -> List[int]:
    """Which of the teacher's outputs to take for each class so that the loss is lowest, (S,).

    Starts from the order as it is and exchanges two as long as that helps.
    """
    logits, labels = (torch.cat([getattr(r, name) for r in readings]) for name in ("logits", "labels"))
    size = logits.shape[1]
    of_output = focal_loss(logits, torch.ones_like(logits)) - focal_loss(logits, torch.zeros_like(logits))
    cost = torch.zeros(size, size).index_add_(0, labels, of_output)  # [class, output]
    order = torch.arange(size)
    for _ in range(size):
        now = cost[:, order]
        change = now + now.T - now.diagonal() - now.diagonal()[:, None]  # of exchanging the outputs of two classes
        if not change.min() < -1e-6:
            break
        one, two = divmod(int(change.argmin()), size)
        order[[one, two]] = order[[two, one]]
    return order.tolist()


def class_shares(readings: Sequence[Reading]) -> Tensor:
    """Share of each class in the positive anchors, (S,)."""
    counts = torch.bincount(torch.cat([r.labels for r in readings]), minlength=readings[0].logits.shape[1])
    return counts / counts.sum().clamp(min=1)


def average_precision(sample: Sample, teacher: Teacher) -> Tuple[float, float]:
    """COCO's AP and AP50 of the teacher on the sample, in percent."""
    truths = [renumbered(image["instances"], "gt_classes", range(len(sample.own))) for image in sample.images]
    annotations = [a for i, x in enumerate(truths) for a in coco_entries(i, x.gt_boxes.tensor, x.gt_classes)]
    found = [(i, x) for i, x in enumerate(sample.detections(teacher))]
    results = [
        {**entry, "score": float(score)}
        for i, x in found
        for entry, score in zip(coco_entries(i, x.pred_boxes.tensor, x.pred_classes), x.scores)
    ]
    if not results:  # pycocotools cannot read an empty list
        return 0.0, 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": i} for i in range(len(truths))],
            "categories": [{"id": k} for k in range(len(sample.own))],
            "annotations": [{**entry, "id": i, "iscrowd": 0} for i, entry in enumerate(annotations, 1)],
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * float(evaluation.stats[0]), 100 * float(evaluation.stats[1])


def coco_entries(image_id: int, boxes: Tensor, classes: Tensor) -> List[Dict[str, Any]]:
    """Boxes (M, 4) XYXY of one image in COCO's format."""
    sizes = boxes[:, 2:] - boxes[:, :2]
    return [
        {"image_id": image_id, "category_id": k, "bbox": [*corner, *size], "area": size[0] * size[1]}
        for k, corner, size in zip(classes.tolist(), boxes[:, :2].tolist(), sizes.tolist())
    ]


def description(teacher: Teacher) -> Dict[str, str]:
    """What there is to say of a teacher before it reads anything."""
    detector = teacher.detector
    trainable = sum(parameter.requires_grad for parameter in detector.parameters())
    tensors = sum(not name.endswith("num_batches_tracked") for name in detector.state_dict())
    mean, std = ([round(x, 3) for x in v.flatten().tolist()] for v in (detector.pixel_mean, detector.pixel_std))
    return {
        "detector": f"{type(detector).__name__}, {detector.num_classes} classes",
        "weights": f"{teacher.weights}: all {tensors} tensors matched, none missing" if teacher.weights else "by code",
        "mode": "training" if any(module.training for module in detector.modules()) else "evaluation",
        "parameters": f"{parameters(detector) / 1e6:.2f} M, {trainable or 'no'} tensors trainable",
        "input": f"{teacher.input_format}, pixel mean {mean}, std {std}",
    }


def report(rows: Dict[str, str]) -> None:
    """Logs a table."""
    _LOG.info("Teacher pre-flight:\n%s", tabulate(rows.items(), tablefmt="plain", disable_numparse=True))
