"""Loss functions of detectors and methods: pure, unreduced, and always in float32, even under autocast."""

import torch
import torch.nn.functional as F
from torch import Tensor


def kd_quality_focal_loss(logits: Tensor, teacher_logits: Tensor, beta: float = 1.0) -> Tensor:
    """Quality focal loss with a teacher's scores as targets (CrossKD, arXiv 2306.11369).

    ``BCE(x, sigmoid(t)) * |sigmoid(x) - sigmoid(t)|^beta``; gradients flow through both factors.

    Args:
        logits: x, any shape.
        teacher_logits: t, the same shape.
        beta: focusing exponent, >= 0; 0 is plain BCE.

    Returns:
        The loss of each element, in the same shape.
    """
    return _modulated_bce(logits.float(), teacher_logits.detach().float().sigmoid(), beta)


def _modulated_bce(logits: Tensor, target: Tensor, beta: float) -> Tensor:
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return bce * (logits.sigmoid() - target).abs().pow(beta)


def giou_loss(boxes: Tensor, target: Tensor, eps: float = 1e-6) -> Tensor:
    """Generalized IoU loss (arXiv 1902.09630), between 0 (equal) and 2.

    fvcore's ``giou_loss`` asserts that boxes are not degenerate, which syncs with the GPU and ends a run on the first
    NaN without naming its source. Here, degenerate boxes give finite losses.

    Args:
        boxes: (..., 4) XYXY.
        target: (..., 4) XYXY.
        eps: lower bound of the areas in denominators, in squared pixels.

    Returns:
        The loss of each pair, (...).
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
        temperature: divides both logits before the softmax, > 0.

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
        eps: lower bound of the areas in denominators, in squared pixels, and of the IoU.

    Returns:
        The loss of each pair, (...); disjoint boxes have no gradient.
    """
    boxes, target = boxes.float(), target.float()
    overlap = _extent(torch.maximum(boxes[..., :2], target[..., :2]), torch.minimum(boxes[..., 2:], target[..., 2:]))
    union = (_area(boxes) + _area(target) - overlap).clamp(min=eps)
    return -(overlap / union).clamp(min=eps).log()


#: Losses of decoded boxes, by their names in configs.
BOX_LOSSES = {"giou": giou_loss, "iou_log": iou_log_loss}


def quality_focal_loss(logits: Tensor, labels: Tensor, scores: Tensor, beta: float = 2.0) -> Tensor:
    """Quality focal loss (GFL, arXiv 2006.04388, equation 1): scores of labeled classes should equal their box's IoU.

    ``BCE(x, y) * |sigmoid(x) - y|^beta`` with y = score for the labeled class and 0 for the others; gradients flow
    through both factors.

    Args:
        logits: x, (M, K).
        labels: (M,), where 0..K-1 are classes and K is background.
        scores: IoU of each prediction with its ground truth, (M,), 0 to 1; not used for background.
        beta: focusing exponent, >= 0.

    Returns:
        (M,), summed over the classes.
    """
    targets = one_hot(labels, logits.shape[1]) * scores.detach().float()[:, None]
    return _modulated_bce(logits.float(), targets, beta).sum(1)


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Marks the class of each label (...), as (..., num_classes) bool; other labels, such as background, have none.

    PyTorch's own checks the range of labels, for which it waits, and returns eight bytes for each element.
    """
    return labels.unsqueeze(-1) == torch.arange(num_classes, device=labels.device)


def distribution_focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Distribution focal loss (GFL, arXiv 2006.04388, equation 6): raises the probability of the bins at the target.

    Args:
        logits: (M, B), over distances 0 to B-1.
        target: distances, (M,), at least 0 and less than B-1.

    Returns:
        (M,), the cross entropies of the two bins, weighted by how close the target is to each.
    """
    log_probs = F.log_softmax(logits.float(), dim=1)
    low = target.detach().long()
    fraction = target.detach().float() - low
    both = torch.stack([low, low + 1], dim=1)
    return -(log_probs.gather(1, both) * torch.stack([1 - fraction, fraction], dim=1)).sum(1)


def centerness_targets(anchors: Tensor, boxes: Tensor) -> Tensor:
    """Computes how central anchors lie in boxes (FCOS, arXiv 1904.01355, equation 3).

    Args:
        anchors: (..., 4) XYXY.
        boxes: (..., 4) XYXY.

    Returns:
        (...), 1 at the center, 0 on the border and outside.
    """
    centers = (anchors[..., :2] + anchors[..., 2:]) / 2
    sides = torch.stack([centers - boxes[..., :2], boxes[..., 2:] - centers], dim=-1)  # (..., x or y, low or high)
    ratios = sides.amin(-1) / sides.amax(-1).clamp(min=1e-6)
    return ratios.clamp(min=0).prod(-1).sqrt()
