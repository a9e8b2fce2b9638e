"""FitNet: feature imitation, arXiv 1412.6550, on whole maps or on the regions used in detection papers.

The loss is the mean squared error of features over a level's region and channels, summed over levels. The paper's hint
regressor is the 1x1 convolution that is added where student and teacher differ in width. There is no separate first
training stage.

The regions are those of LD's authors (arXiv 2102.12252), with their weight. Their "fitnet" is ``region="boxes"``; their
"decouple" is the same with ``background_weight=2`` (DeFeat, arXiv 2103.14475; their code raises an error there, this is
what it is meant to do); "finegrained" and "gibox" have the same names. With ``gi_per_batch=True`` the values equal
theirs.

Deviations from their code: a level with an empty region gives 0 instead of NaN; a level without positive anchors, which
counts 0 there, counts its region here; and the size of a region is averaged over workers, so that the mean over workers
equals the loss of one worker with all images.
"""

from typing import Dict, List

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dense import DenseOutputs, Targets
from ..errors import D2kdError, check_choice
from ..workers import at_least_one, mean_over_workers
from .base import METHOD_REGISTRY, FeatureMethod
from .imitation import box_region, instance_region, near_region, to_locations

REGIONS = ("whole", "boxes", "finegrained", "gibox")


@METHOD_REGISTRY.register()
class FitNet(FeatureMethod):
    """Mean squared error of features.

    Args:
        weight: weight of the loss; 2 in LD's comparison of regions.
        region: "whole" maps; "boxes", inside the ground-truth boxes; "finegrained", near them; or "gibox", where the
            scores of teacher and student differ most, which requires running the teacher's head.
        background_weight: weight of the rest of the maps relative to ``weight``, averaged separately; 0 disables it.
        gi_per_batch: select "gibox" from the whole batch, as LD's authors do, see :func:`instance_region`.
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
            raise D2kdError("FitNet's background_weight needs a region that leaves a background; set region to 'boxes'")
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
        """Returns the locations to imitate, per level (N, Hi, Wi) bool, for any region but "whole"."""
        if student.tapped_maps:
            raise D2kdError(
                f"FitNet's region {self.region!r} is defined on the FPN levels, which MODEL.DISTILL.FEATURES replaces; "
                "leave FEATURES empty, or set MODEL.DISTILL.FITNET.REGION to whole"
            )
        if self.region == "boxes":
            region = box_region(student, targets)
        elif self.region == "finegrained":
            region = near_region(student, targets)
        else:
            region = instance_region(student, teacher, targets, self.gi_per_batch)
        return student.compared(to_locations(region, student))


def mean_inside(errors: List[Tensor], regions: List[Tensor]) -> Tensor:
    """Averages the errors of each level over its region.

    Args:
        errors: per level (N, Hi, Wi).
        regions: per level (N, Hi, Wi) bool.

    Returns:
        (L,) with L levels; where a region is empty, a 0 that is still connected to the graph.
    """
    sums = torch.stack([(error * region).sum() for error, region in zip(errors, regions)])
    counts = mean_over_workers(torch.stack([region.sum() for region in regions]).float())
    return sums / at_least_one(counts)
