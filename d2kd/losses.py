"""Loss functions of detectors and methods: pure, unreduced, in float32 whatever autocast does."""

import torch
import torch.nn.functional as F
from torch import Tensor


def kd_quality_focal_loss(logits: Tensor, teacher_logits: Tensor, beta: float = 1.0) -> Tensor:
    """Quality focal loss against a teacher's scores (CrossKD, arXiv 2306.11369).

    ``BCE(x, sigmoid(t)) * |sigmoid(x) - sigmoid(t)|^beta``; the gradient flows through both factors.

    Args:
        logits: x, any shape.
        teacher_logits: t, same shape.
        beta: focusing exponent, >= 0; 0 is plain BCE.

    Returns:
        Loss of each element, same shape.
    """
    return _modulated_bce(logits.float(), teacher_logits.detach().float().sigmoid(), beta)


def _modulated_bce(logits: Tensor, target: Tensor, beta: float) -> Tensor:
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return bce * (logits.sigmoid() - target).abs().pow(beta)


def giou_loss(boxes: Tensor, target: Tensor, eps: float = 1e-6) -> Tensor:
    """Generalised IoU loss (arXiv 1902.09630), between 0 (equal) and 2.

    fvcore's ``giou_loss`` asserts on degenerate boxes, which reads a value back from the GPU and ends a run on the
    first NaN without naming its source; here they give finite losses.

    Args:
        boxes: (..., 4) XYXY.
        target: (..., 4) XYXY.
        eps: least area that is divided by, in squared pixels.

    Returns:
        (...) loss of each pair.
    """
    boxes, target = boxes.float(), target.float()
    overlap = _extent(torch.maximum(boxes[..., :2], target[..., :2]), torch.minimum(boxes[..., 2:], target[..., 2:]))
    hull = _extent(torch.minimum(boxes[..., :2], target[..., :2]), torch.maximum(boxes[..., 2:], target[..., 2:]))
    union = (_area(boxes) + _area(target) - overlap).clamp(min=eps)
    hull = hull.clamp(min=eps)
    return 1 - overlap / union + (hull - union) / hull


def _extent(low: Tensor, high: Tensor) -> Tensor:
    return (high - low).clamp(min=0).prod(-1)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).prod(-1)


def kl_divergence_loss(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL divergence from a teacher's distribution (arXiv 1503.02531), times the squared temperature.

    Args:
        logits: (..., B), over B classes or bins.
        teacher_logits: (..., B).
        temperature: divides both before the softmax, > 0.

    Returns:
        (...), >= 0, summed over B.
    """
    log_probs = F.log_softmax(logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.detach().float() / temperature, dim=-1)
    return F.kl_div(log_probs, teacher, reduction="none", log_target=True).sum(-1) * temperature**2


def iou_log_loss(boxes: Tensor, target: Tensor, eps: float = 1e-6) -> Tensor:
    """Negative logarithm of the IoU (UnitBox, arXiv 1608.01471), between 0 (equal) and -log(eps) (disjoint).

    Args:
        boxes: (..., 4) XYXY.
        target: (..., 4) XYXY.
        eps: least area that is divided by, in squared pixels, and least IoU.

    Returns:
        (...) loss of each pair; disjoint boxes have no gradient.
    """
    boxes, target = boxes.float(), target.float()
    overlap = _extent(torch.maximum(boxes[..., :2], target[..., :2]), torch.minimum(boxes[..., 2:], target[..., 2:]))
    union = (_area(boxes) + _area(target) - overlap).clamp(min=eps)
    return -(overlap / union).clamp(min=eps).log()


#: Losses of decoded boxes by the name that configs give them.
BOX_LOSSES = {"giou": giou_loss, "iou_log": iou_log_loss}


def quality_focal_loss(logits: Tensor, labels: Tensor, scores: Tensor, beta: float = 2.0) -> Tensor:
    """Quality focal loss (GFL, arXiv 2006.04388, equation 1): the label's class should score as its box overlaps.

    ``BCE(x, y) * |sigmoid(x) - y|^beta`` with y = score for the label's class and 0 for the others; the gradient
    flows through both factors.

    Args:
        logits: x, (M, K).
        labels: (M,), 0..K-1 a class, K background.
        scores: IoU of each prediction with its ground truth, (M,), 0 to 1; of no meaning for background.
        beta: focusing exponent, >= 0.

    Returns:
        (M,), summed over the classes.
    """
    one_hot = F.one_hot(labels, logits.shape[1] + 1)[:, :-1]
    return _modulated_bce(logits.float(), one_hot * scores.detach().float()[:, None], beta).sum(1)


def distribution_focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Distribution focal loss (GFL, arXiv 2006.04388, equation 6): the two bins around the target gain probability.

    Args:
        logits: (M, B), over distances 0 to B-1.
        target: distances (M,), at least 0 and less than B-1.

    Returns:
        (M,), the cross entropies of both bins, weighted by how near the target is to each.
    """
    log_probs = F.log_softmax(logits.float(), dim=1)
    low = target.detach().long()
    share = target.detach().float() - low
    both = torch.stack([low, low + 1], dim=1)
    return -(log_probs.gather(1, both) * torch.stack([1 - share, share], dim=1)).sum(1)


def centerness_targets(anchors: Tensor, boxes: Tensor) -> Tensor:
    """How central anchors lie in boxes (FCOS, arXiv 1904.01355, equation 3).

    Args:
        anchors: (..., 4) XYXY.
        boxes: (..., 4) XYXY.

    Returns:
        (...), 1 in the middle, 0 on the border and outside.
    """
    centres = (anchors[..., :2] + anchors[..., 2:]) / 2
    sides = torch.stack([centres - boxes[..., :2], boxes[..., 2:] - centres], dim=-1)  # (..., x or y, low or high)
    ratios = sides.amin(-1) / sides.amax(-1).clamp(min=1e-6)
    return ratios.clamp(min=0).prod(-1).sqrt()
