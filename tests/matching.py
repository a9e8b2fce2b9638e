"""How labels of anchors may differ from the reference's, whose rules for ties and padding are not detectron2's.

RetinaNet gives each box its best anchor, however low their IoU. Where that anchor overlaps more with another box,
mmdetection's assigner gives it to the former, and detectron2's matcher to the one that it overlaps most. And the
reference leaves out the anchors in padding before boxes choose their best, detectron2 afterwards. Both rules are
written out here; where they agree so must all labels, and where they differ each side must follow its own.
"""

from typing import Any

import torch
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor

from d2kd.dense import Targets


def label_rule(image: Instances, anchors: Tensor, usable: Tensor, model: Any, reference: bool) -> Tensor:
    """Labels (R,) of one image by IoU: a class, ``num_classes`` for background, -1 for anchors without meaning."""
    none, matcher = model.num_classes, model.anchor_matcher
    if len(image) == 0:
        return torch.where(usable, none, -1)
    iou = pairwise_iou(image.gt_boxes, Boxes(anchors))
    iou = iou.masked_fill(~usable, -1) if reference else iou
    best, owner = iou.max(0)
    low, high = matcher.thresholds[1:3]
    found = torch.where(best >= high, image.gt_classes[owner], torch.where(best < low, none, -1))
    for box, overlaps in enumerate(iou):
        chosen = overlaps == overlaps.max()
        found[chosen] = image.gt_classes[box] if reference else image.gt_classes[owner[chosen]]
    return found.masked_fill(~usable, -1)


def check_labels(model: Any, anchors: Tensor, targets: Targets, ours: Tensor, golden: Tensor) -> None:
    """Asserts that labels (N, R), -1 where an anchor has no weight, agree but for the difference of the rules.

    Args:
        model: the detector; of any but RetinaNet all labels must be equal.
        anchors: (R, 4).
        targets: has the ground truth.
        ours: our labels.
        golden: the reference's.
    """
    if not isinstance(model, RetinaNet):
        assert torch.equal(ours, golden)
        return
    for image, mine, theirs in zip(targets.instances, ours, golden):
        usable = inside_padding(model, anchors, image)
        rules = [label_rule(image, anchors, usable, model, reference) for reference in (False, True)]
        differ = rules[0] != rules[1]
        assert torch.equal(mine[~differ], theirs[~differ])
        assert torch.equal(mine[differ], rules[0][differ])
        assert torch.equal(theirs[differ], rules[1][differ])


def inside_padding(model: Any, anchors: Tensor, image: Instances) -> Tensor:
    """Whether an anchor's place lies in its image, padded by itself to a multiple of the backbone's divisibility."""
    multiple = model.backbone.size_divisibility
    height, width = (-(-side // multiple) * multiple for side in image.image_size)
    places = (anchors[:, :2] + anchors[:, 2:]) / 2  # at offset 0: where the cell starts
    return (places[:, 0] < width) & (places[:, 1] < height)
