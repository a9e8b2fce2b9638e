"""Class losses of a level, against the losses per element that they sum up."""

import pytest
import torch
from fvcore.nn import sigmoid_focal_loss
from torch.autograd import gradcheck

from d2kd import level_losses
from d2kd.dense import DenseOutputs
from d2kd.level_losses import background_focal_sum, kd_quality_focal_sum
from d2kd.losses import kd_quality_focal_loss

SHAPE = (2, 3, 2, 3, 2)  # images, anchors, classes, rows, columns
BETAS = (0.0, 0.5, 1.0, 2.0)


@pytest.fixture(params=[1, 12, 2**18], ids=["single anchors", "pairs of anchors", "whole images"])
def _any_parts(request, monkeypatch):
    """Splits the maps in different ways, unevenly too."""
    monkeypatch.setitem(level_losses.PART_SIZES, "cpu", request.param * 2)


def maps(dtype=torch.float32):
    torch.manual_seed(0)
    logits, teacher = 3 * torch.randn(SHAPE, dtype=dtype), 3 * torch.randn(SHAPE, dtype=dtype)
    weights = torch.rand(2, 3, 3, 2, dtype=dtype)
    weights[0, 1] = 0
    return logits.requires_grad_(), teacher, weights


@pytest.mark.usefixtures("_any_parts")
@pytest.mark.parametrize("beta", BETAS)
def test_equals_the_sum_over_elements(beta):
    logits, teacher, weights = maps()
    expected = (kd_quality_focal_loss(logits, teacher, beta).sum(2) * weights).sum()
    found = kd_quality_focal_sum(logits, teacher, weights, beta)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    grads = [torch.autograd.grad(0.5 * x, logits)[0] for x in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("beta", BETAS)
def test_gradient_numerically(beta):
    logits, teacher, weights = (x.detach()[:, :2] for x in maps(torch.float64))
    assert gradcheck(lambda x: kd_quality_focal_sum(x, teacher, weights, beta), logits.requires_grad_())


@pytest.mark.parametrize("beta", BETAS)
def test_equal_logits_have_no_gradient(beta):
    """Also where the power of a distance of 0 has an infinite slope."""
    logits, _, weights = maps()
    loss = kd_quality_focal_sum(logits, logits.detach().clone(), weights, beta)
    assert torch.equal(torch.autograd.grad(loss, logits)[0], torch.zeros(SHAPE))


def test_cannot_be_differentiated_twice():
    logits, teacher, weights = maps()
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(kd_quality_focal_sum(logits, teacher, weights), logits, create_graph=True)


def background_maps(dtype=torch.float32):
    torch.manual_seed(0)
    return 3 * torch.randn(2, 7, 5, dtype=dtype).requires_grad_(), torch.rand(2, 7) < 0.7


@pytest.mark.usefixtures("_any_parts")
@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (-1, 2.0), (0.6, 0.0), (0.25, 1.5), (0.0, 0.5)])
def test_background_equals_fvcores_focal_loss(alpha, gamma):
    logits, background = background_maps(torch.float64)
    rows = logits[background]
    expected = sigmoid_focal_loss(rows.float(), torch.zeros_like(rows), alpha, gamma, reduction="sum")
    found = background_focal_sum(logits.float(), background, alpha, gamma)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    grads = [torch.autograd.grad(0.5 * x, logits)[0] for x in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)
    assert gradcheck(lambda x: background_focal_sum(x, background, alpha, gamma), logits)


def test_background_cannot_be_differentiated_twice_and_has_no_precision_to_lose():
    logits, background = background_maps()
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(background_focal_sum(logits, background), logits, create_graph=True)
    half = logits.detach().to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(background_focal_sum(half, background), background_focal_sum(half.float(), background))


def test_half_precision_is_computed_in_float32():
    logits, teacher, weights = maps()
    half = [x.detach().to(torch.bfloat16) for x in (logits, teacher)]
    half[0].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = kd_quality_focal_sum(*half, weights)
    assert loss.dtype == torch.float32
    wide = half[0].detach().float().requires_grad_()
    expected = kd_quality_focal_sum(wide, half[1].float(), weights)
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    assert torch.equal(half[0].grad, wide.grad.to(torch.bfloat16))


def test_keeps_only_the_gradient():
    """One tensor of the size of the logits waits for the backward pass; per element, eight do."""
    logits, teacher, weights = maps()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        kd_quality_focal_sum(logits, teacher, weights)
    assert [x.shape for x in kept] == [logits.shape]


@pytest.mark.parametrize("classes", [None, torch.tensor([3, 1]), torch.tensor([], dtype=torch.long)])
def test_maps_and_anchors_have_the_same_order(classes):
    """Views per level and lists of all anchors agree, with a CLASS_MAP too."""
    detector = type("Detector", (), {"num_classes": 4})
    torch.manual_seed(0)
    levels = [torch.randn(2, 12, *size) for size in ((5, 2), (3, 1))]
    outputs = DenseOutputs(detector, levels, (levels,), classes=classes)
    weights = torch.rand(2, 3 * 13)
    zipped = zip(outputs.shared_logit_maps, outputs.to_maps(weights))
    found = sum((level.square().sum(2) * weight).sum() for level, weight in zipped)
    torch.testing.assert_close(found, (outputs.shared_logits.square().sum(-1) * weights).sum())
    assert torch.equal(outputs.best_scores, outputs.logits.amax(-1).sigmoid())
