"""FGD: Focal and Global Knowledge Distillation for Detectors, arXiv 2111.11837.

Per feature map, four terms:

- foreground and background (equation 8): the squared distance of the maps, weighed by the teacher's spatial and channel
  attention (equations 3 to 6) and by a mask. A cell in a box weighs one over the cells of that box (of the smallest,
  where boxes overlap), a cell of the background one over the cells of the image's background (equation 2).
- attention (equation 9): the L1 distance of the attentions of student and teacher.
- relation (equations 11 and 12): the squared distance of the maps after a global context block each, all trained.

The authors' configs weigh them, as (alpha, beta, gamma, lambda), by (1e-3, 5e-4, 5e-4, 5e-6) at temperature 0.5 for
RetinaNet and GFL, the defaults here, and by (1.6e-3, 8e-4, 8e-4, 8e-6) at temperature 0.8 for FCOS. They start the
student from the teacher's neck and head, as MODEL.DISTILL.INHERIT does.

As in their code, where the paper leaves it open: terms are sums over a map's cells and channels, divided by the number
of images; a box covers the cells from the floor of its first edge to the ceiling of its last one, both included, also
where the last lies beyond the map; padding is background; without boxes the foreground is 0.

Deviations from their code:

- Boxes are scaled by the padded size of the batch, which the maps cover. Theirs divides by each image's own size, so
  that boxes of a padded image lie too far right and down.
- Boxes are clipped to their image, and one that misses it counts for nothing. In theirs a negative coordinate counts
  from the far end: a box that sticks out at the left or top vanishes, or marks the opposite side. A box that sticks out
  at the right or bottom keeps its whole size. ``unpadded`` restores this and the scale, but not the negative indices.
- The context blocks' attention has no bias: a softmax over all cells does not see it.
"""

from typing import Any, Dict, List, Tuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..contract import Dense
from ..dense import DenseOutputs, Targets
from ..errors import D2kdError
from .base import METHOD_REGISTRY, Channels, FeatureMethod

# Where a box covers no cell, in parts of the map.
OUTSIDE = 2.0


@METHOD_REGISTRY.register()
class FGD(FeatureMethod):
    """Focal and global distillation of feature maps.

    Args:
        temperature: softens the attentions, > 0.
        alpha: weight of the foreground term.
        beta: weight of the background term.
        gamma: weight of the attention term.
        lambda_: weight of the relation term.
        unpadded: scale boxes by the unpadded size of their image, and cut nothing off at the right and lower edge, as
            the authors' code does; see the module.

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
            raise D2kdError(f"FGD's temperature is {temperature}; choose one above 0, published are 0.5 and 0.8")
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
        """The four terms of one pair of maps, summed over images, in the order of ``self.weights``."""
        foreground, background = focal_masks(boxes, *student.shape[-2:])
        student, teacher = student.flatten(2), teacher.flatten(2).detach()
        own_spatial, own_channel = attention(student, self.temperature)
        spatial, channel = attention(teacher, self.temperature)
        weights = torch.stack([foreground.flatten(1) * spatial, background.flatten(1) * spatial], dim=1)
        weights = torch.cat([weights, torch.ones_like(weights[:, :1])], dim=1)
        squares, offset = Distances.apply(student, teacher, weights)
        fg, bg = (squares[:, :2] * channel[:, None]).sum((0, 2))
        between_attentions = (spatial - own_spatial).abs().sum() + (channel - own_channel).abs().sum()
        # A context raises a channel alike in all cells; with the square expanded, no further map is made.
        shift = self.teacher_contexts[level](teacher) - self.student_contexts[level](student)
        relation = squares[:, 2] + 2 * shift * offset + shift.square() * student.shape[2]
        return torch.stack([fg, bg, between_attentions, relation.sum()])


class GlobalContext(nn.Module):
    """What the global context block of GCNet (arXiv 1904.11492) adds to each channel; nothing, until it is trained.

    Args:
        channels: of the map, at least 2.
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
        """Takes a map (N, C, H*W) and gives (N, C)."""
        # Not through Linear, which would copy the map into another order.
        scores = torch.bmm(self.query.weight.expand(len(feature), 1, -1), feature)
        context = torch.bmm(scores.softmax(-1), feature.transpose(1, 2))
        return self.transform(context.squeeze(1))


