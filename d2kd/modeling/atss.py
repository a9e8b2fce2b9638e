"""ATSS: Bridging the Gap Between Anchor-based and Anchor-free Detection via Adaptive Training Sample Selection.

arXiv 1912.02424, the variant with one square anchor per location.
"""

from typing import Any, Callable, Dict, List, Tuple, Union

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.structures import Boxes
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor, nn

from ..losses import centerness_targets, giou_loss, one_hot
from ..workers import mean_over_workers
from .anchor_points import AnchorPointDetector
from .coders import ClampedBoxTransform
from .one_anchor import drop_tower_biases

DELTA_WEIGHTS = (10.0, 10.0, 5.0, 5.0)


class ATSSHead(FCOSHead):
    """FCOS's head (centerness in ``ctrness``) with a learnable scale of the box deltas per level.

    Args:
        input_shape: the shape of each level, all with the same number of channels.
        conv_dims: channels of the towers' convolutions.
        norm: name of a norm ("GN" has 32 groups), or a function from channels to a module.
        **kwargs: ``num_classes``, and ``prior_prob``, the class score at initialization.
    """

    def __init__(
        self,
        *,
        input_shape: List[ShapeSpec],
        conv_dims: List[int],
        norm: Union[str, Callable[[int], nn.Module]] = "GN",
        **kwargs: Any,
    ) -> None:
        super().__init__(input_shape=input_shape, conv_dims=list(conv_dims), norm=norm, **kwargs)
        drop_tower_biases(self)
        self.scales = nn.Parameter(torch.ones(len(input_shape)))

    def forward(self, features: List[Tensor]) -> Tuple[List[Tensor], List[Tensor], List[Tensor]]:
        """Predicts classes, boxes and centerness.

        Args:
            features: per level (N, C, Hi, Wi).

        Returns:
            Per level: class logits (N, K, Hi, Wi), scaled box deltas (N, 4, Hi, Wi), centerness logits (N, 1, Hi, Wi).
        """
        logits, deltas, centerness = [], [], []
        for level, feature in enumerate(features):
            box_feature = self.bbox_subnet(feature)
            logits.append(self.cls_score(self.cls_subnet(feature)))
            deltas.append(self.scales[level] * self.bbox_pred(box_feature))
            centerness.append(self.ctrness(box_feature))
        return logits, deltas, centerness


@META_ARCH_REGISTRY.register()
class ATSS(AnchorPointDetector):
    """The ATSS detector.

    Args:
        focal_loss_alpha: alpha of the focal loss.
        focal_loss_gamma: gamma of the focal loss.
        cls_weight: weight of the focal loss.
        box_weight: weight of the GIoU loss.
        centerness_weight: weight of the centerness loss.
        **kwargs: see :class:`AnchorPointDetector`.
    """

    config_node = "ATSS"
    head_class = ATSSHead

    @configurable
    def __init__(
        self,
        *,
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
        cls_weight: float = 1.0,
        box_weight: float = 2.0,
        centerness_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(box2box_transform=ClampedBoxTransform(weights=DELTA_WEIGHTS), **kwargs)
        self.score_rule = "product"
        self.focal_loss_alpha = focal_loss_alpha
        self.focal_loss_gamma = focal_loss_gamma
        self.cls_weight = cls_weight
        self.box_weight = box_weight
        self.centerness_weight = centerness_weight

    def losses(
        self,
        anchors: List[Boxes],
        pred_logits: List[Tensor],
        gt_labels: List[Tensor],
        pred_deltas: List[Tensor],
        gt_boxes: List[Tensor],
        *rest: List[Tensor],
    ) -> Dict[str, Tensor]:
        """Computes focal loss, GIoU loss and BCE of centerness, see :meth:`AnchorPointDetector.losses`.

        The box loss of each anchor is weighted by its centerness target. The sum is divided by the sum of these
        targets, averaged over workers and at least 1.

        Returns:
            ``loss_cls``, ``loss_bbox``, ``loss_centerness``.
        """
        labels = torch.stack(gt_labels)
        matches = self.matches(anchors, labels, pred_deltas, gt_boxes)
        targets = centerness_targets(matches.anchors, matches.boxes) * matches.positive
        centerness = torch.cat(rest[0], dim=1).flatten().float()
        centerness_losses = F.binary_cross_entropy_with_logits(centerness, targets, reduction="none")
        centerness_loss = (centerness_losses * matches.positive).sum()
        box_loss = (giou_loss(matches.decoded, matches.boxes) * targets).sum()
        box_normalizer = self._at_least_one(mean_over_workers(targets.sum()))
        cls_losses = self._focal_losses(torch.cat(pred_logits, dim=1), labels)
        cls_loss = (cls_losses * (labels >= 0)).sum()
        return {
            "loss_cls": self.cls_weight * cls_loss / matches.normalizer,
            "loss_bbox": self.box_weight * box_loss / box_normalizer,
            "loss_centerness": self.centerness_weight * centerness_loss / matches.normalizer,
        }

    def _focal_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the focal loss of each anchor, summed over classes, (N, R)."""
        targets = one_hot(labels, self.num_classes).float()
        alpha, gamma = self.focal_loss_alpha, self.focal_loss_gamma
        return sigmoid_focal_loss(logits.float(), targets, alpha=alpha, gamma=gamma).sum(-1)
