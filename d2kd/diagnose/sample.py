"""A teacher on a few training images: losses that are comparable between detectors, and AP."""

import contextlib
import io
from itertools import islice
from typing import Any, Dict, List, MutableMapping, NamedTuple, Sequence, Tuple, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances
from fvcore.nn import sigmoid_focal_loss
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from ..contract import DenseStudent
from ..data.loader import SeededDataset
from ..dense import preprocess, resized
from ..errors import D2kdError
from ..losses import giou_loss
from ..teacher import Teacher


class ImageResult(NamedTuple):
    """What a teacher predicts for one image. S classes, P positive anchors.

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

        It is the same for all detectors. Their own losses keep running means and synchronize workers.
        """
        return self.loss_with(self.logits)

    def loss_with(self, logits: Tensor) -> Tensor:
        """The loss with other logits (P, S) at the positive anchors."""
        one_hot = F.one_hot(self.labels, logits.shape[1])
        positive = focal_loss(logits, one_hot) - focal_loss(self.logits, torch.zeros_like(one_hot))
        class_loss = (self.background.sum() + positive.sum()) / max(len(self.labels), 1)
        return torch.nan_to_num(class_loss + self.box_loss, nan=torch.inf)


class Detections(NamedTuple):
    """What a teacher that is not dense finds in one image.

    Attributes:
        precision: its AP when classes are ignored, 0 to 1.
    """

    precision: float

    def loss(self) -> Tensor:
        """What is missing to all objects, (), 0 to 1."""
        return torch.tensor(1 - self.precision)


class Sample:
    """Images with ground truth.

    Args:
        images: as the training loader returns them, but with classes numbered among the shared ones, 0..S-1.
        input_format: their channel order.
        own: the student's indices of the shared classes.
        theirs: the teacher's indices of the shared classes.
    """

    def __init__(
        self, images: List[Dict[str, Any]], input_format: str, own: Sequence[int], theirs: Sequence[int]
    ) -> None:
        self.images = images
        self.input_format = input_format
        self.own, self.theirs = list(own), list(theirs)
        self._results: MutableMapping[Teacher, List[Any]] = WeakKeyDictionary()

    def results(self, teacher: Teacher) -> List[Any]:
        """What a teacher predicts for each image, an :class:`ImageResult`; :class:`Detections` if it is not dense."""
        if teacher not in self._results:
            self._results[teacher] = (
                [self._result(teacher, image) for image in self.images]
                if teacher.is_dense
                else [Detections(x) for x in self.precisions(teacher)]
            )
        return self._results[teacher]

    def precisions(self, teacher: Teacher) -> List[float]:
        """AP in each image when classes are ignored, which teachers of features need not share, 0 to 1."""
        precisions = []
        for image, found in zip(self.images, self.detections(teacher)):
            truth = Instances(found.image_size, gt_boxes=image["instances"].gt_boxes)
            truth.gt_classes = torch.zeros_like(image["instances"].gt_classes)
            found.pred_classes = torch.zeros_like(found.pred_classes)
            precisions.append(coco_precision([truth], [found], 1)[0])
        return precisions

    # One image at a time, for the loss of each, and to save memory.
    def _result(self, teacher: Teacher, image: Dict[str, Any]) -> ImageResult:
        outputs, detector = teacher([image], self.input_format), cast(DenseStudent, teacher.detector)
        instances = image["instances"].to(detector.device)
        labels, boxes = (found[0] for found in detector.label_anchors(outputs.anchors_per_level, [instances]))
        positive = (labels >= 0) & (labels < detector.num_classes)
        logits = outputs.logits[0][:, self.theirs]
        valid = logits[labels >= 0]
        box_losses = giou_loss(outputs.boxes[0][positive], boxes[positive])
        return ImageResult(
            background=focal_loss(valid, torch.zeros_like(valid)).sum(0).cpu(),
            logits=logits[positive].cpu(),
            labels=labels[positive].cpu(),
            box_loss=(box_losses.sum() / max(len(box_losses), 1)).cpu(),
        )

    @torch.no_grad()
    def detections(self, teacher: Teacher) -> List[Instances]:
        """Detections of the shared classes in each image."""
        found = [self._detections(teacher, image).to("cpu") for image in self.images]
        return [renumbered(instances, "pred_classes", self.theirs) for instances in found]

    def _detections(self, teacher: Teacher, image: Dict[str, Any]) -> Instances:
        detector = cast(Any, teacher.detector)
        if teacher.is_dense:
            outputs = teacher([image], self.input_format)
            images = preprocess(detector, [image])  # only its size matters
            return detector.forward_inference(images, outputs.features, outputs.predictions)[0]
        pixels = image["image"] if self.input_format == teacher.input_format else image["image"].flip(0)
        return detector([{"image": pixels}])[0]["instances"]


