"""What a detector must have to be a student or a teacher, as protocols.

Student and teacher meet in a :class:`Pyramid`: levels with strides and channels, all that feature methods need. Methods
that compare predictions or tower features need a :class:`Dense` detector on top, and a student is a
:class:`DenseStudent`. detectron2's RetinaNet and FCOS have all of it.
"""

from typing import Any, Dict, Iterator, List, Mapping, Optional, Protocol, Sequence, Tuple

from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from .errors import D2kdError, check_choice

Features = List[Tensor]  # one (N, C, Hi, Wi) per level, high to low resolution


class Network(Protocol):
    """What is used of ``nn.Module``, from which a protocol cannot inherit."""

    training: bool

    def modules(self) -> Iterator[nn.Module]: ...

    def named_modules(self) -> Iterator[Tuple[str, nn.Module]]: ...

    def named_parameters(self) -> Iterator[Tuple[str, nn.Parameter]]: ...

    def state_dict(self) -> Dict[str, Any]: ...


class Pyramid(Network, Protocol):
    """A detector whose backbone gives feature maps at several strides: all that feature methods need of a teacher.

    R-CNNs of any kind are pyramids. Their levels are the outputs of their backbone.
    """

    @property
    def backbone(self) -> Any:
        """A detectron2 ``Backbone``: ``output_shape()`` has stride and channels of each level."""

    @property
    def pixel_mean(self) -> Tensor:
        """Subtracted from an image's channels, (3, 1, 1)."""

    @property
    def pixel_std(self) -> Tensor:
        """What the difference is divided by, (3, 1, 1)."""

    @property
    def device(self) -> Any:
        """Where the detector is."""

    def preprocess_image(self, batched_inputs: List[Dict[str, Any]]) -> ImageList:
        """Normalizes, pads and batches raw images."""


class AnchorGenerator(Protocol):
    """A detectron2 anchor generator."""

    @property
    def num_anchors(self) -> List[int]:
        """Anchors per place, for each level."""

    def __call__(self, features: Features) -> List[Boxes]:
        """Anchors of each level, XYXY in pixels."""


class BoxCoder(Protocol):
    """Turns what the head predicts into boxes. One that decodes distributions also has ``reg_max``."""

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Boxes (M, 4) XYXY in pixels from predictions (M, D) and anchors (M, 4)."""

    def get_deltas(self, src_boxes: Tensor, target_boxes: Tensor) -> Tensor:
        """Predictions (M, D) that turn anchors (M, 4) into boxes (M, 4)."""


class Dense(Pyramid, Protocol):
    """A detector that predicts classes and boxes for anchors: what methods need that read predictions or towers."""

    @property
    def head_in_features(self) -> Sequence[str]:
        """Names of the levels that the head reads, high to low resolution."""

    @property
    def head(self) -> nn.Module:
        """Maps the levels to predictions, each a list over levels; see :data:`TOWERS`."""

    @property
    def num_classes(self) -> int:
        """Number of classes K."""

    @property
    def anchor_generator(self) -> AnchorGenerator:
        """Makes the anchors from the feature maps."""

    @property
    def box2box_transform(self) -> BoxCoder:
        """Decodes box predictions."""


class DenseStudent(Dense, Protocol):
    """A dense detector that trains."""

    def label_anchors(
        self, anchors: List[Boxes], gt_instances: List[Instances]
    ) -> Tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Labels (R,) and matched boxes (R, 4) of each image's anchors, as RetinaNet's method."""

    def losses(
        self, anchors: List[Boxes], pred_logits: List[Tensor], gt_labels: List[Tensor], *rest: List[Tensor]
    ) -> Dict[str, Tensor]:
        """The detector's own losses, as RetinaNet's method."""


#: The parts of a head that methods cut and tap: ``nn.Sequential`` towers for classes and for boxes.
TOWERS = ("cls_subnet", "bbox_subnet")
#: What messages call a level, unless its config key is known.
HEAD_LEVEL = "a level that the head reads (head_in_features)"


def members(protocol: type) -> List[str]:
    """Names of what a protocol asks of a detector, beyond being an ``nn.Module``."""
    classes = protocol.__mro__[: protocol.__mro__.index(Network)]
    return [name for cls in reversed(classes) for name in vars(cls) if not name.startswith("_")]


def missing_parts(detector: object, protocol: type) -> List[str]:
    """Names of what a detector lacks of a protocol."""
    return [name for name in members(protocol) if not hasattr(detector, name)]


