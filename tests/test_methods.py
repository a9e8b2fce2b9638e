"""Every registered method on every detector, and what single methods promise."""

import functools

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY
from small import batch, build, distill_config, gradients, save_teacher, step

from d2kd.dense import DenseOutputs
from d2kd.errors import D2kdError
from d2kd.losses import giou_loss, kd_quality_focal_loss
from d2kd.methods import CrossKD, build_method, method_defaults, method_names
from d2kd.methods.base import channel_statistics
from d2kd.methods.crosskd import align_scale

# What makes the quick RetinaNet another detector; the student's class is put in front by distill_opts.
DETECTORS = {
    "RetinaNet": (),
    "RetinaNet without norm": ("MODEL.RETINANET.NORM", ""),
    "RetinaNet BN": ("MODEL.RETINANET.NORM", "BN"),
    "GFL": ("MODEL.META_ARCHITECTURE", "GFL"),
    "ATSS": ("MODEL.META_ARCHITECTURE", "ATSS"),
    "FCOS": ("MODEL.META_ARCHITECTURE", "FCOS"),
}
PAIRS = [(name, name) for name in DETECTORS]
PAIRS += [(a, b) for a in ("GFL", "ATSS", "FCOS") for b in ("GFL", "ATSS", "FCOS") if a != b]


WIDER = ("MODEL.FPN.OUT_CHANNELS", "64")
# Detectors of equal channels, also mixed; and with wider teachers, of the same kind.
CASES = [(student, teacher, False) for student, teacher in PAIRS]
CASES += [(name, name, True) for name in ("RetinaNet", "GFL", "ATSS", "FCOS")]
EVERY_DAY = {("RetinaNet", "RetinaNet"), ("GFL", "GFL"), ("ATSS", "ATSS"), ("FCOS", "FCOS"), ("FCOS", "GFL")}


@pytest.fixture(scope="module")
def teacher_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    pairs = {(teacher, wider) for _, teacher, wider in CASES}
    return {
        (name, wider): save_teacher(folder / f"{name}{wider}.pth", *DETECTORS[name], *(WIDER if wider else ()))
        for name, wider in pairs
    }


@pytest.fixture(scope="module")
def build_pair(teacher_files):
    """Makes students of one detector with a teacher of another; the parts of a pair are built once."""

    @functools.cache
    def parts(student, teacher, wider):
        opts = [opt if opt not in DETECTORS else f"Distill{opt}" for opt in DETECTORS[student]]
        teacher_opts = [*DETECTORS[teacher], *(WIDER if wider else ())]
        cfg = distill_config(teacher_files[teacher, wider], *opts, methods=["PKD"], teacher_opts=teacher_opts)
        torch.manual_seed(1)
        cls = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
        return cls, cls.from_config(cfg), cfg.MODEL.DISTILL

    def make(student, teacher, method, wider=False):
        cls, arguments, node = parts(student, teacher, wider)
        options = {key: node[method.upper()][key.upper()] for key in method_defaults(method)}
        torch.manual_seed(1)
        return cls(**{**arguments, "methods": [build_method(method, **options)], "schedules": {}}).train()

    return make


@pytest.mark.parametrize(
    ("detector", "teacher", "wider"),
    [pytest.param(*case, marks=() if case[:2] in EVERY_DAY and not case[2] else pytest.mark.slow) for case in CASES],
    ids=lambda x: {True: "wider", False: "equal"}.get(x, x),
)
@pytest.mark.parametrize("method", method_names())
def test_every_method_on_every_detector(build_pair, method, detector, teacher, wider):
    """With ground truth on both images, on one, and on none."""
    if method == "LD" and (detector, teacher) != ("GFL", "GFL"):
        with pytest.raises(D2kdError, match="distributions of distances"):
            build_pair(detector, teacher, method, wider)
        return
    student = build_pair(detector, teacher, method, wider)
    all_keys = set()
    for boxes in ((2, 2), (2, 0), (0, 0)):
        losses = step(student, batch(boxes=boxes))
        all_keys.add(tuple(losses))
        check_losses(student, method, losses, any(boxes))
    assert len(all_keys) == 1, f"the losses depend on the ground truth: {all_keys}"


def check_losses(student, method, losses, has_boxes):
    """A method's losses are sound scalars, and their gradients reach the backbone and all adapters."""
    kd = {key: value for key, value in losses.items() if key.startswith(f"loss_{method.lower()}_")}
    assert kd
    for value in kd.values():
        assert value.shape == ()
        assert value.dtype == torch.float32
        assert torch.isfinite(value)
        assert value >= 0
    assert sum(kd.values()) > 0 or not has_boxes
    grads = gradients(student, kd)
    assert all(g.isfinite().all() for g in grads.values())
    reached = [name for name, g in grads.items() if name.startswith("backbone.bottom_up") and g.abs().max() > 0]
    assert reached or (method == "LD" and not has_boxes)
    adapters = {name for name, _ in student.named_parameters() if name.startswith("distill.")}
    assert adapters <= grads.keys()  # or DDP would need find_unused_parameters


