"""Cuts, taps, the cross head, targets."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.structures import Boxes, ImageList
from small import batch, build, small_config
from torch import nn

from d2kd.dense import DenseOutputs, anchors_inside, make_targets, run_dense
from d2kd.errors import D2kdError
from d2kd.heads import Cut, cross_head, split_tower, tap_towers

NUM_CONVS = 4
CONV_NORM_RELU = nn.Sequential(
    nn.Conv2d(2, 2, 3), nn.Identity(), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.Identity(), nn.ReLU()
)


def make_head(kind, norm):
    torch.manual_seed(0)
    shapes = [ShapeSpec(channels=32)] * 3
    options = {"num_anchors": 9} if kind is RetinaNetHead else {}
    return kind(input_shape=shapes, num_classes=3, conv_dims=[32] * NUM_CONVS, norm=norm, **options)


def features():
    torch.manual_seed(1)
    return [torch.randn(2, 32, size, size + 2) for size in (8, 4, 2)]


@pytest.mark.parametrize(
    ("cut", "expected"),
    [(Cut(0), (0, 0)), (Cut(1), (3, 3)), (Cut(2), (6, 6)), (Cut(1, True), (2, 3)), (Cut(2, True), (5, 6))],
)
def test_split_tower(cut, expected):
    """Of Conv, norm, ReLU, Conv, norm, ReLU, cut 1 lies behind the first ReLU, or before it."""
    assert split_tower(CONV_NORM_RELU, cut) == expected


@pytest.mark.parametrize("index", [-1, 3])
def test_cut_outside_the_tower(index):
    with pytest.raises(D2kdError, match="tower of 2 convolutions; use 0 to 2"):
        split_tower(CONV_NORM_RELU, Cut(index))


@pytest.mark.parametrize("kind", [RetinaNetHead, FCOSHead])
@pytest.mark.parametrize("norm", ["", "GN", "BN"])
@pytest.mark.parametrize("index", range(NUM_CONVS + 1))
@pytest.mark.parametrize("training", [False, True])
def test_cross_head_with_own_features_is_the_head_itself(kind, norm, index, training):
    head, inputs = make_head(kind, norm).train(training), features()
    cut = Cut(index)
    with tap_towers(head, [cut] if index else []) as taps:
        expected = head(inputs)
    crossed = cross_head(head, cut, *(taps[cut] if index else (inputs, inputs)))
    assert len(crossed) == len(expected)
    for ours, theirs in zip(crossed, expected):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_cross_head_leaves_the_head_alone():
    head, inputs = make_head(RetinaNetHead, "BN"), features()
    before, modules = head.state_dict(), list(head.named_modules())
    cross_head(head.eval(), Cut(3), inputs, inputs)
    assert list(head.named_modules()) == modules
    assert all(torch.equal(value, before[key]) for key, value in head.state_dict().items())


def test_taps_append_per_level_and_are_removed():
    head, inputs = make_head(RetinaNetHead, "GN"), features()
    with tap_towers(head, [Cut(1), Cut(2, True)]) as taps:
        head(inputs)
    assert [f.shape for f in taps[Cut(1)][0]] == [f.shape for f in inputs]
    assert min(f.min() for f in taps[Cut(1)][0]) == 0
    assert min(f.min() for f in taps[Cut(2, True)][1]) < 0
    with pytest.raises(RuntimeError), tap_towers(head, [Cut(1)]):
        raise RuntimeError
    assert not any(module._forward_hooks for module in head.modules())
    head(inputs)
    assert len(taps[Cut(1)][0]) == len(inputs)


def test_padding_and_normalizer_by_hand():
    """Two images of 40x40 and 64x96 make a batch of 64x96.

    The first pads to 64x64 of its own, so of the 12 columns of stride 8 only the first 8 count. Anchors per place: 9.
    Its positives are two anchors inside and one outside; the second image has none: N+ = max(2, 1) + max(0, 1) = 3.
    """
    model = build(small_config())
    images = ImageList(torch.zeros(2, 3, 64, 96), [(40, 40), (64, 96)])
    outputs = DenseOutputs(model, [torch.zeros(2, 32, 64 // s, -(-96 // s)) for s in (8, 16, 32, 64)])
    inside = anchors_inside(outputs, images)
    assert inside[1].all()
    p3 = inside[0][: 8 * 12 * 9].view(8, 12, 9)
    assert p3[:, :8].all()
    assert not p3[:, 8:].any()
    labels = torch.full((2, inside.shape[1]), 3)
    labels[0, [0, 1]] = 1
    labels[0, 8 * 9] = 2
    labels[1, 5] = -1
    boxes = torch.zeros(2, inside.shape[1], 4)
    targets = make_targets(outputs, images, [], list(labels), list(boxes))
    assert targets.num_pos == 3
    assert targets.weights[1, 5] == 0
    assert targets.weights[0].sum() == inside[0].sum()


def test_views_agree_with_the_detectors_own_decoding():
    model = build(small_config())
    images = model.preprocess_image(batch())
    outputs = run_dense(model, images)
    logits, deltas = model._transpose_dense_predictions(outputs.predictions, [3, 4])
    assert torch.equal(outputs.logits, torch.cat(logits, 1))
    anchors = Boxes.cat(model.anchor_generator(outputs.features)).tensor
    for image in range(2):
        boxes = model.box2box_transform.apply_deltas(torch.cat(deltas, 1)[image], anchors)
        torch.testing.assert_close(outputs.boxes[image], boxes)
