"""PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient, arXiv 2207.02039.

Per level, the squared distance between the features of student and teacher, each normalised per channel to zero mean
and unit deviation over N, H and W: 1 minus their Pearson correlation (equation 6).

Deviations from the authors' code: a level with a single value per channel (N*H*W = 1) gives 0 instead of NaN; a
student of other width passes a trainable 1x1 convolution (theirs needs equal channels).
"""

from typing import ClassVar, Dict

import torch
import torch.nn.functional as F
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from torch import Tensor, nn

from ..dense import DenseOutputs, Targets, level_channels
from .base import METHOD_REGISTRY, Method, channel_statistics


@METHOD_REGISTRY.register()
class PKD(Method):
    """Correlation of FPN features.

    Args:
        weight: weight of the loss; with CrossKD published as 6 for GFL, 2 for RetinaNet and FCOS, 1 for ATSS.
        sync: statistics of all workers' images instead of each worker's own.
    """

    reads_head: ClassVar[bool] = False

    def __init__(self, weight: float = 6.0, sync: bool = False) -> None:
        super().__init__()
        self.weight = weight
        self.sync = sync
        self.adapter: nn.Module = nn.Identity()

    def setup(self, student: DenseDetector, teacher: DenseDetector) -> None:
        given, wanted = level_channels(student)[0], level_channels(teacher)[0]
        if given != wanted:
            self.adapter = nn.Conv2d(given, wanted, kernel_size=1)

    def forward(self, student: DenseOutputs, teacher: DenseOutputs, targets: Targets) -> Dict[str, Tensor]:
        pairs = zip(student.features, teacher.features)
        levels = [F.mse_loss(self._normalise(self.adapter(s)), self._normalise(t)) for s, t in pairs]
        return {"loss_pkd_feature": self.weight * torch.stack(levels).sum() / 2}

    def _normalise(self, feature: Tensor) -> Tensor:
        mean, std = channel_statistics(feature, self.sync)
        return (feature.float() - mean) / (std + 1e-6)
