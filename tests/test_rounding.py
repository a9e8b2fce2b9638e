"""The comparisons of goldens: what they let through, and that they let nothing else through."""

from types import SimpleNamespace
from typing import Any, Dict

import pytest
import torch
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.structures import Boxes, Instances
from matching import check_labels
from rounding import check_gradients
from torch import Tensor

from d2kd.methods.crosskd import align_scale


def relu_run(flipped: int = -1, scale: float = 1.0) -> Any:
    """Gradients of a ReLU's input of 0.1, 0.2, 0.3 + rounding - 0.6, ...; the mask of one element may be opposite."""

    def run(double: bool) -> Dict[str, Tensor]:
        leaf = torch.tensor([1.0, -1.0, 2.0, 0.7], dtype=torch.float64 if double else torch.float32, requires_grad=True)
        tiny = (leaf[3] + 1e9 - 1e9) * 1e-12 if not double else leaf[3] * 1e-12
        (torch.cat([leaf[:3], tiny[None]]).relu() * torch.tensor([1.0, 2.0, 3.0, 1e12])).sum().backward()
        gradient = leaf.grad * scale
        if flipped >= 0:
            gradient[flipped] = 0.0 if gradient[flipped] else 1.0
        return {"leaf": gradient}

    return run


def test_the_mask_of_an_input_that_is_rounding_may_be_either() -> None:
    for golden in ([1.0, 0.0, 3.0, 0.0], [1.0, 0.0, 3.0, 1.0]):
        check_gradients(relu_run(), {"leaf": torch.tensor(golden)}, 1e-3)


@pytest.mark.parametrize("golden", [[0.0, 0.0, 3.0, 1.0], [1.0, 2.0, 3.0, 1.0], [1.0, 0.0, 3.01, 0.0]])
def test_no_other_mask_and_no_other_error_passes(golden: Any) -> None:
    with pytest.raises(AssertionError, match="gradients are off"):
        check_gradients(relu_run(), {"leaf": torch.tensor(golden)}, 1e-3)


def aligned_run(weight: float) -> Any:
    """Gradients of two values aligned to a deviation, which are rounding alone, and of 100 others."""
    generator = torch.Generator().manual_seed(0)
    two, teacher, others = (torch.randn(*shape, generator=generator) for shape in ((2, 1, 1, 1), (2, 1, 1, 1), (100,)))

    def run(double: bool) -> Dict[str, Tensor]:
        leaves = [x.double() if double else x.clone() for x in (two, others)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        loss = (align_scale(leaves[0], teacher).square() * weight).sum() + leaves[1].square().sum()
        loss.backward()
        return {"two": leaves[0].grad, "others": leaves[1].grad}

    return run


def test_what_is_left_of_a_cancellation_may_be_anything_of_its_size() -> None:
    run = aligned_run(1e6)
    ours = run(False)
    check_gradients(run, {**ours, "two": -ours["two"]}, 1e-3)
    with pytest.raises(AssertionError, match="gradients are off"):
        check_gradients(run, {**ours, "two": ours["two"] + 100 * ours["two"].abs().max() + 1e3}, 1e-3)
    with pytest.raises(AssertionError, match="gradients are off"):
        check_gradients(run, {"two": -ours["two"], "others": ours["others"] * 1.01}, 1e-3)


def low_quality_case() -> Any:
    """One anchor, which is the best of two boxes and overlaps more with the second; and one in the background."""
    model = RetinaNet.__new__(RetinaNet)
    torch.nn.Module.__init__(model)
    model.num_classes, model.anchor_matcher = 3, Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True)
    model.__dict__["backbone"] = SimpleNamespace(size_divisibility=32)
    anchors = torch.tensor([[0.0, 0.0, 16.0, 16.0], [40.0, 40.0, 56.0, 56.0]])
    boxes = torch.tensor([[8.0, 8.0, 24.0, 24.0], [0.0, 0.0, 16.0, 12.0]])
    image = Instances((64, 64), gt_boxes=Boxes(boxes[[1, 0]]), gt_classes=torch.tensor([2, 1]))
    return model, anchors, SimpleNamespace(instances=[image])


def test_a_low_quality_match_is_the_better_boxs_here_and_the_last_ones_in_the_reference() -> None:
    model, anchors, targets = low_quality_case()
    check_labels(model, anchors, targets, torch.tensor([[2, 3]]), torch.tensor([[1, 3]]))
    for ours, golden in (([1, 3], [1, 3]), ([2, 3], [2, 3]), ([2, 3], [1, 0]), ([2, 0], [1, 3])):
        with pytest.raises(AssertionError):
            check_labels(model, anchors, targets, torch.tensor([ours]), torch.tensor([golden]))
