"""CWD: Channel-wise Knowledge Distillation for Dense Prediction, arXiv 2011.13256.

A softmax turns each channel of a feature map into a distribution over locations. The student's distribution imitates
the teacher's through the KL divergence (section 3). What matters is where a channel is active, not how strongly.

As in the authors' code, the divergence is averaged over images and channels and summed over levels, and padding is
included. Deviation: all levels that the head reads are compared, while their RetinaNet leaves out the last one.
"""

from typing import Dict

import torch
from torch import Tensor

from ..dense import DenseOutputs, Targets
from ..errors import D2kdError
from ..losses import kl_divergence_loss
from .base import METHOD_REGISTRY, FeatureMethod


@METHOD_REGISTRY.register()
class CWD(FeatureMethod):
    """KL divergence between the distributions of each channel over the locations of a feature map.

    Args:
        weight: weight of the loss; 5 in the authors' config for RetinaNet, 10 in mmrazor's for all detectors.
        temperature: softens the distributions, > 0; 1 in both of these configs.
    """

    def __init__(self, weight: float = 5.0, temperature: float = 1.0) -> None:
        super().__init__()
        if temperature <= 0:
            raise D2kdError(f"CWD's temperature is {temperature}; choose a value above 0")
        self.weight = weight
        self.temperature = temperature

    def forward(self, student: DenseOutputs, teacher: DenseOutputs, targets: Targets) -> Dict[str, Tensor]:
        levels = [
            kl_divergence_loss(own.flatten(2), theirs.flatten(2), self.temperature).mean()
            for own, theirs in self.pairs(student, teacher)
        ]
        return {"loss_cwd_feature": self.weight * torch.stack(levels).sum()}