def is_dense(detector: object) -> bool:
    """Whether a detector is :class:`Dense`; others, such as R-CNNs, have no more than a :class:`Pyramid`."""
    return not missing_parts(detector, Dense)


def check_contract(detector: nn.Module, with_head: bool = True, with_losses: bool = True) -> None:
    """Checks that a detector has the parts that this package reads.

    Args:
        detector: student or teacher.
        with_head: whether methods compare predictions or tower features; a teacher of features is a :class:`Pyramid`.
        with_losses: whether it trains, as a student does.

    Raises:
        D2kdError: a part is missing; names it.
    """
    kind = type(detector).__name__
    protocol = DenseStudent if with_losses else Dense if with_head else Pyramid
    missing = missing_parts(detector, protocol)
    if missing:
        example = "GeneralizedRCNN" if protocol is Pyramid else "RetinaNet"
        raise D2kdError(f"{kind} has no {', '.join(missing)}; give it these as detectron2's {example} has them")
    head = getattr(detector, "head", None)
    missing = [name for name in TOWERS if not isinstance(getattr(head, name, None), nn.Sequential)]
    if with_head and missing:
        raise D2kdError(
            f"{kind}'s head, {type(head).__name__}, has no nn.Sequential {' and '.join(missing)}; keep its "
            "towers in cls_subnet and bbox_subnet as detectron2's RetinaNetHead does, or use methods that read "
            "features only"
        )


def level_names(detector: Pyramid) -> List[str]:
    """Names of a detector's levels, high to low resolution: those that its head reads, else all of its backbone."""
    if hasattr(detector, "head_in_features"):
        return list(detector.head_in_features)
    shapes = detector.backbone.output_shape()
    return sorted(shapes, key=lambda name: shapes[name].stride)


def levels(detector: Pyramid, prefix: str = "") -> List[ShapeSpec]:
    """Shapes of a detector's levels, high to low resolution.

    Args:
        detector: student or teacher.
        prefix: what to say before the message, such as whose it is.

    Raises:
        D2kdError: the backbone does not have one that the head reads.
    """
    shapes, names = detector.backbone.output_shape(), level_names(detector)
    check_level_names(names, shapes, prefix + HEAD_LEVEL)
    return [shapes[name] for name in names]


def check_level_names(names: Sequence[str], shapes: Mapping[str, ShapeSpec], what: str = HEAD_LEVEL) -> None:
    """Raises D2kdError if a backbone with these shapes lacks one of the levels; ``what`` is their name for the user."""
    for name in names:
        check_choice(what, name, shapes)


def level_strides(detector: Pyramid) -> List[int]:
    """Strides in pixels of a detector's levels, high to low resolution."""
    return [level.stride for level in levels(detector)]


def level_channels(detector: Pyramid) -> List[int]:
    """Channels of a detector's levels, high to low resolution."""
    return [level.channels for level in levels(detector)]


def num_classes(detector: object) -> Optional[int]:
    """Number of a detector's classes, which an R-CNN keeps in its ``roi_heads``; None if it does not say."""
    return getattr(getattr(detector, "roi_heads", detector), "num_classes", None)


def channel_order(detector: object) -> str:
    """Channel order of a detector's images, "BGR" or "RGB"; BGR where it does not say, as detectron2's FCOS."""
    return getattr(detector, "input_format", None) or "BGR"


def check_distills(detector: type, distill: Any) -> None:
    """Raises D2kdError if a config sets methods, INHERIT or FAST_LOSSES for a plain detector, which would ignore them.

    Args:
        detector: the class of the meta architecture.
        distill: the node MODEL.DISTILL.
    """
    if hasattr(detector, "observe"):
        return
    name = detector.__name__
    if distill.METHODS or distill.INHERIT:
        raise D2kdError(
            f"MODEL.META_ARCHITECTURE {name} is a plain detector and ignores MODEL.DISTILL.METHODS and INHERIT: set it "
            f"to Distill{name}, or set METHODS and INHERIT to () to train without a teacher"
        )
    if distill.FAST_LOSSES:
        raise D2kdError(
            f"MODEL.META_ARCHITECTURE {name} is a plain detector and ignores MODEL.DISTILL.FAST_LOSSES: set it to "
            f"Distill{name}, which without METHODS is the same, or set FAST_LOSSES to False"
        )
