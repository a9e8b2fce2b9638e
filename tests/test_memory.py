"""What training keeps: the teacher's maps only while they are read, and on demand nothing that methods compute."""

import copy

import pytest
import torch
from detectron2.utils.events import EventStorage
from small import batch, build, distill_config, gradients, save_teacher, small_config, step
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from d2kd.dense import DenseOutputs
from d2kd.errors import D2kdError
from d2kd.methods import CrossKD, method_names


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    for name in ("RetinaNet", "GFL"):
        save_teacher(folder / f"{name}.pth", "MODEL.META_ARCHITECTURE", name)
    return folder


def student(teachers, *opts, detector="RetinaNet", methods=("CrossKD",)) -> nn.Module:
    opts = ["MODEL.META_ARCHITECTURE", f"Distill{detector}", *opts]
    teacher_opts = ["MODEL.META_ARCHITECTURE", detector]
    return build(distill_config(teachers / f"{detector}.pth", *opts, methods=methods, teacher_opts=teacher_opts))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("methods", "cut", "frees"),
    [
        (["CrossKD", "ResponseKD"], 1, True),
        (["CrossKD"], 0, True),
        (["CrossKD", "PKD"], 1, False),
        (["MGD"], 1, False),
    ],
)
def test_the_teachers_maps_are_freed_where_no_method_reads_them(methods, cut, frees, teachers, monkeypatch):
    """The losses and gradients are the same."""
    freed = []
    free_maps = DenseOutputs.free_maps
    monkeypatch.setattr(DenseOutputs, "free_maps", lambda self: (free_maps(self), freed.append(self)))
    model, inputs = student(teachers, "MODEL.DISTILL.CROSSKD.CUT", cut, methods=methods), batch()
    twin = copy.deepcopy(model)  # since each step moves RetinaNet's normalizer
    torch.manual_seed(0)
    losses = step(model, inputs)
    found = gradients(model, losses)
    assert len(freed) == frees
    for outputs in freed:
        assert not outputs.taps
        assert {level.device.type for level in outputs.features} == {"meta"}
    torch.manual_seed(0)
    with EventStorage():
        kept = twin.losses_of(twin.observe(inputs))
    assert_same(losses, kept)
    assert_same(found, gradients(twin, kept))


@pytest.mark.slow
@pytest.mark.parametrize("method", method_names())
def test_recomputing_gives_the_same(method, teachers):
    """Also with random masks, adapters, several backward passes, and beside other methods."""
    detector = "GFL" if method == "LD" else "RetinaNet"
    methods = [method, *(["ResponseKD"] if method == "CrossKD" else [])]
    opts = ["MODEL.DISTILL.GRADIENT_PERIOD", 1] if method == "CrossKD" else []
    results = []
    for recompute in (False, True):
        model = student(teachers, "MODEL.DISTILL.RECOMPUTE", recompute, *opts, detector=detector, methods=methods)
        torch.manual_seed(0)
        losses = step(model, batch())
        results.append((losses, gradients(model, losses)))
    assert_same(results[1][0], results[0][0])
    assert_same(results[1][1], results[0][1])


def test_recomputing_keeps_nothing_of_the_methods(teachers):
    """Of the tensors that autograd keeps, none is made by a method."""
    made = []

    def watch(method, inputs):
        made.append(method)

    def kept(recompute):
        model, sizes = student(teachers, "MODEL.DISTILL.RECOMPUTE", recompute), {}
        (method,) = model.methods
        assert isinstance(method, CrossKD)
        method.register_forward_pre_hook(watch)

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            losses = step(model, batch())
        runs = len(made)
        sum(losses.values()).backward()
        assert len(made) == runs + recompute
        return sum(sizes.values())

    plain, with_it = kept(False), kept(True)
    assert with_it < 0.9 * plain


class LargeIntegers(TorchDispatchMode):
    """Notes the largest tensor of int64."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        for x in tree_leaves(outputs):
            if isinstance(x, torch.Tensor) and x.dtype == torch.int64:
                self.largest = max(self.largest, x.numel())
        return outputs


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("synced", [False, True])
def test_fast_losses_are_equal(distilled, synced, teachers):
    """With anchors of all kinds, an image without any object, and the running normalizer; without a one-hot tensor."""
    classes = ("MODEL.RETINANET.NUM_CLASSES", 30)
    opts = ["MODEL.DISTILL.SYNC_NORMALIZER", synced, "MODEL.DISTILL.FAST_LOSSES"]
    inputs, results = batch([(96, 128), (80, 112), (96, 96)], [3, 2, 0]), []
    for fast in (False, True):
        if distilled:
            model = student(teachers, *opts, fast)
        else:
            model = build(small_config("MODEL.META_ARCHITECTURE", "DistillRetinaNet", *classes, *opts, fast))
        step(model, inputs)  # moves the normalizer
        with LargeIntegers() as integers:
            losses = step(model, inputs)
        results.append((losses, gradients(model, losses), model.loss_normalizer, integers.largest))
    (expected, grads, normalizer, one_hot), (losses, fast_grads, fast_normalizer, largest) = results
    assert fast_normalizer == normalizer
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-6, atol=0)
    largest_gradient = max(value.abs().max().item() for value in grads.values())
    for name, value in grads.items():
        torch.testing.assert_close(fast_grads[name], value, rtol=1e-5, atol=1e-6 * largest_gradient)
    if not distilled:
        assert largest < one_hot / 5


def test_fast_losses_with_nothing_to_find_are_equal():
    inputs, results = batch([(96, 128)], [0]), []
    for fast in (False, True):
        model = build(small_config("MODEL.META_ARCHITECTURE", "DistillRetinaNet", "MODEL.DISTILL.FAST_LOSSES", fast))
        results.append(step(model, inputs))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-6, atol=0)


@pytest.mark.parametrize("detector", ["GFL", "FCOS"])
def test_fast_losses_are_for_retinanet(detector):
    with pytest.raises(D2kdError, match=r"FAST_LOSSES .* set it to False"):
        build(small_config("MODEL.META_ARCHITECTURE", f"Distill{detector}", "MODEL.DISTILL.FAST_LOSSES", True))
