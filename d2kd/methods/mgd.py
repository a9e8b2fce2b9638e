"""MGD: Masked Generative Distillation, arXiv 2205.01529.

Random locations of the student's map are set to 0, and a block of two convolutions, discarded after training, has to
generate the teacher's whole map from the rest (section 3).

As published, a location is masked in all channels at once, and the squared errors are summed over channels and
locations, divided by the number of images and summed over levels. The loss grows with the image size, hence the tiny
weight.
"""

from typing import Dict, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..contract import Dense
from ..dense import DenseOutputs, Targets
from ..errors import D2kdError
from .base import METHOD_REGISTRY, Channels, FeatureMethod


@METHOD_REGISTRY.register()
class MGD(FeatureMethod):
    """Generation of the teacher's map from a masked map of the student.

    The published numbers were obtained with the teacher's neck and head as initialization (MODEL.DISTILL.INHERIT) and
    with gradients clipped at norm 35.

    Args:
        weight: weight of the loss; published values are 2e-5 for one-stage and 5e-7 for two-stage detectors.
        mask_ratio: probability that a location is masked, 0 to 1; published values are 0.65 and 0.45.
    """

    def __init__(self, weight: float = 2e-5, mask_ratio: float = 0.65) -> None:
        super().__init__()
        if not 0 <= mask_ratio <= 1:
            raise D2kdError(f"MGD's mask_ratio is {mask_ratio}; it is a probability, so choose a value from 0 to 1")
        self.weight = weight
        self.mask_ratio = mask_ratio
        self.generators = nn.ModuleList()

    def setup(self, student: Dense, teacher: Dense, channels: Channels) -> None:
        super().setup(student, teacher, channels)
        self.generators = nn.ModuleList(generation_block(theirs) for _, theirs in channels)

    def forward(self, student: DenseOutputs, teacher: DenseOutputs, targets: Targets) -> Dict[str, Tensor]:
        levels = [self._error(block, pair) for block, pair in zip(self.generators, self.pairs(student, teacher))]
        return {"loss_mgd_feature": self.weight * torch.stack(levels).sum()}

    def _error(self, generator: nn.Module, pair: Tuple[Tensor, Tensor]) -> Tensor:
        own, theirs = pair
        keep = torch.rand_like(own[:, :1]) >= self.mask_ratio
        return F.mse_loss(generator(own * keep).float(), theirs, reduction="sum") / len(own)


def generation_block(channels: int) -> nn.Sequential:
    """Builds two 3x3 convolutions with a ReLU in between, which keep the size and channels of a map (N, C, H, W)."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels, kernel_size=3, padding=1),
    )
