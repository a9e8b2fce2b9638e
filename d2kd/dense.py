"""What distillation methods see of a dense detector: its outputs, its tower features, its targets.

Shapes: N images, L levels, R anchors over all levels, A anchors per place, K classes, D numbers per box prediction.
A dense detector has ``backbone``, ``head`` (with the two towers ``cls_subnet`` and ``bbox_subnet``),
``anchor_generator``, ``num_classes``, ``label_anchors`` and ``losses``, as detectron2's RetinaNet and FCOS have.
"""

import copy
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.meta_arch.dense_detector import DenseDetector, permute_to_N_HWA_K
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils import comm
from torch import Tensor, nn

from .errors import D2kdError, nearest

TOWERS = ("cls_subnet", "bbox_subnet")


class Cut(NamedTuple):
    """A place at which both towers of a head are cut.

    Attributes:
        convs: how many convolutions lie before the cut; 0 is the FPN feature itself.
        pre_activation: the value before the activation that follows the last of them, instead of after.
    """

    convs: int
    pre_activation: bool = False


def split_tower(tower: nn.Sequential, cut: Cut) -> Tuple[int, int]:
    """Finds where a cut lies in a tower.

    Args:
        tower: convolutions, each followed by its norm and activation, if any.
        cut: the place.

    Returns:
        ``(end, rest)``: the tapped value is the output of ``tower[:end]``, what follows the cut is ``tower[rest:]``.
        Between the two lie the activations that ``cut.pre_activation`` leaves out.

    Raises:
        D2kdError: the tower has fewer convolutions.
    """
    convs = [i for i, layer in enumerate(tower) if isinstance(layer, nn.Conv2d)]
    if not 0 <= cut.convs <= len(convs):
        raise D2kdError(f"cut {cut.convs} lies outside a tower of {len(convs)} convolutions; use 0 to {len(convs)}")
    rest = [0, *convs[1:], len(tower)][cut.convs]
    end = rest
    while cut.pre_activation and end and isinstance(tower[end - 1], nn.ReLU):
        end -= 1
    return end, rest


Features = List[Tensor]  # one (N, C, Hi, Wi) per level, high to low resolution


@contextmanager
def tap_towers(head: nn.Module, cuts: Sequence[Cut]) -> Iterator[Dict[Cut, Tuple[Features, Features]]]:
    """Collects tower features while the head runs.

    Args:
        head: a dense head; it runs each tower once per level, and each run appends one entry.
        cuts: where to tap. Cut 0 needs no hook and must not be asked for here.

    Yields:
        For each cut the features of the class and of the box tower, filled when the head runs. The hooks are gone
        after the ``with`` block.
    """
    taps: Dict[Cut, Tuple[Features, Features]] = {cut: ([], []) for cut in cuts}
    with ExitStack() as hooks:
        for cut, per_tower in taps.items():
            for name, found in zip(TOWERS, per_tower):
                tower = getattr(head, name)
                layer = tower[split_tower(tower, cut)[0] - 1]
                hooks.enter_context(
                    layer.register_forward_hook(lambda _module, _inputs, output, found=found: found.append(output))
                )
        yield taps


@contextmanager
def tap_modules(detector: nn.Module, paths: Sequence[str]) -> Iterator[List[Features]]:
    """Collects what modules give while a detector runs.

    Args:
        detector: student or teacher.
        paths: of modules, such as "backbone.bottom_up.res4".

    Yields:
        For each path the feature maps (N, C, H, W) that its module gave, in order: one per call, or several where it
        gives a list or dict of them.

    Raises:
        D2kdError: there is no such module; names the nearest.
    """
    taps: List[Features] = [[] for _ in paths]
    with ExitStack() as hooks:
        for path, found in zip(paths, taps):
            module = find_module(detector, path)
            hooks.enter_context(
                module.register_forward_hook(lambda _module, _inputs, output, found=found: found.extend(_maps(output)))
            )
        yield taps


