"""PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient, arXiv 2207.02039.

The loss of a level is the squared distance between the features of student and teacher, after each channel was
normalized to zero mean and unit standard deviation over N, H and W: 1 minus their Pearson correlation (equation 6).

Deviations from the authors' code: a level with a single value per channel (N*H*W = 1) gives 0 instead of NaN; a student
with a different number of channels is adapted by a trainable 1x1 convolution (theirs needs equal channels).
"""

from typing import ClassVar, Dict

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dense import DenseOutputs, Targets
from .base import METHOD_REGISTRY, FeatureMethod, channel_statistics


@METHOD_REGISTRY.register()
class PKD(FeatureMethod):
    """Correlation of feature maps; a student's map of a different size is resized to the teacher's.

    Args:
        weight: weight of the loss; together with CrossKD, published as 6 for GFL, 2 for RetinaNet and FCOS, 1 for ATSS.
        sync: use statistics over the images of all workers instead of each worker's own.
    """

    resizes: ClassVar[bool] = True

    def __init__(self, weight: float = 6.0, sync: bool = False) -> None:
        super().__init__()
        self.weight = weight
        self.sync = sync

    def forward(self, student: DenseOutputs, teacher: DenseOutputs, targets: Targets) -> Dict[str, Tensor]:
        levels = [self._distance(own, theirs) for own, theirs in self.pairs(student, teacher)]
        return {"loss_pkd_feature": self.weight * torch.stack(levels).sum() / 2}

    def _distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        if student.shape != teacher.shape:
            student = F.interpolate(student, teacher.shape[-2:], mode="bilinear")
        return F.mse_loss(self._normalize(student), self._normalize(teacher))

    def _normalize(self, feature: Tensor) -> Tensor:
        mean, std = channel_statistics(feature, self.sync)
        return (feature - mean) / (std + 1e-6)
