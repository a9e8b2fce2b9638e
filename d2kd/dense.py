"""What distillation methods see of a dense detector: its outputs, its tower features, its targets.

Shapes: N images, L levels, R anchors over all levels, A anchors per place, K classes, D numbers per box prediction.
"""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ContextManager, Dict, Iterator, List, Optional, Sequence, Tuple, TypeVar, cast

import torch
import torch.nn.functional as F
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor

from .contract import Dense, Features, Network, Pyramid, level_names, level_strides
from .heads import Cut, tap_modules, tap_towers
from .modeling.anchors import make_anchors
from .modeling.boxes import decode_boxes
from .workers import mean_over_workers

T = TypeVar("T")
_BOXES_AND_CLASSES = ("gt_boxes", "gt_classes")


@dataclass
class DenseOutputs:
    """Outputs of one detector for one batch: the student's, the teacher's or a cross head's.

    Attributes:
        detector: the one that made the predictions; its anchors and box coder belong to them. Without predictions it
            may be no more than a :class:`Pyramid`.
        features: FPN features, per level (N, C, Hi, Wi).
        predictions: raw outputs of the head: logits, box predictions and any others, each a list of (N, A*?, Hi, Wi)
            per level; empty if the head did not run.
        taps: class and box tower features at each tapped cut.
        tapped_maps: outputs of the modules in MODEL.DISTILL.FEATURES.
        classes: classes that student and teacher share, (S,) int64, in the same order for both; None for all.
        notes: what methods have read of the maps and need again, by keys of their own.
        levels: indices of the levels that feature methods compare, in the same order for both; None for all.
    """

    detector: Dense
    features: Features
    predictions: Tuple[Features, ...] = ()
    taps: Dict[Cut, Tuple[Features, Features]] = field(default_factory=dict)
    tapped_maps: Features = field(default_factory=list)
    classes: Optional[Tensor] = None
    levels: Optional[Sequence[int]] = None
    notes: Dict[Any, Any] = field(default_factory=dict)

    def free_maps(self) -> None:
        """Frees features and taps; predictions, anchors and shapes stay. Reading a feature is then an error."""
        self.anchors_per_level = self.anchors_per_level  # cached, so that no generator sees what follows
        self.features = [torch.empty_like(level, device="meta") for level in self.features]
        self.taps, self.tapped_maps = {}, []

    @property
    def maps(self) -> Features:
        """What feature methods compare, each (N, C, H, W): MODEL.DISTILL.FEATURES, by default the FPN features."""
        return self.tapped_maps or self.compared(self.features)

    def compared(self, per_level: List[T]) -> List[T]:
        """Those elements of a list over levels that belong to the levels that feature methods compare."""
        return per_level if self.levels is None else [per_level[i] for i in self.levels]

    def towers(self, cut: Cut) -> Tuple[Features, Features]:
        """Class and box tower features at a cut, per level (N, C, Hi, Wi); the FPN features at cut 0."""
        return (self.features, self.features) if cut.convs == 0 else self.taps[cut]

    @cached_property
    def anchors_per_level(self) -> List[Boxes]:
        """Anchors of each level, XYXY in pixels."""
        return make_anchors(self.detector.anchor_generator, self.features)

    @cached_property
    def anchors(self) -> Tensor:
        """All anchors, (R, 4) XYXY in pixels."""
        return Boxes.cat(self.anchors_per_level).tensor

    @cached_property
    def dense_predictions(self) -> List[Features]:
        """Predictions per anchor: for each output of the head, per level (N, Hi*Wi*A, K or D or 1)."""
        return [self._per_anchor(output) for output in self.predictions]

    def _per_anchor(self, output: Features) -> Features:
        channels = output[0].shape[1] // self.anchors_per_place
        return [permute_to_N_HWA_K(level, channels) for level in output]

    @property
    def anchors_per_place(self) -> int:
        """A, the number of anchors at each location."""
        return self.predictions[0][0].shape[1] // self.detector.num_classes

    @cached_property
    def logits(self) -> Tensor:
        """Class logits, (N, R, K), float32."""
        return torch.cat(self._per_anchor(self.predictions[0]), dim=1).float()

    @property
    def shared_logits(self) -> Tensor:
        """Logits of the classes that student and teacher share, (N, R, S), float32; S is K without a CLASS_MAP."""
        return self.logits if self.classes is None else self.logits[..., self.classes]

    @property
    def shared_logit_maps(self) -> Features:
        """The same as the head returns them, per level (N, A, S, Hi, Wi); views if there is no CLASS_MAP."""
        maps = [level.unflatten(1, (self.anchors_per_place, -1)) for level in self.predictions[0]]
        return maps if self.classes is None else [level.index_select(2, self.classes) for level in maps]

    @cached_property
    def best_scores(self) -> Tensor:
        """The highest class score of each anchor, (N, R), float32, without gradient."""
        best = [level.detach().unflatten(1, (self.anchors_per_place, -1)).amax(2) for level in self.predictions[0]]
        return torch.cat([level.permute(0, 2, 3, 1).flatten(1) for level in best], dim=1).float().sigmoid()

    def to_maps(self, values: Tensor) -> Features:
        """Arranges a value per anchor (N, R) as the head's outputs are, per level (N, A, Hi, Wi)."""
        shapes = [(*level.shape[-2:], self.anchors_per_place) for level in self.predictions[0]]
        parts = values.split([height * width * num for height, width, num in shapes], dim=1)
        return [part.unflatten(1, shape).permute(0, 3, 1, 2) for part, shape in zip(parts, shapes)]

    @cached_property
    def box_predictions(self) -> Tensor:
        """Raw box predictions, (N, R, D), float32."""
        return torch.cat(self._per_anchor(self.predictions[1]), dim=1).float()

    @cached_property
    def centerness(self) -> Optional[Tensor]:
        """Centerness logits, (N, R), float32; None if the head predicts none."""
        if len(self.predictions) < 3:
            return None
        return torch.cat(self._per_anchor(self.predictions[2]), dim=1).squeeze(-1).float()

    @property
    def num_bins(self) -> Optional[int]:
        """Number of bins of each side's distribution; None if the head predicts boxes directly."""
        reg_max = getattr(self.detector.box2box_transform, "reg_max", None)
        return None if reg_max is None else reg_max + 1

    @cached_property
    def boxes(self) -> Tensor:
        """Decoded boxes, (N, R, 4) XYXY in pixels, not clipped and not filtered."""
        predictions = self.box_predictions
        decoded = decode_boxes(self.detector.box2box_transform, predictions.flatten(0, 1), self.anchors)
        return decoded.view(*predictions.shape[:2], 4)


