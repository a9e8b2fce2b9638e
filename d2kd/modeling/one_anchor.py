"""The common base of GFL, ATSS and FCOS: one anchor per location, a config node from signatures, and inference.

Inference code must work with TorchScript and tracing: plain loops, no ``super()``, no ``Sequence``.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Dict, List, Tuple, Type

import torch
from detectron2.config import CfgNode
from detectron2.layers import batched_nms
from detectron2.modeling import build_backbone
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from ..contract import AnchorGenerator, BoxCoder, check_distills, check_level_names
from ..errors import D2kdError
from ..signatures import defaults
from ..workers import at_least_one

# Not part of the node: they come from TEST.DETECTIONS_PER_IMAGE and INPUT.FORMAT, shared by all detectors.
_SHARED_OPTIONS = ("max_detections_per_image", "input_format")


class OneAnchorDetector(DenseDetector):
    """A base class or mixin for dense detectors with one anchor per location.

    Subclasses set these attributes in ``__init__``, because TorchScript does not see class attributes: RetinaNet's
    ``anchor_generator``, ``box2box_transform`` and test options; ``score_rule``, either "class" for the class score
    alone or one of the rules of :class:`FCOS`; and ``clip_before_nms``, see :class:`FCOS`.
    """

    #: Name of the config node under MODEL, and the class of the head that it configures.
    config_node: ClassVar[str]
    head_class: ClassVar[Type[RetinaNetHead]]
    #: See :class:`DistillMetaArch`.
    sync_normalizer = False

    if TYPE_CHECKING:  # TorchScript would read these declarations
        pixel_mean: Tensor
        pixel_std: Tensor
        num_classes: int
        anchor_generator: AnchorGenerator
        box2box_transform: BoxCoder
        test_score_thresh: float
        test_topk_candidates: int
        test_nms_thresh: float

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    @classmethod
    def config_defaults(cls) -> Dict[str, Any]:
        """Returns the keys and default values of this detector's config node, read from the signatures."""
        options = {**cls._head_options(), **cls._options()}
        return {
            "NUM_CLASSES": 80,
            "IN_FEATURES": ["p3", "p4", "p5", "p6", "p7"],
            "NUM_CONVS": 4,
            **{config_key(name): default for name, default in options.items()},
        }

    @classmethod
    def _options(cls) -> Dict[str, Any]:
        """Returns the detector's own options, without those of the head, and their defaults."""
        raise NotImplementedError

    @classmethod
    def _head_options(cls) -> Dict[str, Any]:
        return config_options(cls.head_class, RetinaNetHead)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Dict[str, Any]:
        if "DISTILL" in cfg.MODEL:
            check_distills(cls, cfg.MODEL.DISTILL)
        node = cfg.MODEL[cls.config_node]
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        check_level_names(node.IN_FEATURES, shapes, f"a level of MODEL.{cls.config_node}.IN_FEATURES")
        input_shape = [shapes[name] for name in node.IN_FEATURES]
        channels = input_shape[0].channels
        if node.NORM == "GN" and channels % 32:
            raise D2kdError(
                f"MODEL.{cls.config_node}.NORM GN needs MODEL.FPN.OUT_CHANNELS divisible by 32, not {channels}"
            )
        return {
            "backbone": backbone,
            "head": cls.head_class(
                input_shape=input_shape,
                num_classes=node.NUM_CLASSES,
                conv_dims=[channels] * node.NUM_CONVS,
                **{name: node[config_key(name)] for name in cls._head_options()},
            ),
            "head_in_features": node.IN_FEATURES,
            "num_classes": node.NUM_CLASSES,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "input_format": cfg.INPUT.FORMAT,
            **{name: node[config_key(name)] for name in cls._options()},
        }

    def _at_least_one(self, normalizer: Tensor) -> Tensor:
        """Clamps a normalizer averaged over workers, as published or, with ``sync_normalizer``, over all workers."""
        return at_least_one(normalizer) if self.sync_normalizer else normalizer.clamp(min=1)

    def _per_anchor(self, predictions: List[List[Tensor]]) -> List[List[Tensor]]:
        """Reshapes the head's outputs to (N, Hi*Wi, channels) per level."""
        return self._transpose_dense_predictions(predictions, [output[0].shape[1] for output in predictions])

    def forward_inference(
        self, images: ImageList, features: List[Tensor], predictions: List[List[Tensor]]
    ) -> List[Instances]:
        """Returns the detections of each image, best first.

        Args:
            images: the batch; only its image sizes are used.
            features: per level (N, C, Hi, Wi).
            predictions: class logits, box predictions and optionally centerness logits, each per level
                (N, channels, Hi, Wi).

        Returns:
            ``pred_boxes``, ``scores`` and ``pred_classes`` of each image, in pixels of the preprocessed image.
        """
        anchors = self.anchor_generator(features)
        outputs = self._per_anchor(predictions)
        results: List[Instances] = []
        for image, size in enumerate(images.image_sizes):
            found: List[Instances] = []
            for level, boxes in enumerate(anchors):
                found.append(self._candidates(boxes, [output[level][image] for output in outputs], size))
            results.append(self._suppress(found[0].cat(found)))
        return results

    def _candidates(self, anchors: Boxes, outputs: List[Tensor], image_size: Tuple[int, int]) -> Instances:
        """Selects candidates of one level of one image; unlike detectron2's, it can apply centerness afterwards."""
        scores = outputs[0].float().sigmoid()
        if self.score_rule == "sqrt":
            scores = torch.sqrt(scores * outputs[2].float().sigmoid())
        above = scores > self.test_score_thresh
        # Sort and slice, because tracing does not support topk with a k that depends on the image.
        best, order = scores[above].sort(descending=True, stable=True)
        best, order = best[: self.test_topk_candidates], order[: self.test_topk_candidates]
        places, classes = above.nonzero()[order].unbind(1)
        if self.score_rule == "product":
            best = best * outputs[2][places, 0].float().sigmoid()
        boxes = Boxes(self.box2box_transform.apply_deltas(outputs[1][places], anchors.tensor[places]))
        return Instances(image_size, pred_boxes=boxes, scores=best, pred_classes=classes)

    def _suppress(self, found: Instances) -> Instances:
        """Applies NMS to the candidates of an image and returns its detections, best first."""
        if self.clip_before_nms:
            found.pred_boxes.clip(found.image_size)
            found = found[found.pred_boxes.nonempty()]
        keep = batched_nms(found.pred_boxes.tensor, found.scores, found.pred_classes, self.test_nms_thresh)
        return found[keep[: self.max_detections_per_image]]


def drop_tower_biases(head: RetinaNetHead) -> None:
    """Removes the biases of convolutions that are followed by a norm, as in the published heads."""
    for tower in (head.cls_subnet, head.bbox_subnet):
        for layer, following in zip(tower, tower[1:]):
            if isinstance(layer, nn.Conv2d) and not isinstance(following, nn.ReLU):
                layer.bias = None


def config_options(cls: type, base: type) -> Dict[str, Any]:
    """Returns the options that a config node has for a class: keyword arguments of the class and its bases up to base.

    Arguments without a default, with None as default, or shared by all detectors are left out.
    """
    own = defaults(cls, base)
    return {name: value for name, value in own.items() if value is not None and name not in _SHARED_OPTIONS}


def config_key(name: str) -> str:
    """Returns the config key of a keyword argument; as in detectron2, ``test_score_thresh`` is SCORE_THRESH_TEST."""
    test, _, option = name.partition("test_")
    return f"{option}_TEST".upper() if option and not test else name.upper()
