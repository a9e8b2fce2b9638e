"""What student and teacher agree on when they meet: modules, classes, inherited parts; and schedules of weights."""

import pytest
import torch
from detectron2.utils.events import EventStorage
from small import batch, build, distill_config, gradients, save_teacher, step

from d2kd.errors import D2kdError
from d2kd.heads import tap_modules
from d2kd.methods import PKD, Schedule
from d2kd.methods.base import channel_statistics
from d2kd.pairing import match_classes, module_pairs
from d2kd.teacher import load_teacher

WIDER_STEM = ("MODEL.RESNETS.STEM_OUT_CHANNELS", "8")
GFL = ("MODEL.META_ARCHITECTURE", "GFL")
FOUR = ("MODEL.RETINANET.NUM_CLASSES", "4", "MODEL.GFL.NUM_CLASSES", "4")


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pth", *WIDER_STEM)


def make(file, *opts, methods=("PKD",), teacher_opts=WIDER_STEM, **kwargs):
    return build(distill_config(file, *opts, methods=methods, teacher_opts=teacher_opts, **kwargs))


# Modules by path


def test_features_name_any_modules(teacher_file):
    """PKD of res4 with its adapter, worked out from the modules' own outputs."""
    student = make(teacher_file, "MODEL.DISTILL.FEATURES", "('backbone.bottom_up.res4',)")
    seen = {}
    for name, model in (("own", student), ("theirs", student.teacher.detector)):
        model.backbone.bottom_up.res4.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out}))
    losses = step(student, batch())
    adapter = student.distill["pkd"].adapters[0]
    assert (adapter.in_channels, adapter.out_channels) == (16, 32)
    assert len(student.distill["pkd"].adapters) == 1
    normal = []
    for level in (adapter(seen["own"]), seen["theirs"]):
        mean, std = channel_statistics(level)
        normal.append((level - mean) / (std + 1e-6))
    expected = 6.0 * (normal[0] - normal[1]).square().mean() / 2
    torch.testing.assert_close(losses["loss_pkd_feature"], expected)
    reached = gradients(student, {"kd": losses["loss_pkd_feature"]})
    assert any(name.startswith("backbone.bottom_up.res4") for name in reached)
    assert not any(name.startswith(("backbone.fpn", "backbone.bottom_up.res5", "head")) for name in reached)


def test_two_paths_and_modules_called_once_per_level(teacher_file):
    entry = "head.cls_subnet.0:head.bbox_subnet.0"
    student = make(teacher_file, "MODEL.DISTILL.FEATURES", f"('{entry}', 'backbone.fpn_output3')")
    assert len(student.distill["pkd"].adapters) == 5  # four levels of the towers, one FPN convolution
    assert step(student, batch())["loss_pkd_feature"] > 0
    assert not any(m._forward_hooks for m in student.teacher.detector.modules())


def test_module_outputs_are_taken_apart():
    class Levels(torch.nn.Module):
        def forward(self, x):
            return {"p3": x, "more": [x + 1, (x + 2, "no map")], "flat": x.flatten()}

    model = torch.nn.Sequential(Levels())
    with tap_modules(model, ["0"]) as maps:
        model(torch.zeros(1, 2, 3, 4))
        model(torch.ones(1, 2, 3, 4))
    assert [float(x.mean()) for x in maps[0]] == [0, 1, 2, 1, 2, 3]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ("('backbone.bottom_up.res44',)", r"did you mean backbone\.bottom_up\.res4\?"),
        ("('backbone.bottom_up.res4:backbone.bottom_up.res3',)", r"sizes \[\(16, 16\)\], the teacher's \[\(32, 32\)\]"),
        ("('anchor_generator',)", "give no feature maps"),
        ("('',)", "has no module ''"),
    ],
)
def test_wrong_features_are_refused(teacher_file, features, message):
    methods = ("MGD",)  # which resizes nothing
    with pytest.raises(D2kdError, match=message):
        make(teacher_file, "MODEL.DISTILL.FEATURES", features, methods=methods)


def test_pkd_resizes(tmp_path):
    levels = ("MODEL.RETINANET.IN_FEATURES", "['p3', 'p4', 'p5']", "MODEL.ANCHOR_GENERATOR.SIZES", "[[16],[32],[64]]")
    lower = ("MODEL.RETINANET.IN_FEATURES", "['p4', 'p5', 'p6']", "MODEL.ANCHOR_GENERATOR.SIZES", "[[16],[32],[64]]")
    file = save_teacher(tmp_path / "teacher.pth", *levels)
    student = make(file, *lower, teacher_opts=levels)
    assert step(student, batch())["loss_pkd_feature"] > 0
    with pytest.raises(D2kdError, match="levels of strides"):
        make(file, *lower, methods=("PKD", "MGD"), teacher_opts=levels)


