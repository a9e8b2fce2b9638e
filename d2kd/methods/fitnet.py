"""FitNet: feature imitation, arXiv 1412.6550, of whole maps or of the regions that detection papers imitate.

The mean squared error of features, over a level's region and the channels, summed over levels. The hint regressor of
the paper is the 1x1 convolution where student and teacher differ in width; training has no separate first stage.

The regions are those of LD's authors (arXiv 2102.12252), with their weight: their "fitnet" is ``region="boxes"``, their
"decouple" the same with ``background_weight=2`` (DeFeat, arXiv 2103.14475; their code raises there, this is what it
means to do), "finegrained" and "gibox" have their names. With ``gi_per_batch=True`` the values are theirs.

Deviations from their code: a level without region gives 0 instead of NaN, and a region's size is averaged over workers,
so that the mean over workers equals one worker with all images.
"""

from typing import Dict, List

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dense import DenseOutputs, Targets
from ..errors import D2kdError, check_choice
from ..workers import at_least_one, mean_over_workers
from .base import METHOD_REGISTRY, FeatureMethod
from .imitation import box_region, instance_region, near_region, to_places

REGIONS = ("whole", "boxes", "finegrained", "gibox")


@METHOD_REGISTRY.register()
class FitNet(FeatureMethod):
    """Mean squared error of features.

    Args:
        weight: weight of the loss; 2 in LD's comparison of regions.
        region: "whole" maps; "boxes", inside of the ground truth; "finegrained", near it; or "gibox", where teacher and
            student score most differently, which needs the teacher's head.
        background_weight: weight of the rest of the maps in parts of ``weight``, as a mean of its own; 0 leaves it out.
        gi_per_batch: choose "gibox" from the whole batch, as LD's authors do, see :func:`instance_region`.
    """

    def __init__(
        self,
        weight: float = 2.0,
        region: str = "whole",
        background_weight: float = 0.0,
        gi_per_batch: bool = False,
    ) -> None:
        super().__init__()
        check_choice("FitNet's region", region, REGIONS)
        if background_weight and region == "whole":
            raise D2kdError("FitNet's background_weight needs a region to have a background; set region to 'boxes'")
        self.weight = weight
        self.region = region
        self.background_weight = background_weight
        self.gi_per_batch = gi_per_batch
        self.reads_head = region == "gibox"  # type: ignore[misc]

    def forward(self, student: DenseOutputs, teacher: DenseOutputs, targets: Targets) -> Dict[str, Tensor]:
        pairs = self.pairs(student, teacher)
        errors = [F.mse_loss(own, theirs, reduction="none").mean(1) for own, theirs in pairs]
        if self.region == "whole":
            return {"loss_fitnet_feature": self.weight * torch.stack([error.mean() for error in errors]).sum()}
        regions = self.regions(student, teacher, targets)
        losses = {"loss_fitnet_feature": self.weight * mean_inside(errors, regions).sum()}
        if self.background_weight:
            rest = mean_inside(errors, [~region for region in regions])
            losses["loss_fitnet_background"] = self.weight * self.background_weight * rest.sum()
        return losses

    def regions(self, student: DenseOutputs, teacher: DenseOutputs, targets: Targets) -> List[Tensor]:
        """The places that are imitated, per level (N, Hi, Wi) bool; of any region but "whole"."""
        if student.tapped_maps:
            raise D2kdError(
                f"FitNet's region {self.region!r} is one of the FPN levels, which MODEL.DISTILL.FEATURES replaces; "
                "leave FEATURES empty, or set MODEL.DISTILL.FITNET.REGION whole"
            )
        if self.region == "boxes":
            region = box_region(student, targets)
        elif self.region == "finegrained":
            region = near_region(student, targets)
        else:
            region = instance_region(student, teacher, targets, self.gi_per_batch)
        return to_places(region, student)


def mean_inside(errors: List[Tensor], regions: List[Tensor]) -> Tensor:
    """Mean of each level's errors over its region.

    Args:
        errors: per level (N, Hi, Wi).
        regions: likewise, bool.

    Returns:
        (L,); 0 with gradient where a region is empty.
    """
    sums = torch.stack([(error * region).sum() for error, region in zip(errors, regions)])
    counts = mean_over_workers(torch.stack([region.sum() for region in regions]).float())
    return sums / at_least_one(counts)