@pytest.mark.parametrize("method", [name for name in method_names() if name != "LD"])  # which needs GFL, with its norm
def test_single_value_per_channel(build_pair, method):
    """One image of 64x64 has a P6 of 1x1: no unbiased deviation, and still no NaN."""
    name = "RetinaNet without norm"  # torch's group norm refuses a single value per group
    student = build_pair(name, name, method)
    inputs = batch([(64, 64)])
    assert student.backbone(student.preprocess_image(inputs).tensor)["p6"].shape[-2:] == (1, 1)
    losses = step(student, inputs)
    assert all(torch.isfinite(value) for value in losses.values())
    assert all(g.isfinite().all() for g in gradients(student, losses).values())


@pytest.mark.parametrize("name", method_names())
def test_options_have_defaults_and_names_are_checked(name):
    build_method(name, **method_defaults(name))
    with pytest.raises(D2kdError, match="did you mean"):
        build_method(name + "x")
    option = next(iter(method_defaults(name)))
    with pytest.raises(D2kdError, match=f"did you mean {option}"):
        build_method(name, **{option + "s": 1})


def test_weights_scale_the_losses(teacher_files):
    one = step(build(distill_config(teacher_files["RetinaNet", False])), batch())
    opts = ["MODEL.DISTILL.CROSSKD.CLS_WEIGHT", 2.0, "MODEL.DISTILL.CROSSKD.BOX_WEIGHT", 0.0]
    two = step(build(distill_config(teacher_files["RetinaNet", False], *opts)), batch())
    torch.testing.assert_close(two["loss_crosskd_cls"], 2 * one["loss_crosskd_cls"])
    assert two["loss_crosskd_box"] == 0


def test_no_loss_where_the_student_is_the_teacher(teacher_files):
    """The teacher's own weights in the student: aligned features and predictions agree, up to eps in the deviation."""
    student = build(distill_config(teacher_files["RetinaNet", False], methods=["CrossKD", "PKD"]))
    apart = step(student, batch())
    student.load_state_dict(student.teacher.detector.state_dict())
    losses = step(student, batch())
    assert losses["loss_crosskd_cls"] < 1e-4 * apart["loss_crosskd_cls"]
    assert losses["loss_crosskd_box"] < 1e-3 * apart["loss_crosskd_box"]
    assert losses["loss_pkd_feature"] < 1e-6 * apart["loss_pkd_feature"]


def test_padding_adds_no_loss(teacher_files):
    """A teacher changed only where the small image is padding: that image's class loss must not see it.

    Both images are equal, the second lies in a batch of twice the width; the anchors beyond it weigh nothing, so
    scaling the teacher's scores there changes nothing.
    """
    student = build(distill_config(teacher_files["RetinaNet", False]))
    seen = []
    student.distill["crosskd"].register_forward_pre_hook(lambda _m, args: seen.append(args))
    step(student, batch([(64, 128), (64, 64)]))
    own, teacher, targets = seen[0]
    method = student.distill["crosskd"]
    before = method(own, teacher, targets)
    shift = teacher.to_maps(3 * (targets.weights == 0))
    maps = zip(teacher.shared_logit_maps, shift)
    predictions = ([(level + s.unsqueeze(2)).flatten(1, 2) for level, s in maps], *teacher.predictions[1:])
    changed = DenseOutputs(teacher.detector, teacher.features, predictions, notes=teacher.notes)
    changed.anchors_per_level = teacher.anchors_per_level
    assert not torch.equal(changed.logits, teacher.logits)
    after = method(own, changed, targets)
    assert torch.equal(before["loss_crosskd_cls"], after["loss_crosskd_cls"])
    assert (targets.weights[1] == 0).sum() > 0


def test_kd_quality_focal_loss_by_hand():
    """X = 0, t = ln 3: BCE = ln 2, |1/2 - 3/4| = 1/4, so ln 2 / 4; with beta 0 it is BCE itself."""
    x, t = torch.tensor([0.0]), torch.tensor([3.0]).log()
    torch.testing.assert_close(kd_quality_focal_loss(x, t), torch.tensor([2.0]).log() / 4)
    torch.testing.assert_close(kd_quality_focal_loss(x, t, beta=0.0), torch.tensor([2.0]).log())


def test_giou_loss_by_hand():
    """Unit squares side by side with a gap of 1: IoU 0, hull 3, union 2, so 1 - (0 - 1/3) = 4/3; equal boxes: 0."""
    box = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    apart = torch.tensor([[2.0, 0.0, 3.0, 1.0]])
    torch.testing.assert_close(giou_loss(box, apart), torch.tensor([4 / 3]))
    torch.testing.assert_close(giou_loss(box, box), torch.zeros(1))


def test_gradients_of_losses_numerically():
    torch.manual_seed(0)
    logits, teacher = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    exact = torch.autograd.functional.jacobian(lambda x: kd_quality_focal_loss(x, teacher).sum(), logits)
    step = 1e-3
    for i in range(6):
        shift = torch.zeros(6, dtype=torch.float64)
        shift[i] = step
        above, below = (kd_quality_focal_loss(logits + s, teacher).sum() for s in (shift, -shift))
        assert float(exact[i]) == pytest.approx(float((above - below) / (2 * step)), abs=2e-3)


def test_alignment_takes_over_the_statistics():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 5, 6) * 3 + 1, torch.randn(2, 4, 5, 6) / 2 - 4
    for ours, theirs in zip(channel_statistics(align_scale(student, teacher)), channel_statistics(teacher)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_before_the_activation_differs_from_after():
    assert CrossKD().cut.pre_activation is False
    assert CrossKD(pre_activation=True).cuts != CrossKD().cuts