def test_probing_leaves_the_student_as_it_was(teacher_file):
    norm = ("MODEL.RESNETS.NORM", "BN")
    plain, probed = (
        make(teacher_file, *norm, *opts) for opts in ((), ("MODEL.DISTILL.FEATURES", "('backbone.bottom_up.res4',)"))
    )
    assert probed.training
    own, other = plain.state_dict(), probed.state_dict()
    assert all(torch.equal(value, other[key]) for key, value in own.items() if not key.startswith("distill"))


# Classes


def test_match_classes():
    own, theirs = (["rbc", "wbc"], 2), (["wbc", "dog", "rbc"], 3)
    assert match_classes(["rbc"], own, theirs) == ([0], [2])
    assert match_classes([["rbc", "dog"], [1, 0]], own, theirs) == ([0, 1], [1, 0])
    assert match_classes(["*"], own, theirs) == ([0, 1], [2, 0])
    assert match_classes(["*"], (["cat"], 1), theirs) == ([], [])
    for wrong, message in (
        (["rcb"], r"the student has no class 'rcb'.*did you mean rbc\?"),
        ([["rbc", "cat"]], "the teacher has no class 'cat'; it has wbc, dog, rbc"),
        ([[0, 3]], "the teacher has classes 0 to 2, not 3"),
        ([[0, 1], [0, 2]], "maps a class twice"),
        ([[0, 1, 2]], "neither a name nor a pair"),
    ):
        with pytest.raises(D2kdError, match=message):
            match_classes(wrong, own, theirs)
    with pytest.raises(D2kdError, match="names are unknown"):
        match_classes([["rbc", "dog"]], own, ([], 3))
    with pytest.raises(D2kdError, match="needs class names of both"):
        match_classes(["*"], own, ([], 3))


def as_student(opts):
    return [f"Distill{opt}" if opt == "GFL" else opt for opt in opts]


@pytest.mark.slow
@pytest.mark.parametrize("detector", [(), GFL], ids=["RetinaNet", "GFL"])
@pytest.mark.parametrize("method", ["CrossKD", "ResponseKD", "LD"])
def test_class_losses_see_shared_classes_only(tmp_path, detector, method):
    """A superset: a teacher of 4 classes; changing its unshared class's logits leaves the class loss alone."""
    if method == "LD" and not detector:
        return  # RetinaNet has no distributions to compare
    file = save_teacher(tmp_path / "teacher.pth", *detector, *FOUR)
    opts = ["MODEL.DISTILL.CLASS_MAP", "((0, 3), (1, 0), (2, 1))", "MODEL.DISTILL.LD.CLS_WEIGHT", "1.0"]
    student = make(file, *as_student(detector), *opts, methods=[method], teacher_opts=[*detector, *FOUR])
    key = f"loss_{method.lower()}_cls"
    before = step(student, batch())[key]
    predictor = student.teacher.detector.head.cls_score
    with torch.no_grad():  # class 2 of each anchor
        predictor.bias.view(-1, 4)[:, 2] += 2
    torch.testing.assert_close(step(student, batch())[key], before)
    with torch.no_grad():  # class 3, which is the student's 0
        predictor.bias.view(-1, 4)[:, 3] += 2
    assert (step(student, batch())[key] - before).abs() > 1e-3 * before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("student", "teacher", "class_map"),
    [("3", "2", "((0, 1),)"), ("2", "3", "((0, 2), (1, 0))"), ("3", "3", "('*',)")],
    ids=["subset", "superset", "disjoint"],
)
@pytest.mark.parametrize("method", ["CrossKD", "ResponseKD"])
def test_subset_superset_and_disjoint_classes(tmp_path, monkeypatch, student, teacher, class_map, method):
    if class_map == "('*',)":
        monkeypatch.setattr("d2kd.meta_arch.class_names", lambda cfg: ["a", "b", "c"])
        monkeypatch.setattr("d2kd.teacher.class_names", lambda cfg: ["d", "e", "f"])
    teacher_opts = ["MODEL.RETINANET.NUM_CLASSES", teacher]
    file = save_teacher(tmp_path / "teacher.pth", *teacher_opts)
    opts = ["MODEL.RETINANET.NUM_CLASSES", student, "MODEL.DISTILL.CLASS_MAP", class_map]
    model = make(file, *opts, methods=[method], teacher_opts=teacher_opts)
    inputs = batch()
    for x in inputs:
        x["instances"].gt_classes.clamp_(max=int(student) - 1)
    losses = step(model, inputs)
    assert losses[f"loss_{method.lower()}_box"] > 0
    assert (losses[f"loss_{method.lower()}_cls"] > 0) == (class_map != "('*',)")
    assert all(g.isfinite().all() for g in gradients(model, losses).values())


