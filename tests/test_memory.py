"""What training keeps: the teacher's maps only while they are read, and on demand nothing that methods compute."""

import copy

import pytest
import torch
from detectron2.utils.events import EventStorage
from small import batch, build, distill_config, gradients, save_teacher, step
from torch import nn

from d2kd.dense import DenseOutputs
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