class Distances(torch.autograd.Function):
    """Sums over the cells of ``teacher - student``, squared and weighted, and plain.

    Written out because only the two maps, which live anyway, need to be kept for the gradient.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, weights: Tensor) -> Tuple[Tensor, Tensor]:
        """Computes the sums.

        Args:
            ctx: autograd's.
            student: (N, C, H*W).
            teacher: likewise; gets no gradient.
            weights: (N, K, H*W), K different weightings of the cells; gets no gradient.

        Returns:
            The weighted sums of squares, (N, K, C), and the plain sums, (N, C).
        """
        ctx.save_for_backward(student, teacher, weights)
        difference = teacher - student
        offset = difference.sum(2)
        return torch.bmm(weights, difference.square_().transpose(1, 2)), offset

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, squares: Tensor, offset: Tensor) -> Tuple[Tensor, None, None]:
        student, teacher, weights = ctx.saved_tensors
        slope = torch.bmm(2 * squares.transpose(1, 2), weights)
        return slope.mul_(student - teacher).sub_(offset[:, :, None]), None, None


def attention(feature: Tensor, temperature: float) -> Tuple[Tensor, Tensor]:
    """Where and in which channels a map is large: spatial (N, H*W) and channel (N, C) attention, each of mean 1.

    Args:
        feature: (N, C, H*W).
        temperature: divides the mean absolute values before the softmax.
    """
    channels, cells = feature.shape[1:]
    spatial = torch.linalg.vector_norm(feature, ord=1, dim=1) / channels
    channel = torch.linalg.vector_norm(feature, ord=1, dim=2) / cells
    return cells * (spatial / temperature).softmax(1), channels * (channel / temperature).softmax(1)


def relative_boxes(targets: Targets, unpadded: bool) -> List[Tensor]:
    """The boxes of each image, (B, 4) XYXY in parts of the maps' height and width; see the module for ``unpadded``."""
    counts = [len(image) for image in targets.instances]
    image_of = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    boxes = torch.cat([image.gt_boxes.tensor for image in targets.instances])
    sizes = torch.tensor([image.image_size[::-1] * 2 for image in targets.instances], dtype=torch.float32)
    size = sizes[image_of].to(boxes.device, non_blocking=True)  # counted on the CPU, so that no GPU is waited for
    missed = (boxes[:, 2:] < 0).any(1) | (boxes[:, :2] >= size[:, :2]).any(1)
    boxes = boxes.clamp(min=0)
    if not unpadded:
        boxes = torch.minimum(boxes, size)
        size = torch.tensor(targets.padded_size[::-1] * 2, dtype=torch.float32).to(boxes.device, non_blocking=True)
    return list((boxes / size).masked_fill(missed[:, None], OUTSIDE).split(counts))


def focal_masks(boxes: List[Tensor], height: int, width: int) -> Tuple[Tensor, Tensor]:
    """The masks of foreground and background, each (N, H, W), from the boxes of :func:`relative_boxes`."""
    foreground = torch.stack([foreground_mask(image, height, width) for image in boxes])
    background = (foreground == 0).float()
    return foreground, background / background.sum((1, 2), keepdim=True).clamp(min=1)


def foreground_mask(boxes: Tensor, height: int, width: int) -> Tensor:
    """One over the cells of the smallest box, (H, W); 0 outside all boxes (B, 4)."""
    if len(boxes) == 0:
        return boxes.new_zeros(height, width)
    left, top, right, bottom = boxes.unbind(1)
    rows, columns = covered(top, bottom, height), covered(left, right, width)
    return (rows[:, :, None] * columns[:, None, :]).amax(0)


def covered(start: Tensor, end: Tensor, length: int) -> Tensor:
    """One over the number of cells from start to end, in these cells, (B, length); 0 elsewhere."""
    first, last = (start * length).floor(), (end * length).ceil()
    cells = torch.arange(length, device=start.device)
    inside = (cells >= first[:, None]) & (cells <= last[:, None])
    return inside / (last - first + 1)[:, None]
