"""Other image sizes, anchors and box coders for a teacher; see :mod:`d2kd.diagnose.variants`."""

import copy
from functools import partial
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

import torch
from detectron2.modeling.anchor_generator import BufferList, DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from torch import Tensor

from ..keys import key
from ..modeling.coders import ClampedBoxTransform, LinearBoxTransform
from ..teacher import Teacher
from .sample import Sample
from .variants import Variant, where, with_parts

# Steps small enough for a teacher that was trained at a single size. Larger scales would need far more memory.
IMAGE_SCALES = (0.25, 0.3, 0.35, 0.42, 0.5, 0.59, 0.71, 0.84, 1.19, 1.41, 1.68, 2.0)
ANCHOR_SCALES = (0.5, 2.0)
# The defaults of detectron2's RetinaNet, and of its R-CNNs and ATSS.
BOX_WEIGHTS = ((1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0))
BOTH = "in student and teacher"

#: Other orders of the anchors of a place: what is done to their indices [size, aspect ratio], and the fix.
ANCHOR_ORDERS: Dict[str, Tuple[Callable[[Tensor], Tensor], str]] = {
    "sizes reversed": (lambda x: x.flip(0), f"reverse each list of MODEL.ANCHOR_GENERATOR.SIZES {BOTH}"),
    "aspect ratios reversed": (lambda x: x.flip(1), f"reverse MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS {BOTH}"),
    "aspect ratios first": (lambda x: x.T, "its weights need conversion (python -m d2kd.checkpoint.convert --help)"),
}


def size_variants(teacher: Teacher) -> Iterator[Variant]:
    """The teacher on smaller and larger images."""
    for scale in IMAGE_SCALES:
        diagnosis = (
            f"the teacher detects far better on images {scale:g} times as large: train at about the image size that it "
            f"was trained at ({key('INPUT.MIN_SIZE_TRAIN')}), or use a teacher trained at yours"
        )
        yield Variant(f"images x {scale:g}", diagnosis, teacher, partial(Sample.at_scale, scale=scale))


def anchor_variants(teacher: Teacher) -> Iterator[Variant]:
    """The teacher with anchors of other sizes, at other places, or in another order at each place."""
    generator: Any = teacher.detector.anchor_generator
    if not isinstance(generator, DefaultAnchorGenerator):
        return
    for factor in ANCHOR_SCALES:
        diagnosis = (
            f"the teacher was trained with anchors {factor:g} times as large: multiply MODEL.ANCHOR_GENERATOR.SIZES by "
            f"this {BOTH}"
        )
        yield Variant(f"anchors x {factor:g}", diagnosis, with_anchors(teacher, partial(torch.mul, other=factor)))
    offset = 0.0 if generator.offset else 0.5
    diagnosis = f"the teacher's anchors were elsewhere: set MODEL.ANCHOR_GENERATOR.OFFSET to {offset} {BOTH}"
    yield Variant(f"anchor offset {offset}", diagnosis, with_anchors(teacher, offset=offset))
    for name, (order, fix) in ANCHOR_ORDERS.items():
        changed = with_anchors(teacher, partial(reordered, order=order))
        yield Variant(f"anchor {name}", f"the teacher's anchors of a place were in another order: {fix}", changed)


def reordered(anchors: Tensor, order: Callable[[Tensor], Tensor]) -> Tensor:
    """The anchors of a place (A, 4), which are sorted by size and then by aspect ratio, in another order."""
    areas = (anchors[:, 2:] - anchors[:, :2]).prod(1)
    num_sizes = 1 + int(((areas[1:] / areas[:-1] - 1).abs() > 1e-3).sum())
    if len(anchors) % num_sizes:
        return anchors
    return anchors[order(torch.arange(len(anchors)).view(num_sizes, -1)).flatten()]


def with_anchors(
    teacher: Teacher, change: Callable[[Tensor], Tensor] = lambda x: x, offset: Optional[float] = None
) -> Teacher:
    """The same teacher with changed anchors (A, 4) at each place, or another offset."""
    generator: Any = copy.copy(teacher.detector.anchor_generator)
    generator._modules = dict(generator._modules)
    generator.cell_anchors = BufferList([change(anchors) for anchors in generator.cell_anchors])
    generator.offset = generator.offset if offset is None else offset
    return with_parts(teacher, anchor_generator=generator)


def coder_variants(teacher: Teacher) -> Iterator[Variant]:
    """The teacher with its box predictions decoded in other ways."""
    detector: Any = teacher.detector
    coder = detector.box2box_transform
    weights_key = key(f"MODEL.{type(detector).__name__.upper()}.BBOX_REG_WEIGHTS")
    for weights in BOX_WEIGHTS if isinstance(coder, (Box2BoxTransform, ClampedBoxTransform)) else ():
        if tuple(coder.weights) != weights:
            diagnosis = f"the teacher's box deltas had other weights: set {weights_key} to {weights} {where()}"
            changed = with_parts(teacher, box2box_transform=type(coder)(weights))
            yield Variant(f"box weights {weights}", diagnosis, changed)
    if hasattr(detector.head, "box_exp"):
        box_exp = not detector.head.box_exp
        head = copy.copy(detector.head)
        head.box_exp = box_exp
        diagnosis = f"the teacher predicts distances in another form: set MODEL.FCOS.BOX_EXP to {box_exp} {where()}"
        changed = with_parts(teacher, head=head, box2box_transform=LinearBoxTransform(normalize_by_size=not box_exp))
        yield Variant(f"BOX_EXP {box_exp}", diagnosis, changed)
