"""CrossKD where the heads of student and teacher differ in width and depth."""

import pytest
import torch
from small import batch, build, distill_config, gradients, save_teacher, small_config, step
from torch import nn

from d2kd.checkpoint import load_strict
from d2kd.diagnose.dry_run import method_table
from d2kd.errors import D2kdError
from d2kd.heads import TOWERS, Cut, cross_head
from d2kd.methods import CrossKD
from d2kd.methods.crosskd import align_scale, make_adapter

WIDER = ("MODEL.FPN.OUT_CHANNELS", "64")
DEEPER = ("MODEL.RETINANET.NUM_CONVS", "4")
DETECTORS = ("RetinaNet", "GFL", "ATSS", "FCOS")


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Makes a quick student with a teacher that has some options of its own."""
    folder = tmp_path_factory.mktemp("teachers")

    def build_student(*opts, teacher_opts=(), **crosskd):
        file = folder / f"{abs(hash(teacher_opts))}.pth"
        if not file.exists():
            save_teacher(file, *teacher_opts)
        own = [x for key, value in crosskd.items() for x in (f"MODEL.DISTILL.CROSSKD.{key.upper()}", value)]
        return build(distill_config(file, *opts, *own, teacher_opts=teacher_opts))

    return build_student


def crosskd_gradients(student, boxes=(2, 2)):
    """Gradients of CrossKD's losses, which must be finite, by parameter name."""
    losses = step(student, batch(boxes=boxes))
    found = gradients(student, {key: loss for key, loss in losses.items() if key.startswith("loss_crosskd")})
    assert all(torch.isfinite(value).all() for value in (*losses.values(), *found.values()))
    return found


def test_equal_widths_add_no_parameters_and_draw_no_random_numbers(make):
    assert not list(make().distill.parameters())
    state = torch.get_rng_state()
    assert isinstance(make_adapter(32, 32), nn.Identity)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("own", "theirs"), [(8, 32), (32, 8)])
def test_an_adapter_starts_orthogonal(own, theirs):
    """A narrow student's feature keeps all inner products, so nothing of it is lost; a bias would be canceled."""
    adapter = make_adapter(own, theirs)
    assert adapter.bias is None
    weight = adapter.weight.flatten(1) if own < theirs else adapter.weight.flatten(1).T
    torch.testing.assert_close(weight.T @ weight, torch.eye(8))


def test_the_alignment_cancels_bias_and_scale():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 8, 5, 6), torch.randn(2, 8, 5, 6)
    scale, shift = (torch.rand(1, 8, 1, 1) + 0.5 for _ in range(2))
    torch.testing.assert_close(align_scale(student * scale + shift, teacher), align_scale(student, teacher))


@pytest.mark.parametrize("pre_activation", [False, True])
def test_adapted_features_enter_the_teachers_head(make, pre_activation):
    """One adapter per tower for all levels, before the alignment, worked out with the modules themselves."""
    student = make(*WIDER, *DEEPER, teacher_opts=(), cut=3, pre_activation=pre_activation)
    method = student.distill["crosskd"]
    assert (method.cut, method.teacher_cut) == (Cut(3, pre_activation), Cut(1, pre_activation))
    observation = student.observe(batch())
    own, theirs = observation.student, observation.teacher
    expected = []
    for i, tower in enumerate(TOWERS):
        adapter = method.adapters[tower]
        assert (adapter.in_channels, adapter.out_channels) == (64, 32)
        levels = zip(own.taps[method.cut][i], theirs.taps[method.teacher_cut][i])
        expected.append([align_scale(adapter(s), t).relu() for s, t in levels])
    predictions = cross_head(student.teacher.detector.head, Cut(1), *expected)
    for output, wanted in zip(method.cross(own, theirs).predictions, predictions):
        assert all(map(torch.equal, output, wanted))
    assert "cut 3 : 1" in method_table(student)
    assert "2 Conv2d" in method_table(student)