def preprocess(detector: Pyramid, batched_inputs: List[Dict[str, Any]], flip_channels: bool = False) -> ImageList:
    """Normalizes, pads and batches raw images with the detector's own pixel statistics and size divisibility.

    Args:
        detector: whose preprocessing to use.
        batched_inputs: as :class:`DatasetMapper` returns them.
        flip_channels: first swap BGR and RGB, for a detector that expects the other order.
    """
    if flip_channels:
        batched_inputs = [{**x, "image": x["image"].flip(0)} for x in batched_inputs]
    return detector.preprocess_image(batched_inputs)


def resized(image: Tensor, scale: float) -> Tensor:
    """Resizes a raw image (3, H, W) to ``scale`` times its size, rounded down, bilinearly; float32.

    A point (x, y) of the image is at exactly (scale * x, scale * y) of the result.
    """
    return F.interpolate(
        image[None].float(),
        scale_factor=scale,
        mode="bilinear",
        recompute_scale_factor=False,  # would stretch what rounding cut off, and shift points
        antialias=scale < 1,
    )[0]


def run_dense(
    detector: Pyramid,
    images: ImageList,
    cuts: Sequence[Cut] = (),
    with_head: bool = True,
    paths: Sequence[str] = (),
) -> DenseOutputs:
    """Runs a detector's backbone and head, and taps its towers and modules.

    Args:
        detector: student or teacher.
        images: from :func:`preprocess`.
        cuts: which tower features to keep; cut 0 costs nothing.
        with_head: whether to run the head after the backbone, which a :class:`Dense` detector has.
        paths: modules whose outputs to keep, see :func:`tap_modules`.
    """
    dense = cast(Dense, detector)
    tapping: ContextManager[Dict[Cut, Tuple[Features, Features]]] = nullcontext({})
    if with_head:
        tapping = tap_towers(dense.head, [c for c in cuts if c.convs > 0])
    with tap_modules(detector, paths) as maps, tapping as taps:
        levels = detector.backbone(images.tensor)
        features = [levels[name] for name in level_names(detector)]
        predictions = tuple(dense.head(features)) if with_head else ()
    return DenseOutputs(dense, features, predictions, taps, [x for found in maps for x in found])


