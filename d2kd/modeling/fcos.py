"""FCOS with YAML config support and the options of published recipes.

FCOS: Fully Convolutional One-Stage Object Detection, arXiv 1904.01355 and 2006.09214.

With the defaults this is detectron2's own FCOS. Each option changes one detail to match other implementations. The FCOS
that CrossKD (arXiv 2306.11369) distills uses all of ``box_scales``, ``box_exp``, ``ctrness_on_cls``,
``tower_bias=False``, ``center_sampling_radius=0``, ``box_reg_loss_type="iou_log"``, ``loss_normalizer="batch"``,
``score_rule="product"`` and ``clip_before_nms``. Rare ties are resolved as in detectron2 and are not covered by any
measured number: a location whose farthest side lies exactly at the distance that separates two levels is positive on
neither, and among boxes whose areas differ by less than 8 squared pixels the first one wins, not necessarily the
smallest.
"""

from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, Backbone
from detectron2.modeling.meta_arch import fcos
from detectron2.structures import Boxes
from fvcore.nn import sigmoid_focal_loss_jit
from torch import Tensor, nn

from ..contract import check_level_names
from ..errors import D2kdError, check_choice
from ..keys import key
from ..losses import BOX_LOSSES, centerness_targets, one_hot
from ..workers import mean_over_workers
from .boxes import decode_boxes
from .coders import LinearBoxTransform
from .one_anchor import OneAnchorDetector, config_options, drop_tower_biases

LOSS_NORMALIZERS = ("ema", "batch")
SCORE_RULES = ("sqrt", "product")


