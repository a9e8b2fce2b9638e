"""The common base of GFL and ATSS: one square anchor per location, labeled by ATSS."""

from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from detectron2.modeling import Backbone
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from ..contract import level_strides
from ..workers import mean_over_workers
from .anchors import make_anchors
from .atss_assign import assign_atss, starts_in_image
from .one_anchor import OneAnchorDetector, config_options


class Matches(NamedTuple):
    """The anchors of a batch, image after image, beside what they are matched with.

    All anchors are here, not only the positive ones, and losses mask the others: the CPU would have to wait for the
    number of positives.

    Attributes:
        positive: which anchors are labeled with a class, (N*R,) bool.
        anchors: (N*R, 4).
        boxes: their matched ground-truth boxes, (N*R, 4) XYXY; any finite numbers unless positive.
        deltas: the head's box predictions, (N*R, D) float32.
        decoded: the predictions decoded to boxes, (N*R, 4) XYXY, float32.
        normalizer: sum over images of max(#positives, 1), averaged over workers; ().
    """

    positive: Tensor
    anchors: Tensor
    boxes: Tensor
    deltas: Tensor
    decoded: Tensor
    normalizer: Tensor


class AnchorPointDetector(OneAnchorDetector):
    """A dense detector with one square anchor per location, centered at the top left corner of the location's cell.

    Anchors are labeled by ATSS (arXiv 1912.02424). Subclasses define ``losses`` with RetinaNet's arguments.

    Args:
        backbone: feature pyramid.
        head: predicts class logits, boxes and optionally centerness logits, per level.
        box2box_transform: decodes the box predictions.
        num_classes: number of classes K.
        pixel_mean: mean of each channel, subtracted from the image.
        pixel_std: standard deviation of each channel; the image is divided by it.
        head_in_features: names of the levels, high to low resolution; by default all levels of the backbone.
        anchor_scale: width of an anchor in strides.
        topk: number of candidates of a box per level, see :func:`assign_atss`.
        test_score_thresh: minimum class score of a detection.
        test_topk_candidates: number of candidates per level before NMS.
        test_nms_thresh: IoU above which the lower-scoring of two detections of a class is dropped.
        max_detections_per_image: number of detections kept after NMS.
        input_format: channel order of the images, "BGR" or "RGB".
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        head: nn.Module,
        box2box_transform: Any,
        num_classes: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        head_in_features: Optional[Sequence[str]] = None,
        anchor_scale: float = 8.0,
        topk: int = 9,
        test_score_thresh: float = 0.05,
        test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.6,
        max_detections_per_image: int = 100,
        input_format: str = "BGR",
    ) -> None:
        features = None if head_in_features is None else list(head_in_features)
        super().__init__(backbone, head, features, pixel_mean=pixel_mean, pixel_std=pixel_std)
        strides = level_strides(self)
        self.anchor_generator = DefaultAnchorGenerator(
            sizes=[[anchor_scale * stride] for stride in strides], aspect_ratios=[1.0], strides=strides, offset=0.0
        )
        self.box2box_transform = box2box_transform
        self.num_classes = num_classes
        self.topk = topk
        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.max_detections_per_image = max_detections_per_image
        self.input_format = input_format
        self.score_rule = "class"
        self.clip_before_nms = True

    @classmethod
    def _options(cls) -> Dict[str, Any]:
        return config_options(cls, AnchorPointDetector)

    def forward_training(
        self, images: ImageList, features: List[Tensor], predictions: List[List[Tensor]], gt_instances: List[Any]
    ) -> Dict[str, Tensor]:
        """Computes the losses of a batch, see ``losses``."""
        anchors = make_anchors(self.anchor_generator, features)
        logits, deltas, *rest = self._per_anchor(predictions)
        labels, boxes = self.label_anchors(anchors, gt_instances)
        return self.losses(anchors, logits, labels, deltas, boxes, *rest)

    @torch.no_grad()
    def label_anchors(self, anchors: List[Boxes], gt_instances: List[Instances]) -> Tuple[List[Tensor], List[Tensor]]:
        """Labels the anchors of each image, as :meth:`RetinaNet.label_anchors` does.

        Args:
            anchors: anchors of each level, the same for all images.
            gt_instances: ground truth of each image.

        Returns:
            The labels of each image, (R,): 0..K-1 for a class, K for background, -1 for anchors in padding, see
            :func:`starts_in_image`. And the matched boxes of each image, (R, 4), undefined where the label is not a
            class.
        """
        every = Boxes.cat(anchors)
        labels, boxes = [], []
        for target in gt_instances:
            usable = starts_in_image(every, target.image_size, self.backbone.size_divisibility)
            match = assign_atss(anchors, usable, target.gt_boxes, self.topk)
            # Index -1 (no match) selects the row appended here, the only row of an image without ground truth.
            classes = torch.cat([target.gt_classes, match.new_full((1,), self.num_classes)])
            labels.append(classes[match].masked_fill(~usable, -1))
            boxes.append(torch.cat([target.gt_boxes.tensor, every.tensor.new_zeros(1, 4)])[match])
        return labels, boxes

    def losses(
        self,
        anchors: List[Boxes],
        pred_logits: List[Tensor],
        gt_labels: List[Tensor],
        pred_deltas: List[Tensor],
        gt_boxes: List[Tensor],
        *rest: List[Tensor],
    ) -> Dict[str, Tensor]:
        """Computes the losses of a batch. Subclasses define this.

        Args:
            anchors: anchors of each level.
            pred_logits: per level (N, Hi*Wi, K).
            gt_labels: labels of each image, (R,), see :meth:`label_anchors`.
            pred_deltas: per level (N, Hi*Wi, D).
            gt_boxes: matched boxes of each image, (R, 4).
            *rest: further outputs of the head, per level (N, Hi*Wi, channels).

        Returns:
            Weighted losses, float32 scalars, with the same keys for every batch.
        """
        raise NotImplementedError

    def matches(
        self, anchors: List[Boxes], labels: Tensor, pred_deltas: List[Tensor], gt_boxes: List[Tensor]
    ) -> Matches:
        """Puts what is known of each anchor side by side.

        Args:
            anchors: anchors of each level.
            labels: (N, R).
            pred_deltas: per level (N, Hi*Wi, D).
            gt_boxes: matched boxes of each image, (R, 4).
        """
        mask = (labels >= 0) & (labels < self.num_classes)
        repeated = Boxes.cat(anchors).tensor.repeat(len(labels), 1)
        deltas = torch.cat(pred_deltas, dim=1).flatten(0, 1).float()
        decoded = self.box2box_transform.apply_deltas(deltas, repeated)
        normalizer = mean_over_workers(mask.sum(1).clamp(min=1).sum().float())
        return Matches(mask.flatten(), repeated, torch.cat(gt_boxes), deltas, decoded, normalizer)
