"""Class losses of one level on the head's own maps, with their gradients computed in the forward pass.

Loss and gradient share most of their terms. Only the gradient is kept for the backward pass, nothing is permuted or
concatenated, and the rest is computed in parts that fit the cache: with many classes, maps of class logits are the
largest tensors of a step.
"""

import functools
from typing import Any, Callable, Iterator, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: Number of logits in a part, but at least the maps of one anchor. A GPU needs large parts to be busy.
PART_SIZES = {"cpu": 2**18, "cuda": 2**22}


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the backward pass of a function with its own gradients refuse ``create_graph`` with a RuntimeError.

    PyTorch's ``once_differentiable`` notices it only if the incoming gradient itself needs a gradient.
    """

    @functools.wraps(backward)
    def checked(*args: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("the gradient of this distillation loss is a constant: create_graph is impossible")
        return backward(*args)

    return checked


def kd_quality_focal_sum(logits: Tensor, teacher_logits: Tensor, weights: Tensor, beta: float = 1.0) -> Tensor:
    """Sums :func:`d2kd.losses.kd_quality_focal_loss` over a level, with a weight per anchor.

    Args:
        logits: x, (N, A, K, H, W).
        teacher_logits: t, the same shape; gets no gradient.
        weights: (N, A, H, W); gets no gradient.
        beta: focusing exponent, >= 0.

    Returns:
        (), float32 (float64 for float64 logits). Its gradient is a constant:
        ``create_graph`` is a RuntimeError.
    """
    return _KDQualityFocalSum.apply(logits, teacher_logits, weights, beta)


class _KDQualityFocalSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher_logits: Tensor, weights: Tensor, beta: float) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)  # under autocast, logits have half precision
        slopes = torch.empty_like(logits, dtype=dtype, memory_format=torch.contiguous_format)
        total = slopes.new_zeros(())
        for own, theirs, weight, slope in parts_of(logits, teacher_logits, weights.unsqueeze(2), slopes):
            total += _kd_quality_focal_part(own.to(dtype), theirs.to(dtype), weight.to(dtype), beta, slope)
        ctx.save_for_backward(slopes)
        return total

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return slopes * grad, None, None, None


def background_focal_sum(logits: Tensor, background: Tensor, alpha: float = -1, gamma: float = 2) -> Tensor:
    """Sums the focal loss (arXiv 1708.02002) of anchors that belong to no class, as fvcore's ``sigmoid_focal_loss``.

    Args:
        logits: x, (N, R, K), over R anchors and K classes.
        background: (N, R) bool; other anchors count as 0.
        alpha: weight of positive against negative examples, 0 to 1; negative for none.
        gamma: focusing exponent, >= 0.

    Returns:
        The sum of ``(1 - alpha) * sigmoid(x)^gamma * BCE(x, 0)``, (), float32 (float64 for float64 logits). Its
        gradient is a constant: ``create_graph`` is a RuntimeError.
    """
    total: Tensor = _BackgroundFocalSum.apply(logits, background, gamma)
    return total if alpha < 0 else (1 - alpha) * total


class _BackgroundFocalSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, background: Tensor, gamma: float) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        slopes = torch.empty_like(logits, dtype=dtype)
        total = slopes.new_zeros(())
        for x, weight, slope in parts_of(logits, background.unsqueeze(2), slopes):
            total += _background_focal_part(x.to(dtype), weight.to(dtype), gamma, slope)
        ctx.save_for_backward(slopes)
        return total

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        return slopes * grad, None, None


def _background_focal_part(logits: Tensor, weights: Tensor, gamma: float, out: Tensor) -> Tensor:
    """Returns the weighted sum over (R, K), and writes its gradient to ``out``."""
    scores, bce = logits.sigmoid(), F.softplus(logits)
    factor = scores.pow(gamma)
    # bce' * factor + bce * factor', where bce' = scores and factor' = gamma * factor * (1 - scores).
    slope = torch.rsub(scores, 1).mul_(bce).mul_(gamma).add_(scores).mul_(factor)
    torch.mul(slope, weights, out=out)
    return (bce.mul_(factor).sum(1, keepdim=True) * weights).sum()


def parts_of(*maps: Tensor) -> Iterator[Tuple[Tensor, ...]]:
    """Splits maps into views that fit the cache.

    Args:
        *maps: each (N, A, ...), over A anchors or channels. The first determines the size of a part; others may have
            size 1 in dimensions behind A.

    Yields:
        For some anchors of one image, the view of each map, (A', ...).
    """
    size = PART_SIZES.get(maps[0].device.type, PART_SIZES["cuda"])
    anchors = max(size // max(maps[0][0, 0].numel(), 1), 1)
    for image in zip(*maps):
        yield from zip(*(x.split(anchors) for x in image))


def _kd_quality_focal_part(logits: Tensor, teacher_logits: Tensor, weights: Tensor, beta: float, out: Tensor) -> Tensor:
    """Returns the weighted sum over (A, K, H, W), and writes its gradient to ``out``."""
    target, scores = teacher_logits.sigmoid(), logits.sigmoid()
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    difference = scores - target
    factor = difference.abs() if beta == 1 else difference.abs().pow_(beta)
    # bce' * factor + bce * factor', where bce' = scores - target.
    slope = scores.addcmul_(scores, scores, value=-1).mul_(_power_slope(difference, beta)).mul_(bce)
    torch.mul(slope.addcmul_(difference, factor), weights, out=out)
    return (bce.mul_(factor).sum(1, keepdim=True) * weights).sum()


def _power_slope(x: Tensor, exponent: float) -> Tensor:
    """The derivative of abs(x)^exponent, and 0 at 0."""
    if exponent == 1:
        return x.sign()
    return x.abs().clamp_(min=torch.finfo(x.dtype).tiny).pow_(exponent - 1).mul_(x.sign()).mul_(exponent)
