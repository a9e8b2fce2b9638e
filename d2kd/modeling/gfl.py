"""GFL: Generalized Focal Loss, arXiv 2006.04388.

Class scores predict the IoU of their box, and each side of a box is predicted as a distribution of distances.
"""

from typing import Any, Callable, Dict, List, Tuple, Union

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.structures import Boxes
from detectron2.structures.boxes import matched_pairwise_iou
from torch import Tensor, nn

from ..losses import distribution_focal_loss, giou_loss, quality_focal_loss
from ..workers import mean_over_workers
from .anchor_points import AnchorPointDetector, Matches
from .coders import IntegralBoxTransform
from .one_anchor import drop_tower_biases


class GFLHead(RetinaNetHead):
    """RetinaNet's head with box distributions and a learnable scale per level.

    Args:
        input_shape: the shape of each level, all with the same number of channels.
        num_classes: number of classes K.
        conv_dims: channels of the towers' convolutions.
        reg_max: each side of a box has reg_max + 1 bins.
        norm: name of a norm ("GN" has 32 groups), or a function from channels to a module.
        **kwargs: ``prior_prob``, the class score at initialization.
    """

    def __init__(
        self,
        *,
        input_shape: List[ShapeSpec],
        num_classes: int,
        conv_dims: List[int],
        reg_max: int = 16,
        norm: Union[str, Callable[[int], nn.Module]] = "GN",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            input_shape=input_shape,
            num_classes=num_classes,
            num_anchors=1,
            conv_dims=list(conv_dims),
            norm=norm,
            **kwargs,
        )
        drop_tower_biases(self)
        self.reg_max = reg_max
        self.bbox_pred = nn.Conv2d(conv_dims[-1], 4 * (reg_max + 1), kernel_size=3, padding=1)
        nn.init.normal_(self.bbox_pred.weight, std=0.01)
        nn.init.zeros_(self.bbox_pred.bias)  # type: ignore[arg-type]
        self.scales = nn.Parameter(torch.ones(len(input_shape)))

    def forward(self, features: List[Tensor]) -> Tuple[List[Tensor], List[Tensor]]:
        """Predicts classes and boxes.

        Args:
            features: per level (N, C, Hi, Wi).

        Returns:
            Per level: class logits (N, K, Hi, Wi), and scaled logits of the distances of the left, top, right and
            bottom side (N, 4*(reg_max+1), Hi, Wi).
        """
        logits, distributions = [], []
        for level, feature in enumerate(features):
            logits.append(self.cls_score(self.cls_subnet(feature)))
            distributions.append(self.scales[level] * self.bbox_pred(self.bbox_subnet(feature)))
        return logits, distributions


@META_ARCH_REGISTRY.register()
class GFL(AnchorPointDetector):
    """The GFL detector.

    Args:
        head: a :class:`GFLHead`.
        anchor_scale: width of an anchor in strides.
        qfl_beta: focusing exponent of the class loss.
        cls_weight: weight of the quality focal loss.
        box_weight: weight of the GIoU loss.
        dfl_weight: weight of the distribution focal loss.
        **kwargs: see :class:`AnchorPointDetector`.
    """

    config_node = "GFL"
    head_class = GFLHead

    @configurable
    def __init__(
        self,
        *,
        head: GFLHead,
        anchor_scale: float = 8.0,
        qfl_beta: float = 2.0,
        cls_weight: float = 1.0,
        box_weight: float = 2.0,
        dfl_weight: float = 0.25,
        **kwargs: Any,
    ) -> None:
        transform = IntegralBoxTransform(head.reg_max, anchor_scale)
        super().__init__(head=head, box2box_transform=transform, anchor_scale=anchor_scale, **kwargs)
        self.qfl_beta = qfl_beta
        self.cls_weight = cls_weight
        self.box_weight = box_weight
        self.dfl_weight = dfl_weight

    def losses(
        self,
        anchors: List[Boxes],
        pred_logits: List[Tensor],
        gt_labels: List[Tensor],
        pred_deltas: List[Tensor],
        gt_boxes: List[Tensor],
        *rest: List[Tensor],
    ) -> Dict[str, Tensor]:
        """Computes quality focal, GIoU and distribution focal loss, see :meth:`AnchorPointDetector.losses`.

        The box losses of each anchor are weighted by its highest class score. The sum is divided by the sum of these
        scores, averaged over workers and at least 1.

        Returns:
            ``loss_cls``, ``loss_bbox``, ``loss_dfl``.
        """
        labels = torch.stack(gt_labels)
        logits = torch.cat(pred_logits, dim=1).flatten(0, 1).float()
        matches = self.matches(anchors, labels, pred_deltas, gt_boxes)
        overlaps = matched_pairwise_iou(Boxes(matches.decoded.detach()), Boxes(matches.boxes))
        overlaps = overlaps.where(matches.positive, 0.0)  # two boxes without area have NaN
        cls_losses = quality_focal_loss(logits, labels.flatten(), overlaps, self.qfl_beta)
        cls_loss = (cls_losses * (labels.flatten() >= 0)).sum()
        weights = logits.detach().amax(-1).sigmoid() * matches.positive
        normalizer = self._at_least_one(mean_over_workers(weights.sum()))
        box_loss = (giou_loss(matches.decoded, matches.boxes) * weights).sum()
        dfl_loss = (self._side_losses(matches) * weights).sum()
        return {
            "loss_cls": self.cls_weight * cls_loss / matches.normalizer,
            "loss_bbox": self.box_weight * box_loss / normalizer,
            "loss_dfl": self.dfl_weight * dfl_loss / normalizer,
        }

    def _side_losses(self, matches: Matches) -> Tensor:
        """Returns the distribution focal loss of each anchor, averaged over its four sides, (N*R,)."""
        targets = self.box2box_transform.get_deltas(matches.anchors, matches.boxes)
        bins = matches.deltas.unflatten(1, (4, -1)).flatten(0, 1)
        return distribution_focal_loss(bins, targets.flatten()).view(-1, 4).mean(1)
