"""What distillation methods see of a dense detector: its outputs, its tower features, its targets.

Shapes: N images, L levels, R anchors over all levels, A anchors per place, K classes, D numbers per box prediction.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor

from .contract import Dense, Features, Network, Pyramid, level_strides
from .heads import Cut, tap_modules, tap_towers
from .modeling.boxes import decode_boxes
from .workers import mean_over_workers


@dataclass
class DenseOutputs:
    """Outputs of one detector for one batch: the student's, the teacher's or a cross head's.

    Attributes:
        detector: the one that made the predictions; its anchors and box coder belong to them.
        features: FPN features, per level (N, C, Hi, Wi).
        predictions: raw outputs of the head: logits, box predictions and any others, each a list of (N, A*?, Hi, Wi)
            per level; empty if the head did not run.
        taps: class and box tower features at each tapped cut.
        tapped_maps: outputs of the modules in MODEL.DISTILL.FEATURES.
        classes: classes that student and teacher share, (S,) int64, in the same order for both; None for all.
    """

    detector: Dense
    features: Features
    predictions: Tuple[Features, ...] = ()
    taps: Dict[Cut, Tuple[Features, Features]] = field(default_factory=dict)
    tapped_maps: Features = field(default_factory=list)
    classes: Optional[Tensor] = None

    @property
    def maps(self) -> Features:
        """What feature methods compare, each (N, C, H, W): MODEL.DISTILL.FEATURES, by default the FPN features."""
        return self.tapped_maps or self.features

    def towers(self, cut: Cut) -> Tuple[Features, Features]:
        """Class and box tower features at a cut, per level (N, C, Hi, Wi); the FPN features at cut 0."""
        return (self.features, self.features) if cut.convs == 0 else self.taps[cut]

    @cached_property
    def anchors_per_level(self) -> List[Boxes]:
        """Anchors of each level, XYXY in pixels."""
        return self.detector.anchor_generator(self.features)

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


def run_dense(
    detector: Dense,
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
        with_head: whether to run the head after the backbone.
        paths: modules whose outputs to keep, see :func:`tap_modules`.
    """
    with tap_modules(detector, paths) as maps, tap_towers(detector.head, [c for c in cuts if c.convs > 0]) as taps:
        levels = detector.backbone(images.tensor)
        features = [levels[name] for name in detector.head_in_features]
        predictions = tuple(detector.head(features)) if with_head else ()
    return DenseOutputs(detector, features, predictions, taps, [x for found in maps for x in found])


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
    padded = torch.tensor([[-(-side // divisor) * divisor for side in size] for size in images.image_sizes])
    inside = []
    for feature, stride, anchors in zip(outputs.features, level_strides(outputs.detector), outputs.anchors_per_level):
        height, width = feature.shape[-2:]
        rows = torch.arange(height) * stride < padded[:, :1]
        columns = torch.arange(width) * stride < padded[:, 1:]
        grid = (rows[:, :, None] & columns[:, None, :]).flatten(1)  # (N, Hi*Wi)
        inside.append(grid.repeat_interleave(len(anchors) // grid.shape[1], dim=1))
    return torch.cat(inside, dim=1).to(outputs.features[0].device, non_blocking=True)
