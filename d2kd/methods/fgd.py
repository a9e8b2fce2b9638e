"""FGD: Focal and Global Knowledge Distillation for Detectors, arXiv 2111.11837.

There are four terms per feature map:

- foreground and background (equation 8): the squared distance between the maps, weighted by the teacher's spatial and
  channel attention (equations 3 to 6) and by a mask. The weight of a cell inside a box is one over the number of cells
  of that box (of the smallest one where boxes overlap), and the weight of a background cell is one over the number of
  background cells of the image (equation 2).
- attention (equation 9): the L1 distance between the attentions of student and teacher.
- relation (equations 11 and 12): the squared distance between the maps, each after its own global context block; all
  of these blocks are trained.

The authors' configs use the weights (alpha, beta, gamma, lambda) = (1e-3, 5e-4, 5e-4, 5e-6) at temperature 0.5 for
RetinaNet and GFL, the defaults here, and (1.6e-3, 8e-4, 8e-4, 8e-6) at temperature 0.8 for FCOS. They initialize the
student with the teacher's neck and head, as MODEL.DISTILL.INHERIT does.

Where the paper leaves it open, this follows their code. Terms are sums over the cells and channels of a map, divided by
the number of images. A box covers the cells from the floor of its first edge to the ceiling of its last one, both
included, even if the last one lies beyond the map. Padding is background. Without boxes the foreground is 0.

Deviations from their code:

- Boxes are scaled by the padded size of the batch, which is what the maps cover. Theirs divides by each image's own
  size, so boxes of a padded image end up too far to the right and bottom.
- Boxes are clipped to their image, and a box entirely outside of it is ignored. In theirs, a negative coordinate is an
  index from the far end: a box that extends beyond the left or top vanishes or marks the opposite side. A box that
  extends beyond the right or bottom keeps its full size. ``unpadded`` restores the latter and the scale, but not the
  negative indices.
- The attention of the context blocks has no bias, which a softmax over all cells would cancel.
"""

from typing import Any, Dict, List, Tuple

import torch
from torch import Tensor, nn

from ..contract import Dense
from ..dense import DenseOutputs, Targets
from ..errors import D2kdError
from ..level_losses import differentiable_once, parts_of
from .base import METHOD_REGISTRY, Channels, FeatureMethod

# A relative coordinate at which a box covers no cell; the map ends at 1.
OUTSIDE = 2.0