@pytest.mark.parametrize("detector", ["RetinaNet", *(pytest.param(x, marks=pytest.mark.slow) for x in DETECTORS[1:])])
@pytest.mark.parametrize("crosskd", [{"cut": 1}, {"cut": 0, "teacher_cut": 2}, {"cut": 1, "teacher_cut": 0}])
@pytest.mark.slow
def test_narrow_and_shallow_students(make, detector, crosskd):
    """Gradients reach the backbone and both adapters, also without ground truth, as DDP needs."""
    kind = ("MODEL.META_ARCHITECTURE", detector)
    convs = (f"MODEL.{detector.upper()}.NUM_CONVS", "3")
    student = make("MODEL.META_ARCHITECTURE", f"Distill{detector}", teacher_opts=(*kind, *WIDER, *convs), **crosskd)
    method = student.distill["crosskd"]
    assert method.teacher_cut.convs == crosskd.get("teacher_cut", 2)
    for boxes in ((2, 2), (0, 0)):
        reached = crosskd_gradients(student, boxes)
        assert all(reached[f"distill.crosskd.adapters.{tower}.weight"].abs().max() > 0 for tower in TOWERS)
        assert any(g.abs().max() > 0 for name, g in reached.items() if name.startswith("backbone.bottom_up"))


def test_towers_of_different_widths(make):
    """Each tower has the adapter that it needs, if any."""
    student = make(teacher_opts=WIDER)
    head = student.head
    head.cls_subnet[0], head.cls_subnet[1] = nn.Conv2d(32, 64, 3, padding=1), nn.GroupNorm(32, 64)
    head.cls_subnet[3] = nn.Conv2d(64, 32, 3, padding=1)
    method = CrossKD(cut=1)
    method.setup(student, student.teacher.architecture, [])
    assert isinstance(method.adapters["cls_subnet"], nn.Identity)
    assert method.adapters["bbox_subnet"].weight.shape == (64, 32, 1, 1)
    student.distill["crosskd"] = method
    assert crosskd_gradients(student)["distill.crosskd.adapters.bbox_subnet.weight"].abs().max() > 0


def test_towers_of_different_depths_need_the_teachers_cut(make):
    student = make(cut=1)
    head = student.head
    head.bbox_subnet = nn.Sequential(*head.bbox_subnet, nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())
    teacher = student.teacher.architecture
    message = r"\[2, 3\] convolutions in the student and \[2, 2\] in the teacher.*set CrossKD's teacher_cut"
    with pytest.raises(D2kdError, match=message):
        CrossKD(cut=1).setup(student, teacher, [])
    CrossKD(cut=1, teacher_cut=2).setup(student, teacher, [])


@pytest.mark.parametrize(
    ("crosskd", "teacher_opts", "message"),
    [
        ({"cut": 3}, (), "the student's cut 3 lies outside a tower of 2 convolutions; set CrossKD's cut to 0 to 2"),
        ({"cut": 1, "teacher_cut": 3}, (), "the teacher's cut 3 lies outside a tower of 2 .* teacher_cut to 0 to 2"),
        ({"cut": 0}, ("MODEL.RETINANET.NUM_CONVS", "1"), "the teacher's cut -1 lies outside a tower of 1"),
    ],
)
def test_cuts_outside_a_tower(make, crosskd, teacher_opts, message):
    with pytest.raises(D2kdError, match=message):
        make(teacher_opts=teacher_opts, **crosskd)


def test_the_adapters_are_no_part_of_the_deployed_detector(make, tmp_path):
    """The plain detector of the same config loads a narrow student's checkpoint completely."""
    student, plain = make(teacher_opts=WIDER), build(small_config())
    torch.save({"model": student.state_dict()}, tmp_path / "student.pth")
    extra = set(student.state_dict()) - set(plain.state_dict())
    assert extra == {f"distill.crosskd.adapters.{tower}.weight" for tower in TOWERS}
    load_strict(plain, str(tmp_path / "student.pth"))
    assert torch.equal(plain.head.cls_score.weight, student.head.cls_score.weight)