class FCOSHead(fcos.FCOSHead):
    """detectron2's FCOS head with the box and centerness outputs of the FCOS paper as options.

    Args:
        input_shape: the shape of each level, all with the same number of channels.
        conv_dims: channels of the towers' convolutions.
        norm: name of a norm, or a function from channels to a module.
        box_scales: multiply the box output of each level by a learned scalar.
        box_exp: apply the exponential function, which gives distances in pixels (:class:`FCOS` needs the same option);
            otherwise negative distances count as 0 and the unit is the level's stride.
        ctrness_on_cls: predict centerness from the class tower (arXiv 1904.01355) instead of the box tower.
        tower_bias: keep the biases of tower convolutions that are followed by a norm; published heads have none.
        **kwargs: ``num_classes``, ``prior_prob``.
    """

    def __init__(
        self,
        *,
        input_shape: List[ShapeSpec],
        conv_dims: List[int],
        norm: Union[str, Callable[[int], nn.Module]] = "GN",
        box_scales: bool = False,
        box_exp: bool = False,
        ctrness_on_cls: bool = False,
        tower_bias: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(input_shape=input_shape, conv_dims=list(conv_dims), norm=norm, **kwargs)
        if not tower_bias:
            drop_tower_biases(self)
        self.scales = nn.Parameter(torch.ones(len(input_shape))) if box_scales else None
        self.box_exp = box_exp
        self.ctrness_on_cls = ctrness_on_cls

    def forward(self, features: List[Tensor]) -> Tuple[List[Tensor], List[Tensor], List[Tensor]]:
        """Predicts class logits, distances and centerness logits.

        Args:
            features: per level (N, C, Hi, Wi).

        Returns:
            Per level: class logits (N, K, Hi, Wi); distances from the location to the left, top, right and bottom side
            of the box (N, 4, Hi, Wi), see the class; centerness logits (N, 1, Hi, Wi).
        """
        logits, distances, centerness = [], [], []
        for level, feature in enumerate(features):
            cls_feature, box_feature = self.cls_subnet(feature), self.bbox_subnet(feature)
            logits.append(self.cls_score(cls_feature))
            centerness.append(self.ctrness(cls_feature if self.ctrness_on_cls else box_feature))
            distance = self.bbox_pred(box_feature)
            if self.scales is not None:
                distance = self.scales[level] * distance
            if self.box_exp:  # in float32, since half precision overflows above 11
                distance = distance.float().exp()
            distances.append(distance)
        return logits, distances, centerness


@META_ARCH_REGISTRY.register()
class FCOS(OneAnchorDetector, fcos.FCOS):
    """detectron2's FCOS, which can also be built from ``MODEL.FCOS`` and has the options of published recipes.

    Args:
        backbone: feature pyramid.
        head: a :class:`FCOSHead`.
        num_classes: number of classes K.
        pixel_mean: mean of each channel, subtracted from the image.
        pixel_std: standard deviation of each channel; the image is divided by it.
        head_in_features: names of the levels, high to low resolution; by default all levels of the backbone.
        box_exp: the head predicts distances in pixels; must equal the head's option of the same name.
        center_sampling_radius: maximum distance of a positive location from the center of its box, in strides;
            0 allows the whole box.
        box_reg_loss_type: "giou", or "iou_log" for -log IoU.
        loss_normalizer: "ema" divides all losses by a running mean of each worker's number of positive locations.
            "batch" divides the class and centerness losses by the batch's own number, averaged over workers and at
            least 1; it weights the box loss of each location by its centerness target and divides the sum by the sum of
            these targets.
        score_rule: how detections are scored. "sqrt": sqrt(class * centerness score) for the threshold, candidates, NMS
            and ranking (arXiv 2006.09214). "product": class score for the threshold and candidates, class * centerness
            score for NMS and ranking (arXiv 1904.01355).
        clip_before_nms: clip boxes to the image and drop empty ones before NMS instead of at the very end.
        input_format: channel order of the images, "BGR" or "RGB".
        **kwargs: other arguments of detectron2's FCOS: ``focal_loss_alpha``, ``test_score_thresh`` ...

    Raises:
        D2kdError: an option has an unknown value, the head's ``box_exp`` differs, or the backbone lacks a level.
    """

    config_node = "FCOS"
    head_class = FCOSHead

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: nn.Module,
        num_classes: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        head_in_features: Optional[Sequence[str]] = None,
        box_exp: bool = False,
        center_sampling_radius: float = 1.5,
        box_reg_loss_type: str = "giou",
        loss_normalizer: str = "ema",
        score_rule: str = "sqrt",
        clip_before_nms: bool = False,
        input_format: str = "BGR",
        **kwargs: Any,
    ) -> None:
        check_choice(key("MODEL.FCOS.BOX_REG_LOSS_TYPE"), box_reg_loss_type, BOX_LOSSES)
        check_choice(key("MODEL.FCOS.LOSS_NORMALIZER"), loss_normalizer, LOSS_NORMALIZERS)
        check_choice(key("MODEL.FCOS.SCORE_RULE"), score_rule, SCORE_RULES)
        if getattr(head, "box_exp", False) != box_exp:
            raise D2kdError(f"FCOS has box_exp={box_exp} and its head has box_exp={not box_exp}; set both to the same")
        check_level_names(head_in_features or (), backbone.output_shape())
        super().__init__(
            backbone=backbone,
            head=head,
            num_classes=num_classes,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
            head_in_features=None if head_in_features is None else list(head_in_features),
            box2box_transform=LinearBoxTransform(normalize_by_size=not box_exp),
            center_sampling_radius=center_sampling_radius or float("inf"),
            **kwargs,
        )
        self.box_reg_loss_type = box_reg_loss_type
        self.loss_normalizer_type = loss_normalizer  # detectron2 keeps its running mean in self.loss_normalizer
        self.score_rule = score_rule
        self.clip_before_nms = clip_before_nms
        self.input_format = input_format

    @classmethod
    def _options(cls) -> Dict[str, Any]:
        return config_options(cls, fcos.FCOS)

    def losses(
        self,
        anchors: List[Boxes],
        pred_logits: List[Tensor],
        gt_labels: List[Tensor],
        pred_anchor_deltas: List[Tensor],
        gt_boxes: List[Tensor],
        pred_centerness: List[Tensor],
    ) -> Dict[str, Tensor]:
        """Computes detectron2's losses, with this detector's box loss and normalizers.

        Args:
            anchors: anchors of each level.
            pred_logits: per level (N, Hi*Wi, K).
            gt_labels: labels of each image, (R,), where K is background.
            pred_anchor_deltas: distances, per level (N, Hi*Wi, 4).
            gt_boxes: matched boxes of each image, (R, 4).
            pred_centerness: logits, per level (N, Hi*Wi, 1).

        Returns:
            ``loss_fcos_cls``, ``loss_fcos_loc``, ``loss_fcos_ctr``; without ground truth the last two are 0.
        """
        # detectron2's losses raise an error for the half precision of autocast; float32 is not changed by this.
        pred_logits, pred_anchor_deltas, pred_centerness = (
            [level.float() for level in output] for output in (pred_logits, pred_anchor_deltas, pred_centerness)
        )
        if self.loss_normalizer_type == "ema" and self.box_reg_loss_type == "giou":
            return super().losses(anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes, pred_centerness)
        labels = torch.stack(gt_labels)
        positive = labels < self.num_classes
        cls_loss = sigmoid_focal_loss_jit(
            torch.cat(pred_logits, dim=1),
            one_hot(labels, self.num_classes).float(),
            alpha=self.focal_loss_alpha,
            gamma=self.focal_loss_gamma,
            reduction="sum",
        )
        # Masked, not selected: the CPU would have to wait for the number of positives.
        targets = centerness_targets(Boxes.cat(anchors).tensor, torch.stack(gt_boxes)) * positive
        centerness = torch.cat(pred_centerness, dim=1).squeeze(2)
        ctr_losses = F.binary_cross_entropy_with_logits(centerness, targets, reduction="none")
        ctr_loss = (ctr_losses * positive).sum()
        box_losses = self._box_losses(anchors, torch.cat(pred_anchor_deltas, dim=1), gt_boxes) * positive
        if self.loss_normalizer_type == "ema":
            # In float64, as the Python number that detectron2 keeps here, for which it waits.
            normalizer = self._ema_update("loss_normalizer", positive.sum().clamp(min=1).double(), 300)  # type: ignore[arg-type]
            return _named(cls_loss / normalizer, box_losses.sum() / normalizer, ctr_loss / normalizer)
        num_pos = self._at_least_one(mean_over_workers(positive.sum().float()))
        ctr_sum = mean_over_workers(targets.sum()).clamp(min=1e-6)
        return _named(cls_loss / num_pos, (box_losses * targets).sum() / ctr_sum, ctr_loss / num_pos)

    def _box_losses(self, anchors: List[Boxes], deltas: Tensor, gt_boxes: List[Tensor]) -> Tensor:
        """Returns the box loss of each location, (N, R)."""
        boxes = decode_boxes(self.box2box_transform, deltas.flatten(0, 1), Boxes.cat(anchors).tensor)
        return BOX_LOSSES[self.box_reg_loss_type](boxes.view_as(deltas), torch.stack(gt_boxes))


def _named(cls_loss: Tensor, box_loss: Tensor, ctr_loss: Tensor) -> Dict[str, Tensor]:
    return {"loss_fcos_cls": cls_loss, "loss_fcos_loc": box_loss, "loss_fcos_ctr": ctr_loss}