@METHOD_REGISTRY.register()
class FGD(FeatureMethod):
    """Focal and global distillation of feature maps.

    Args:
        temperature: softens the attention, > 0.
        alpha: weight of the foreground term.
        beta: weight of the background term.
        gamma: weight of the attention term.
        lambda_: weight of the relation term.
        unpadded: scale boxes by the unpadded size of their image and do not clip them at the right and bottom, as the
            authors' code does; see the module docstring.

    Raises:
        D2kdError: the temperature is not positive.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        alpha: float = 1e-3,
        beta: float = 5e-4,
        gamma: float = 5e-4,
        lambda_: float = 5e-6,
        unpadded: bool = False,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise D2kdError(f"FGD's temperature is {temperature}; choose a value above 0 (published: 0.5 and 0.8)")
        self.temperature = temperature
        self.weights = {"fg": alpha, "bg": beta, "attention": gamma, "relation": lambda_}
        if not min(self.weights.values()) >= 0:
            raise D2kdError(f"FGD's alpha, beta, gamma and lambda_ are {alpha, beta, gamma, lambda_}; set 0 or more")
        self.unpadded = unpadded
        self.student_contexts = nn.ModuleList()
        self.teacher_contexts = nn.ModuleList()

    def setup(self, student: Dense, teacher: Dense, channels: Channels) -> None:
        super().setup(student, teacher, channels)
        self.student_contexts = nn.ModuleList(GlobalContext(theirs) for _, theirs in channels)
        self.teacher_contexts = nn.ModuleList(GlobalContext(theirs) for _, theirs in channels)

    def forward(self, student: DenseOutputs, teacher: DenseOutputs, targets: Targets) -> Dict[str, Tensor]:
        pairs = self.pairs(student, teacher)
        boxes = relative_boxes(targets, self.unpadded)
        with torch.autocast(pairs[0][0].device.type, enabled=False):
            levels = [self._terms(level, *pair, boxes) for level, pair in enumerate(pairs)]
        terms = torch.stack(levels).sum(0) / len(boxes)
        return {f"loss_fgd_{name}": weight * term for (name, weight), term in zip(self.weights.items(), terms)}

    def _terms(self, level: int, student: Tensor, teacher: Tensor, boxes: List[Tensor]) -> Tensor:
        """Returns the four terms of one pair of maps, summed over images, in the order of ``self.weights``."""
        foreground, background = focal_masks(boxes, *student.shape[-2:])
        student, teacher = student.flatten(2), teacher.flatten(2).detach()
        own_spatial, own_channel = attention(student, self.temperature)
        spatial, channel = attention(teacher, self.temperature)
        weights = torch.stack([foreground.flatten(1) * spatial, background.flatten(1) * spatial], dim=1)
        weights = torch.cat([weights, torch.ones_like(weights[:, :1])], dim=1)
        squares, offset = Distances.apply(student, teacher, weights)
        fg, bg = (squares[:, :2] * channel[:, None]).sum((0, 2))
        between_attentions = (spatial - own_spatial).abs().sum() + (channel - own_channel).abs().sum()
        # A context shifts a channel equally in all cells. Expanding the square avoids allocating another map.
        shift = self.teacher_contexts[level](teacher) - self.student_contexts[level](student)
        relation = squares[:, 2] + 2 * shift * offset + shift.square() * student.shape[2]
        return torch.stack([fg, bg, between_attentions, relation.sum()])


class GlobalContext(nn.Module):
    """The part of a GCNet block (arXiv 1904.11492) that is added to each channel; initialized to output 0.

    Args:
        channels: channels of the map, at least 2.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Linear(channels, 1, bias=False)
        first, last = nn.Linear(channels, channels // 2), nn.Linear(channels // 2, channels)
        self.transform = nn.Sequential(first, nn.LayerNorm(channels // 2), nn.ReLU(inplace=True), last)
        nn.init.kaiming_normal_(self.query.weight, nonlinearity="relu")
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, feature: Tensor) -> Tensor:
        """Maps (N, C, H*W) to (N, C)."""
        # nn.Linear would need a transposed copy of the map.
        scores = torch.bmm(self.query.weight.expand(len(feature), 1, -1), feature)
        context = torch.bmm(scores.softmax(-1), feature.transpose(1, 2))
        return self.transform(context.squeeze(1))


class Distances(torch.autograd.Function):
    """Sums of ``teacher - student`` over cells: the weighted squares and the plain differences.

    A custom function saves memory: it keeps only the two maps and the weights for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, weights: Tensor) -> Tuple[Tensor, Tensor]:
        """Computes the sums.

        Args:
            ctx: autograd context.
            student: (N, C, H*W).
            teacher: (N, C, H*W); gets no gradient.
            weights: (N, K, H*W), K different weightings of the cells; gets no gradient.

        Returns:
            The weighted sums of squares, (N, K, C), and the plain sums, (N, C).
        """
        ctx.save_for_backward(student, teacher, weights)
        difference = teacher - student
        offset = difference.sum(2)
        return torch.bmm(weights, difference.square_().transpose(1, 2)), offset

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, squares: Tensor, offset: Tensor) -> Tuple[Tensor, None, None]:
        student, teacher, weights = ctx.saved_tensors
        slope = torch.bmm(2 * squares.transpose(1, 2), weights)
        for own, theirs, shift, out in parts_of(student, teacher, offset[:, :, None], slope):
            out.mul_(own - theirs).sub_(shift)
        return slope, None, None


class Magnitudes(torch.autograd.Function):
    """Means of the absolute values of a map over channels and over cells.

    A custom function saves time: it makes the gradient of both at once, in parts that fit the cache.
    """

    @staticmethod
    def forward(ctx: Any, feature: Tensor) -> Tuple[Tensor, Tensor]:
        """Maps (N, C, H*W) to the means over channels (N, H*W) and over cells (N, C)."""
        ctx.save_for_backward(feature)
        return tuple(torch.linalg.vector_norm(feature, ord=1, dim=dim) / feature.shape[dim] for dim in (1, 2))

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, spatial: Tensor, channel: Tensor) -> Tensor:
        (feature,) = ctx.saved_tensors
        slope = torch.empty_like(feature)
        over_channels = (spatial / feature.shape[1])[:, None].expand_as(feature)
        over_cells = (channel / feature.shape[2])[:, :, None]
        for values, by_cell, by_channel, out in parts_of(feature, over_channels, over_cells, slope):
            torch.add(by_cell, by_channel, out=out).mul_(values.sign())
        return slope


def attention(feature: Tensor, temperature: float) -> Tuple[Tensor, Tensor]:
    """Computes where and in which channels a map is large.

    Args:
        feature: (N, C, H*W).
        temperature: divides the mean absolute values before the softmax.

    Returns:
        Spatial attention (N, H*W) and channel attention (N, C), each with mean 1.
    """
    channels, cells = feature.shape[1:]
    spatial, channel = Magnitudes.apply(feature)
    return cells * (spatial / temperature).softmax(1), channels * (channel / temperature).softmax(1)


def relative_boxes(targets: Targets, unpadded: bool) -> List[Tensor]:
    """Returns each image's boxes, (B, 4) XYXY, relative to the height and width of the maps.

    See the module docstring for ``unpadded``.
    """
    counts = [len(image) for image in targets.instances]
    boxes = torch.cat([image.gt_boxes.tensor for image in targets.instances])
    sizes = [image.image_size[::-1] * 2 for image in targets.instances for _ in range(len(image))]
    size = torch.tensor(sizes, dtype=torch.float32).view(len(sizes), 4).to(boxes.device, non_blocking=True)
    missed = (boxes[:, 2:] < 0).any(1) | (boxes[:, :2] >= size[:, :2]).any(1)
    boxes = boxes.clamp(min=0)
    if not unpadded:
        boxes = torch.minimum(boxes, size)
        size = torch.tensor(targets.padded_size[::-1] * 2, dtype=torch.float32).to(boxes.device, non_blocking=True)
    return list((boxes / size).masked_fill(missed[:, None], OUTSIDE).split(counts))


def focal_masks(boxes: List[Tensor], height: int, width: int) -> Tuple[Tensor, Tensor]:
    """Returns the foreground and background masks, each (N, H, W), for the boxes of :func:`relative_boxes`."""
    foreground = torch.stack([foreground_mask(image, height, width) for image in boxes])
    background = (foreground == 0).float()
    return foreground, background / background.sum((1, 2), keepdim=True).clamp(min=1)


def foreground_mask(boxes: Tensor, height: int, width: int) -> Tensor:
    """Returns one over the number of cells of the smallest box at each cell, (H, W); 0 outside of all boxes (B, 4)."""
    if len(boxes) == 0:
        return boxes.new_zeros(height, width)
    left, top, right, bottom = boxes.unbind(1)
    rows, columns = coverage(top, bottom, height), coverage(left, right, width)
    return (rows[:, :, None] * columns[:, None, :]).amax(0)


def coverage(start: Tensor, end: Tensor, length: int) -> Tensor:
    """Returns one over the number of cells from start to end inside that range, and 0 elsewhere, (B, length)."""
    first, last = (start * length).floor(), (end * length).ceil()
    cells = torch.arange(length, device=start.device)
    inside = (cells >= first[:, None]) & (cells <= last[:, None])
    return inside / (last - first + 1)[:, None]