@contextmanager
def evaluation_mode(network: Network) -> Iterator[None]:
    """Puts a network into evaluation mode for the ``with`` block, and every module back into its own mode after it."""
    modes = {module: module.training for module in network.modules()}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@dataclass
class Targets:
    """The ground truth of a batch and the target assignment, computed once per step and shared by all methods.

    Attributes:
        instances: ground truth of each image.
        labels: (N, R); -1 for ignored anchors, 0..K-1 for a class, K for background.
        boxes: matched ground-truth boxes, (N, R, 4) XYXY; undefined unless the label is a class.
        weights: (N, R) float32; 0 for ignored anchors and for those in padding beyond the image's own padded shape
            (its height and width rounded up to the backbone's size divisibility), otherwise 1.
        num_pos: sum over images of max(#positive anchors of weight 1, 1), averaged over workers; () float32. This is
            the loss normalizer N+ of the methods: the mean over workers then equals one worker with all images.
        positive: (N, R) bool; anchors of weight 1 that are labeled with a class.
        padded_size: height and width in pixels of the padded batch, which the feature maps cover.
    """

    instances: List[Instances]
    labels: Tensor
    boxes: Tensor
    weights: Tensor
    num_pos: Tensor
    positive: Tensor
    padded_size: Tuple[int, int]


def make_targets(
    student: DenseOutputs,
    images: ImageList,
    instances: List[Instances],
    labels: Sequence[Tensor],
    boxes: Sequence[Tensor],
) -> Targets:
    """Makes the targets from the labels and boxes that the student's ``label_anchors`` returned."""
    stacked = torch.stack(list(labels))
    weights = anchors_inside(student, images) & (stacked >= 0)
    positive = weights & (stacked < student.detector.num_classes)
    num_pos = positive.sum(1).clamp(min=1).sum().float()
    num_pos = mean_over_workers(num_pos)
    height, width = images.tensor.shape[-2:]
    return Targets(instances, stacked, torch.stack(list(boxes)), weights.float(), num_pos, positive, (height, width))


def anchors_inside(outputs: DenseOutputs, images: ImageList) -> Tensor:
    """Marks the anchors of each image that start inside its own padded shape, (N, R) bool."""
    divisor = max(outputs.detector.backbone.size_divisibility, 1)
    device = outputs.features[0].device
    padded = torch.tensor([[-(-side // divisor) * divisor for side in size] for size in images.image_sizes])
    padded = padded.to(device, non_blocking=True)
    inside = []
    for feature, stride, anchors in zip(outputs.features, level_strides(outputs.detector), outputs.anchors_per_level):
        height, width = feature.shape[-2:]
        rows = torch.arange(height, device=device) * stride < padded[:, :1]
        columns = torch.arange(width, device=device) * stride < padded[:, 1:]
        grid = (rows[:, :, None] & columns[:, None, :]).flatten(1)  # (N, Hi*Wi)
        inside.append(grid.repeat_interleave(len(anchors) // grid.shape[1], dim=1))
    return torch.cat(inside, dim=1)


def upload(batched_inputs: List[Dict[str, Any]], device: torch.device) -> List[Dict[str, Any]]:
    """Moves images and annotations to a device, without waiting for it.

    Args:
        batched_inputs: as :class:`DatasetMapper` returns them; not changed.
        device: of the detectors.
    """
    return [
        {**x, "image": _to_device(x["image"], device), "instances": _instances_to(x["instances"], device)}
        for x in batched_inputs
    ]


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    pinned = tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
    return pinned.to(device, non_blocking=True)


def _instances_to(instances: Instances, device: torch.device) -> Instances:
    """The same as ``instances.to(device)``, whose boxes would wait."""
    moved = {name: value.to(device) for name, value in instances.get_fields().items() if name not in _BOXES_AND_CLASSES}
    boxes, classes = (_to_device(x, device) for x in (instances.gt_boxes.tensor, instances.gt_classes))
    return Instances(instances.image_size, **moved, gt_boxes=Boxes(boxes), gt_classes=classes)