def at_scale(images: Sequence[Dict[str, Any]], scale: float) -> List[Dict[str, Any]]:
    """Images and their ground truth as a teacher sees them that sees them at a scale."""
    seen = []
    for image in images:
        pixels = resized(image["image"], scale)
        instances = Instances((pixels.shape[-2], pixels.shape[-1]), **image["instances"].get_fields())
        instances.gt_boxes = Boxes(instances.gt_boxes.tensor * scale)
        seen.append({**image, "image": pixels, "instances": instances})
    return seen


def draw(dataset: SeededDataset, num_images: int, classes: Sequence[int]) -> List[Dict[str, Any]]:
    """Draws images that show some of the classes: evenly spaced, and always the same.

    Args:
        dataset: the training loader's data set.
        num_images: number of images to draw, if there are that many.
        classes: indices of the classes; in the result they are numbered from 0.

    Raises:
        D2kdError: none of the images that were tried shows one of the classes.
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
    """Keeps the instances of some classes, and numbers these from 0 in the order of ``classes``."""
    known = instances.get(field)
    new = torch.full((max([*known.tolist(), *classes]) + 1,), -1)
    new[list(classes)] = torch.arange(len(classes))
    kept = instances[cast(Any, new[known] >= 0)]
    kept.set(field, new[kept.get(field)])
    return kept


def focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Elementwise focal loss (arXiv 1708.02002) with the published alpha and gamma."""
    return sigmoid_focal_loss(logits.float(), targets.float(), alpha=0.25, gamma=2.0)


def average_precision(sample: Sample, teacher: Teacher) -> Tuple[float, float]:
    """COCO AP and AP50 of the teacher on the sample, in percent."""
    truths = [renumbered(image["instances"], "gt_classes", range(len(sample.own))) for image in sample.images]
    precision, precision50 = coco_precision(truths, sample.detections(teacher), len(sample.own))
    return 100 * precision, 100 * precision50


def coco_precision(truths: Sequence[Instances], found: Sequence[Instances], num_classes: int) -> Tuple[float, float]:
    """COCO AP and AP50 of detections in images, 0 to 1."""
    annotations = [a for i, x in enumerate(truths) for a in coco_entries(i, x.gt_boxes.tensor, x.gt_classes)]
    results = [
        {**entry, "score": float(score)}
        for i, x in enumerate(found)
        for entry, score in zip(coco_entries(i, x.pred_boxes.tensor, x.pred_classes), x.scores)
    ]
    if not results:  # pycocotools cannot read an empty list
        return 0.0, 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": i} for i in range(len(truths))],
            "categories": [{"id": k} for k in range(num_classes)],
            "annotations": [{**entry, "id": i, "iscrowd": 0} for i, entry in enumerate(annotations, 1)],
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0]), float(evaluation.stats[1])


def coco_entries(image_id: int, boxes: Tensor, classes: Tensor) -> List[Dict[str, Any]]:
    """Boxes (M, 4) XYXY of one image in COCO format."""
    sizes = boxes[:, 2:] - boxes[:, :2]
    return [
        {"image_id": image_id, "category_id": k, "bbox": [*corner, *size], "area": size[0] * size[1]}
        for k, corner, size in zip(classes.tolist(), boxes[:, :2].tolist(), sizes.tolist())
    ]