def test_teacher_knows_its_class_names(blood_cells, teacher_file):
    from small import CONFIGS

    teacher = load_teacher(str(CONFIGS / "quick_retinanet.yaml"), str(teacher_file), list(WIDER_STEM))
    assert sorted(teacher.class_names) == ["Platelets", "RBC", "WBC"]
    student = make(teacher_file, "MODEL.DISTILL.CLASS_MAP", "('RBC', ('WBC', 'WBC'))", methods=["CrossKD"])
    rbc, wbc = (teacher.class_names.index(name) for name in ("RBC", "WBC"))
    assert student.shared_classes == ([rbc, wbc], [rbc, wbc])


# Inheritance


@pytest.mark.parametrize("parts", [("neck",), ("head",), ("neck", "head")])
@pytest.mark.slow
def test_inherited_parts_are_the_teachers(tmp_path, parts):
    file = save_teacher(tmp_path / "teacher.pth")
    student, plain = (make(file, "MODEL.DISTILL.INHERIT", repr(p), teacher_opts=()) for p in (parts, ()))
    teacher = student.teacher.detector.state_dict()
    fresh = plain.state_dict()
    for name, value in student.state_dict().items():
        neck = name.startswith("backbone.") and "bottom_up" not in name
        inherited = (neck and "neck" in parts) or (name.startswith("head.") and "head" in parts)
        assert torch.equal(value, (teacher if inherited else fresh)[name]), name
    assert student.head.cls_score.weight.requires_grad
    assert student.head.cls_score.weight.data_ptr() != student.teacher.detector.head.cls_score.weight.data_ptr()


def test_inheritance_is_whole_or_refused(teacher_file):
    for opts, message in (
        (("'neck'",), "the necks of student and teacher differ in 3 tensors, first backbone.fpn_lateral3.weight"),
        (("'haed'",), "'haed'.*use one of neck, head; did you mean head"),
    ):
        with pytest.raises(D2kdError, match=message):
            make(teacher_file, "MODEL.DISTILL.INHERIT", f"({opts[0]},)")


# Schedules


def test_schedule_by_hand():
    assert [Schedule(warmup=4).weight(i) for i in (0, 1, 3, 100)] == [0.25, 0.5, 1, 1]
    assert [Schedule(end=5).weight(i) for i in (0, 4, 5)] == [1, 1, 0]
    assert [Schedule(decay=10, end=20).weight(i) for i in (9, 10, 15, 19, 20)] == [1, 1, 0.5, pytest.approx(0.1), 0]
    assert Schedule(warmup=10, decay=2, end=4).weight(3) == pytest.approx(0.4 * 0.5)


@pytest.mark.slow
def test_schedule_scales_a_methods_losses(teacher_file):
    plain = make(teacher_file, methods=["CrossKD", "PKD"])
    scheduled = make(
        teacher_file, "MODEL.DISTILL.SCHEDULE.PKD.WARMUP", "10", "MODEL.DISTILL.SCHEDULE.PKD.END", "20",
        methods=["CrossKD", "PKD"],
    )  # fmt: skip
    for iteration, factor in ((0, 0.1), (4, 0.5), (15, 1.0), (20, 0.0)):
        with EventStorage(iteration):
            own = plain(batch())
        with EventStorage(iteration):
            other = scheduled(batch())
        assert own.keys() == other.keys()
        for key in own:
            if "_normalizer" not in key:
                expected = own[key] * (factor if "pkd" in key else 1)
                torch.testing.assert_close(other[key], expected)


def test_wrong_schedules_are_refused(teacher_file):
    with pytest.raises(D2kdError, match="DECAY 30 must be before END 20"):
        make(teacher_file, "MODEL.DISTILL.SCHEDULE.PKD.DECAY", "30", "MODEL.DISTILL.SCHEDULE.PKD.END", "20")


def test_module_pairs():
    assert module_pairs(["a.b", "c : d"]) == [("a.b", "a.b"), ("c", "d")]
    assert PKD.resizes
