"""CWD: Channel-wise Knowledge Distillation for Dense Prediction, arXiv 2011.13256.

Each channel of a map becomes a distribution over its places by a softmax, and the student's imitates the teacher's by
the KL divergence (section 3): what counts is where a channel is active, not how strongly.

As in the authors' code the divergence is the mean over images and channels, summed over levels, and padding takes part.
Deviation from it: all levels that the head reads are compared, where their RetinaNet leaves out the last.
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
    """KL divergence of each channel's distribution over the places of a map.

    Args:
        weight: weight of the loss; 5 in the authors' config for RetinaNet, 10 in mmrazor's for all detectors.
        temperature: softens the distributions, > 0; 1 in these configs.
    """

    def __init__(self, weight: float = 5.0, temperature: float = 1.0) -> None:
        super().__init__()
        if temperature <= 0:
            raise D2kdError(f"CWD's temperature is {temperature}; choose one above 0")
        self.weight = weight
        self.temperature = temperature

    def forward(self, student: DenseOutputs, teacher: DenseOutputs, targets: Targets) -> Dict[str, Tensor]:
        levels = [
            kl_divergence_loss(own.flatten(2), theirs.flatten(2), self.temperature).mean()
            for own, theirs in self.pairs(student, teacher)
        ]
        return {"loss_cwd_feature": self.weight * torch.stack(levels).sum()}
