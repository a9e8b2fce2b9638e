"""Anchors made on the device that needs them."""

from typing import List, Sequence

from detectron2.structures import Boxes
from torch import Tensor

from ..contract import AnchorGenerator


def make_anchors(generator: AnchorGenerator, features: Sequence[Tensor]) -> List[Boxes]:
    """Makes the anchors of each level on the device of the features (N, C, Hi, Wi).

    detectron2's generator makes its grids on the default device and uploads them, each of which waits for the GPU.
    """
    with features[0].device:
        return generator(list(features))