def find_module(detector: nn.Module, path: str) -> nn.Module:
    """The module of a path; raises D2kdError with the nearest paths if there is none."""
    modules = dict(detector.named_modules())
    if not path or path not in modules:
        names = [name for name in modules if name]
        raise D2kdError(f"{type(detector).__name__} has no module {path!r}{nearest(path, names)}")
    return modules[path]


def _maps(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.dim() == 4:
            yield output
    elif isinstance(output, (list, tuple, dict)):
        for part in output.values() if isinstance(output, dict) else output:
            yield from _maps(part)


class _Replay(nn.Module):
    """Stands in front of a cut tower: ignores its input and gives the next level's stored feature."""

    def __init__(self, features: Features) -> None:
        super().__init__()
        self._features = iter(features)

    def forward(self, _: Tensor) -> Tensor:
        return next(self._features)


def cross_head(head: nn.Module, cut: Cut, cls_features: Features, box_features: Features) -> Tuple[Features, ...]:
    """Runs the rest of a head, behind a cut, on someone else's tower features.

    The head's own ``forward`` runs, on a shallow copy whose towers start behind the cut, so that whatever else a head
    has (centerness, per-level scales, norms) comes for free. Both inputs are expected *after* the activation, also
    where ``cut.pre_activation`` holds. All levels run in order, as counting norms (``CycleBatchNormList``) need.

    Args:
        head: reads a level's feature through ``cls_subnet`` and ``bbox_subnet`` only.
        cut: where the towers are entered.
        cls_features: what enters the class tower, per level (N, C, Hi, Wi).
        box_features: what enters the box tower, likewise.

    Returns:
        What ``head.forward`` returns. Gradients reach the features, and the head's parameters where these require any.
    """
    crossed = copy.copy(head)
    crossed._modules = dict(head._modules)  # otherwise the real head would be cut
    for name, features in zip(TOWERS, (cls_features, box_features)):
        tower = getattr(head, name)
        setattr(crossed, name, nn.Sequential(_Replay(features), *tower[split_tower(tower, cut)[1] :]))
    return tuple(crossed(cls_features))


@dataclass
class DenseOutputs:
    """Outputs of one detector for one batch: the student's, the teacher's or a cross head's.

    Attributes:
        detector: made the predictions; its anchors and box coder belong to them.
        features: FPN features, per level (N, C, Hi, Wi).
        predictions: the head's raw outputs: logits, box predictions and whatever else the head gives, each a list
            of (N, A*?, Hi, Wi) per level; empty where the head was not run.
        taps: tower features per tapped cut.
        tapped_maps: outputs of the modules that MODEL.DISTILL.FEATURES names.
        classes: which classes student and teacher share, (S,) int64, in the same order for both; None for all.
    """

    detector: DenseDetector
    features: Features
    predictions: Tuple[Features, ...] = ()
    taps: Dict[Cut, Tuple[Features, Features]] = field(default_factory=dict)
    tapped_maps: Features = field(default_factory=list)
    classes: Optional[Tensor] = None

    @property
    def maps(self) -> Features:
        """What feature methods compare, each (N, C, H, W): the FPN features unless MODEL.DISTILL.FEATURES says else."""
        return self.tapped_maps or self.features

    def towers(self, cut: Cut) -> Tuple[Features, Features]:
        """Class and box tower features at a cut, each per level (N, C, Hi, Wi); at cut 0 the FPN features."""
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
        """The predictions per anchor: for each head output, per level (N, Hi*Wi*A, K or D or 1)."""
        logits = self.predictions[0]
        num_anchors = logits[0].shape[1] // self.detector.num_classes
        return [
            [permute_to_N_HWA_K(level, level.shape[1] // num_anchors) for level in output]
            for output in self.predictions
        ]

    @cached_property
    def logits(self) -> Tensor:
        """Class logits, (N, R, K), float32."""
        return torch.cat(self.dense_predictions[0], dim=1).float()

    @property
    def shared_logits(self) -> Tensor:
        """Logits of the classes that student and teacher share, (N, R, S), float32; S is K unless CLASS_MAP is set."""
        return self.logits if self.classes is None else self.logits[..., self.classes]

    @cached_property
    def box_predictions(self) -> Tensor:
        """What the head predicts for boxes, (N, R, D), float32."""
        return torch.cat(self.dense_predictions[1], dim=1).float()

    @cached_property
    def centerness(self) -> Optional[Tensor]:
        """Centerness logits, (N, R), float32; None where the head predicts none."""
        if len(self.predictions) < 3:
            return None
        return torch.cat(self.dense_predictions[2], dim=1).squeeze(-1).float()

    @property
    def num_bins(self) -> Optional[int]:
        """Bins of each side's distribution; None where boxes are predicted directly."""
        reg_max = getattr(self.detector.box2box_transform, "reg_max", None)
        return None if reg_max is None else reg_max + 1

    @cached_property
    def boxes(self) -> Tensor:
        """Decoded boxes, (N, R, 4) XYXY in pixels, neither clipped nor filtered."""
        predictions = self.box_predictions
        decoded = decode_boxes(self.detector.box2box_transform, predictions.flatten(0, 1), self.anchors)
        return decoded.view(*predictions.shape[:2], 4)


def decode_boxes(transform: Any, deltas: Tensor, anchors: Tensor) -> Tensor:
    """Applies box deltas to anchors.

    Log-scale deltas are clamped on both sides, where detectron2 clamps from above only: so the published methods'
    box coder does it, and a box that shrinks below 1/62 of its anchor would otherwise lose its area in float32.

    Args:
        transform: detectron2's box coder of the detector.
        deltas: (M*R, D), M images one after the other.
        anchors: (R, 4).

    Returns:
        (M*R, 4) XYXY boxes in pixels.
    """
    if isinstance(transform, Box2BoxTransform):
        deltas = clamp_log_sizes(deltas, transform.weights, transform.scale_clamp)
    return transform.apply_deltas(deltas, anchors.repeat(len(deltas) // max(len(anchors), 1), 1))


def clamp_log_sizes(deltas: Tensor, weights: Tuple[float, float, float, float], scale_clamp: float) -> Tensor:
    """Clamps the log-scale deltas of a ``Box2BoxTransform`` from below as it does from above, (..., 4)."""
    widths = deltas[..., 2:3].clamp(min=-weights[2] * scale_clamp)
    heights = deltas[..., 3:].clamp(min=-weights[3] * scale_clamp)
    return torch.cat([deltas[..., :2], widths, heights], dim=-1)


def preprocess(detector: DenseDetector, batched_inputs: List[Dict[str, Any]], flip_channels: bool = False) -> ImageList:
    """Normalises, pads and batches raw images with the detector's own pixel statistics and size divisibility.

    Args:
        detector: whose way of preprocessing.
        batched_inputs: as :class:`DatasetMapper` gives them.
        flip_channels: turn BGR into RGB or back first, for a detector that wants the other order.
    """
    if flip_channels:
        batched_inputs = [{**x, "image": x["image"].flip(0)} for x in batched_inputs]
    return detector.preprocess_image(batched_inputs)


def run_dense(
    detector: DenseDetector,
    images: ImageList,
    cuts: Sequence[Cut] = (),
    with_head: bool = True,
    paths: Sequence[str] = (),
) -> DenseOutputs:
    """Runs backbone and head of a detector and taps its towers and modules on the way.

    Args:
        detector: student or teacher.
        images: preprocessed by :func:`preprocess`.
        cuts: tower features to keep; cut 0 costs nothing.
        with_head: False runs the backbone only.
        paths: modules whose outputs to keep, see :func:`tap_modules`.
    """
    with tap_modules(detector, paths) as maps, tap_towers(detector.head, [c for c in cuts if c.convs > 0]) as taps:
        features = detector.backbone(images.tensor)
        features = [features[name] for name in detector.head_in_features]
        predictions = tuple(detector.head(features)) if with_head else ()
    return DenseOutputs(detector, features, predictions, taps, [x for found in maps for x in found])


@dataclass
class Targets:
    """The ground truth of a batch and what target assignment made of it, once per step, shared by all.

    Attributes:
        instances: ground truth of each image.
        labels: (N, R); -1 ignored, 0..K-1 the class, K background.
        boxes: matched ground-truth boxes, (N, R, 4) XYXY; undefined where the label is no class.
        weights: (N, R) float32; 0 where ignored or where the anchor lies in padding beyond the image's own padded
            shape (its height and width rounded up to the backbone's size divisibility), otherwise 1.
        num_pos: sum over images of max(#positive anchors of weight 1, 1), averaged over workers; () float32. The
            loss normaliser N+ of the methods: with it the mean over workers equals one worker with all images.
        positive: (N, R) bool; anchors of weight 1 that are labelled with a class.
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
    student: DenseOutputs, images: ImageList, instances: List[Instances], labels: List[Tensor], boxes: List[Tensor]
) -> Targets:
    """Makes the targets from what ``label_anchors`` of the student returned."""
    stacked = torch.stack(labels)
    weights = anchors_inside(student, images) & (stacked >= 0)
    positive = weights & (stacked < student.detector.num_classes)
    num_pos = positive.sum(1).clamp(min=1).sum().float()
    num_pos = mean_over_workers(num_pos)
    height, width = images.tensor.shape[-2:]
    return Targets(instances, stacked, torch.stack(boxes), weights.float(), num_pos, positive, (height, width))


def anchors_inside(outputs: DenseOutputs, images: ImageList) -> Tensor:
    """Tells for each image which anchors start inside its own padded shape, (N, R) bool."""
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


def level_strides(detector: DenseDetector) -> List[int]:
    """Strides in pixels of the levels that the head reads, high to low resolution."""
    shapes = detector.backbone.output_shape()
    return [shapes[name].stride for name in detector.head_in_features]


def level_channels(detector: DenseDetector) -> List[int]:
    """Channels of the levels that the head reads, high to low resolution."""
    shapes = detector.backbone.output_shape()
    return [shapes[name].channels for name in detector.head_in_features]


def mean_over_workers(value: Tensor) -> Tensor:
    """Averages a number without gradient over all workers."""
    if comm.get_world_size() > 1:
        value = value.clone()
        torch.distributed.all_reduce(value)
        value /= comm.get_world_size()
    return value


def at_least_one(mean: Tensor) -> Tensor:
    """Clamps a number that was averaged over workers so that its sum over them is at least 1, as for one worker."""
    return mean.clamp(min=1 / comm.get_world_size())


def check_contract(detector: nn.Module, with_head: bool = True, with_losses: bool = True) -> None:
    """Checks that a detector has the parts that this package reads; detectron2's RetinaNet and FCOS have them.

    Args:
        detector: student or teacher.
        with_head: methods compare predictions or tower features.
        with_losses: it trains, as a student does.

    Raises:
        D2kdError: names what is missing.
    """
    kind = type(detector).__name__
    needed = ["backbone", "head", "head_in_features", "num_classes", "anchor_generator", "box2box_transform"]
    needed += ["label_anchors", "losses"] if with_losses else []
    missing = [name for name in needed if not hasattr(detector, name)]
    if missing:
        raise D2kdError(f"{kind} has no {', '.join(missing)}; give it these as detectron2's RetinaNet has them")
    missing = [name for name in TOWERS if not isinstance(getattr(detector.head, name, None), nn.Sequential)]
    if with_head and missing:
        raise D2kdError(
            f"{kind}'s head, {type(detector.head).__name__}, has no nn.Sequential {' and '.join(missing)}; keep its "
            "towers in cls_subnet and bbox_subnet as detectron2's RetinaNetHead does, or use methods that read "
            "features only"
        )
