"""A teacher on a few training images: losses that are comparable between detectors, and AP."""

import contextlib
import copy
import io
from itertools import islice
from typing import Any, Dict, List, MutableMapping, NamedTuple, Sequence, Tuple, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances
from fvcore.nn import sigmoid_focal_loss
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

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
        detections: of the shared classes, numbered 0..S-1.
    """

    background: Tensor
    logits: Tensor
    labels: Tensor
    box_loss: Tensor
    detections: Instances

    def loss(self) -> Tensor:
        """Detection loss of the image, (): focal loss per positive anchor plus GIoU loss.

        It is the same for all detectors. Their own losses keep running means and synchronize workers.
        """
        return self.loss_with(self.logits)

    def class_loss(self) -> Tensor:
        """The part of classes in :meth:`loss`."""
        return self._replace(box_loss=torch.zeros(())).loss()

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
        detections: of the shared classes, numbered 0..S-1.
    """

    precision: float
    detections: Instances

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
        #: Whether AP ignores classes.
        self.any_class = False
        self._results: MutableMapping[Teacher, List[Any]] = WeakKeyDictionary()

    def at_scale(self, scale: float) -> "Sample":
        """The same images at another size."""
        return Sample(at_scale(self.images, scale), self.input_format, self.own, self.theirs)

    def with_classes(self, theirs: Sequence[int]) -> "Sample":
        """The same images, where the shared classes have other indices in the teacher."""
        return Sample(self.images, self.input_format, self.own, theirs)

    def without_classes(self) -> "Sample":
        """The same images and results, but AP ignores classes."""
        sample = copy.copy(self)
        sample.any_class = True
        return sample

    def results(self, teacher: Teacher) -> List[Any]:
        """What a teacher predicts for each image, an :class:`ImageResult`; :class:`Detections` if it is not dense."""
        if teacher not in self._results:
            result = self._dense_result if teacher.is_dense else self._detections
            self._results[teacher] = [result(teacher, image) for image in self.images]
        return self._results[teacher]

    # One image at a time, for the loss of each, and to save memory.
    @torch.no_grad()
    def _dense_result(self, teacher: Teacher, image: Dict[str, Any]) -> ImageResult:
        outputs, detector = teacher([image], self.input_format), cast(Any, teacher.detector)
        instances = image["instances"].to(detector.device)
        labels, boxes = (found[0] for found in detector.label_anchors(outputs.anchors_per_level, [instances]))
        positive = (labels >= 0) & (labels < detector.num_classes)
        logits = outputs.logits[0][:, self.theirs]
        valid = logits[labels >= 0]
        box_losses = giou_loss(outputs.boxes[0][positive], boxes[positive])
        images = preprocess(detector, [image])  # only its size matters
        # Last, since it changes the logits in place.
        (detections,) = detector.forward_inference(images, outputs.features, outputs.predictions)
        return ImageResult(
            background=focal_loss(valid, torch.zeros_like(valid)).sum(0).cpu(),
            logits=logits[positive].cpu(),
            labels=labels[positive].cpu(),
            box_loss=(box_losses.sum() / max(len(box_losses), 1)).cpu(),
            detections=renumbered(detections.to("cpu"), "pred_classes", self.theirs),
        )

    @torch.no_grad()
    def _detections(self, teacher: Teacher, image: Dict[str, Any]) -> Detections:
        pixels = image["image"] if self.input_format == teacher.input_format else image["image"].flip(0)
        found = teacher.network([{"image": pixels}])[0]["instances"].to("cpu")
        precision, _ = coco_precision([image["instances"]], [found], any_class=True)
        return Detections(precision, renumbered(found, "pred_classes", self.theirs))


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
    found = [result.detections for result in sample.results(teacher)]
    truths = [image["instances"] for image in sample.images]
    precision, precision50 = coco_precision(truths, found, sample.any_class)
    return 100 * precision, 100 * precision50


def coco_precision(truths: Sequence[Instances], found: Sequence[Instances], any_class: bool) -> Tuple[float, float]:
    """COCO AP and AP50 of detections in images, 0 to 1; with or without regard to classes."""
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
            "categories": [{"id": k} for k in {a["category_id"] for a in [*annotations, *results]}],
            "annotations": [{**entry, "id": i, "iscrowd": 0} for i, entry in enumerate(annotations, 1)],
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        params = evaluation.params
        params.useCats = not any_class
        # Objects of all sizes and 100 detections, as in AP; the others take most of the time.
        params.areaRng, params.areaRngLbl, params.maxDets = params.areaRng[:1], params.areaRngLbl[:1], [100]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"]  # first by IoU, from 0.5 on; -1 for classes without objects
    return mean_precision(precision), mean_precision(precision[0])


def mean_precision(precision: np.ndarray) -> float:
    """Mean of those entries that are known; -1 if none is, as in COCO."""
    known = precision[precision > -1]
    return float(known.mean()) if known.size else -1.0


def coco_entries(image_id: int, boxes: Tensor, classes: Tensor) -> List[Dict[str, Any]]:
    """Boxes (M, 4) XYXY of one image in COCO format."""
    sizes = boxes[:, 2:] - boxes[:, :2]
    return [
        {"image_id": image_id, "category_id": k, "bbox": [*corner, *size], "area": size[0] * size[1]}
        for k, corner, size in zip(classes.tolist(), boxes[:, :2].tolist(), sizes.tolist())
    ]
