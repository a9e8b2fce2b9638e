"""The consequences of the meta architecture, each on both sides."""

import copy

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage
from small import CONFIGS, batch, build, distill_config, gradients, save_teacher, small_config, step

from d2kd import meta_arch, teacher
from d2kd.config import load_config
from d2kd.dense import run_dense
from d2kd.errors import D2kdError
from d2kd.teacher import load_teacher

WIDER = ["MODEL.FPN.OUT_CHANNELS", "64"]
THREE_LEVELS = ["MODEL.RETINANET.IN_FEATURES", "['p3', 'p4', 'p5']"]
THREE_LEVELS += ["MODEL.ANCHOR_GENERATOR.SIZES", "[[16, 20, 25], [32, 40, 50], [64, 80, 100]]"]
TO_RGB = ["INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", "[123.675,116.28,103.53]"]


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pth")


@pytest.fixture
def student(teacher_file):
    return build(distill_config(teacher_file))


def equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


def test_without_methods_it_is_the_plain_detector_bit_for_bit(teacher_file):
    plain = build(small_config())
    methodless = build(distill_config(teacher_file, methods=()))
    assert methodless.teacher is None
    equal(methodless.state_dict(), plain.state_dict())
    own, expected = step(methodless, batch()), step(plain, batch())
    equal(own, expected)
    equal(gradients(methodless, own), gradients(plain, expected))


@pytest.mark.parametrize("methods", [("CrossKD",), ("PKD",), ("CrossKD", "PKD")])
def test_own_losses_and_names_do_not_change(teacher_file, methods):
    plain = build(small_config())
    student = build(distill_config(teacher_file, methods=methods))
    assert student.state_dict().keys() == plain.state_dict().keys()
    losses, expected = step(student, batch()), step(plain, batch())
    equal({key: losses[key] for key in expected}, expected)
    added = losses.keys() - expected.keys()
    assert added
    assert all(key.startswith(tuple(f"loss_{name.lower()}_" for name in methods)) for key in added)
    assert all(losses[key].dtype == torch.float32 and losses[key] > 0 for key in added)


@pytest.mark.slow
def test_combinations_are_the_sum_of_the_single_runs(teacher_file):
    """Losses and their gradients, method by method; the student's own losses stand once."""
    methods = ("CrossKD", "PKD", "CWD", "ResponseKD")
    own, single, total = {}, {}, {}
    for method in methods:
        student = build(distill_config(teacher_file, methods=[method]))
        losses = step(student, batch())
        kd = {key: value for key, value in losses.items() if f"_{method.lower()}_" in key}
        own = {key: value for key, value in losses.items() if key not in kd}
        single.update(losses)
        for name, grad in gradients(student, kd).items():
            total[name] = total.get(name, 0) + grad
    combined = build(distill_config(teacher_file, methods=methods))
    losses = step(combined, batch())
    equal(losses, single)
    kd = {key: value for key, value in losses.items() if key not in own}
    assert len(kd) == 6
    largest = max(float(grad.abs().max()) for grad in total.values())
    for name, grad in gradients(combined, kd).items():
        torch.testing.assert_close(grad, total[name], rtol=1e-4, atol=1e-6 * largest)


@pytest.mark.slow
def test_checkpoint_loads_into_stock_detectron2_and_detects_the_same(tmp_path):
    """A config that detectron2 knows without d2kd; only the adapters of PKD's unequal channels are left over."""
    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIGS / "retinanet_R18.yaml"))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.RETINANET.NUM_CLASSES", 3, "MODEL.FPN.OUT_CHANNELS", 32])
    cfg.merge_from_list(["MODEL.RETINANET.SCORE_THRESH_TEST", 0.0])
    stock = build(cfg).eval()
    opts = ["MODEL.DEVICE", "cpu", "MODEL.RETINANET.NUM_CLASSES", "3", "MODEL.FPN.OUT_CHANNELS"]
    teacher = build_model(load_config(str(CONFIGS / "retinanet_R18.yaml"), [*opts, "48"]))
    torch.save(teacher.state_dict(), tmp_path / "teacher.pth")
    distill_opts = [*opts, "32", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0", "MODEL.DISTILL.METHODS", "('PKD',)"]
    distill_opts += ["MODEL.DISTILL.TEACHER.CONFIG_FILE", "retinanet_R18.yaml"]
    distill_opts += ["MODEL.DISTILL.TEACHER.OPTS", repr([*opts, "48"])]
    distill_opts += ["MODEL.DISTILL.TEACHER.WEIGHTS", str(tmp_path / "teacher.pth")]
    student = build(load_config(str(CONFIGS / "crosskd_retinanet_R18.yaml"), distill_opts), seed=5).eval()
    result = stock.load_state_dict(student.state_dict(), strict=False)
    assert not result.missing_keys
    assert set(result.unexpected_keys) == {
        f"distill.pkd.adapters.{level}.{part}" for level in range(5) for part in ("weight", "bias")
    }
    with torch.no_grad():
        for ours, theirs in zip(student(batch()), stock(batch())):
            ours, theirs = ours["instances"], theirs["instances"]
            assert len(ours) > 0
            assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
            assert torch.equal(ours.scores, theirs.scores)


def test_teacher_is_outside_the_module_tree(student, teacher_file):
    plain = build(small_config())
    inside = {id(x) for x in [*student.teacher.detector.parameters(), *student.teacher.detector.modules()]}
    assert not inside & {id(x) for x in [*student.parameters(), *student.modules()]}
    assert student.state_dict().keys() == plain.state_dict().keys()
    optimizer = build_optimizer(distill_config(teacher_file), student)
    assert not inside & {id(p) for group in optimizer.param_groups for p in group["params"]}


def test_teacher_is_shared_by_copies_and_moves_along(student):
    twin = copy.deepcopy(student)
    assert twin.teacher is student.teacher
    assert twin.head is not student.head
    student.double()
    assert {p.dtype for p in student.teacher.detector.parameters()} == {torch.float64}


def test_teacher_is_frozen_and_stays_in_eval_mode(student):
    before = copy.deepcopy(student.teacher.detector.state_dict())
    student.train()
    losses = step(student, batch())
    grads = gradients(student, losses)
    assert grads
    assert not any(p.requires_grad or p.grad is not None for p in student.teacher.detector.parameters())
    assert not any(m.training for m in student.teacher.detector.modules())
    equal(student.teacher.detector.state_dict(), before)


def test_teacher_in_training_mode_is_refused(student):
    student.teacher.detector.backbone.train()
    with pytest.raises(D2kdError, match="training mode"):
        step(student, batch())


def test_evaluation_never_runs_the_teacher(student, monkeypatch):
    monkeypatch.setattr(teacher.Teacher, "__call__", lambda *_: pytest.fail("the teacher ran"))
    student.eval()(batch())


def test_no_teacher_is_built_without_methods(monkeypatch):
    monkeypatch.setattr(meta_arch, "load_teacher", lambda *_: pytest.fail("a teacher was built"))
    build(distill_config("missing.pth", methods=())).eval()(batch())


def test_each_model_preprocesses_for_itself(teacher_file):
    """An RGB student with its own statistics gives its BGR teacher the very images the teacher gets alone."""
    student = build(distill_config(teacher_file, *TO_RGB))
    bgr = batch()
    rgb = [{**x, "image": x["image"].flip(0)} for x in bgr]
    teacher = student.teacher.detector
    with torch.no_grad():
        alone = run_dense(teacher, teacher.preprocess_image(bgr))
    seen = student.teacher(rgb, student.input_format)
    for ours, theirs in zip(seen.predictions, alone.predictions):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    unflipped = student.teacher(rgb, "BGR")
    assert not torch.equal(unflipped.predictions[0][0], alone.predictions[0][0])


def test_targets_are_assigned_once_and_heads_run_only_when_read(teacher_file, monkeypatch):
    for methods, teacher_heads in ((("PKD",), 0), (("CrossKD", "PKD"), 2)):  # CrossKD: the head and its cut copy
        student = build(distill_config(teacher_file, methods=methods))
        calls = {"label": 0, "head": 0}
        label = student.label_anchors
        monkeypatch.setattr(
            student,
            "label_anchors",
            lambda *a, label=label, calls=calls: calls.update(label=calls["label"] + 1) or label(*a),
        )
        student.teacher.detector.head.register_forward_hook(
            lambda *_, calls=calls: calls.update(head=calls["head"] + 1)
        )
        step(student, batch())
        assert calls == {"label": 1, "head": teacher_heads}
        assert not any(m._forward_hooks for m in student.modules())


def test_kd_gradient_stops_at_the_cut(student):
    losses = step(student, batch())
    kd = {key: value for key, value in losses.items() if "crosskd" in key}
    grads = gradients(student, kd)
    behind = ("head.cls_subnet.3", "head.bbox_subnet.3", "head.cls_score", "head.bbox_pred")
    assert not any(name.startswith(behind) for name in grads)
    assert any(name.startswith("head.cls_subnet.0") and g.abs().max() > 0 for name, g in grads.items())
    assert any(name.startswith("backbone.bottom_up") and g.abs().max() > 0 for name, g in grads.items())


@pytest.mark.parametrize(
    ("teacher_opts", "message"),
    [
        (["MODEL.RETINANET.NUM_CLASSES", "4"], "3 classes and the teacher 4.*CLASS_MAP"),
        (["MODEL.ANCHOR_GENERATOR.OFFSET", "0.5"], "anchors of student and teacher differ"),
        (["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "[[0.4, 1.0, 2.0]]"], "anchors of student and teacher differ"),
        (
            THREE_LEVELS,
            r"strides \[8, 16, 32, 64\] and the teacher's \[8, 16, 32\]",
        ),
    ],
)
def test_teachers_that_do_not_fit_are_refused(tmp_path, teacher_opts, message):
    file = save_teacher(tmp_path / "teacher.pth", *teacher_opts)
    with pytest.raises(D2kdError, match=message):
        build(distill_config(file, teacher_opts=teacher_opts))


def test_wrong_teacher_files_are_refused(teacher_file, tmp_path):
    state = torch.load(teacher_file)["model"]
    state.pop("head.cls_score.weight")
    torch.save({"model": state}, tmp_path / "part.pth")
    with pytest.raises(D2kdError, match=r"head\.cls_score\.weight"):
        build(distill_config(tmp_path / "part.pth"))
    with pytest.raises(D2kdError, match="64"):
        build(distill_config(teacher_file, teacher_opts=WIDER))


@pytest.mark.parametrize(
    ("weights", "message"),
    [("", r"no weights: set MODEL\.DISTILL\.TEACHER\.WEIGHTS"), ("nowhere.pth", r"nowhere\.pth")],
)
@pytest.mark.parametrize("opts", [(), ("MODEL.DISTILL.INHERIT", "('neck',)")])
def test_only_training_needs_the_teachers_file(weights, message, opts):
    student = build(distill_config(weights, *opts))
    student.eval()(batch())
    student.train()
    with pytest.raises(D2kdError, match=message):
        student.prepare_teacher()
    with pytest.raises(D2kdError, match=message):
        step(student, batch())


def test_a_teacher_whose_file_comes_later_is_loaded_when_it_is_needed(teacher_file, tmp_path):
    """The student's weights, the adapters among them, are those it has when the file is there from the start."""
    options = {"methods": ("PKD",), "teacher_opts": WIDER}
    file = save_teacher(tmp_path / "first.pth", *WIDER)
    expected = build(distill_config(file, **options))
    late = build(distill_config(tmp_path / "late.pth", **options))
    equal(late.state_dict(), expected.state_dict())
    late.double().float()
    assert build_optimizer(distill_config(file, **options), late).param_groups
    file.rename(tmp_path / "late.pth")
    equal(step(late, batch()), step(expected, batch()))
    equal(late.teacher.detector.state_dict(), expected.teacher.detector.state_dict())


def test_methods_that_read_features_take_other_classes_and_widths(tmp_path):
    opts = ["MODEL.RETINANET.NUM_CLASSES", "4", *WIDER]
    file = save_teacher(tmp_path / "teacher.pth", *opts)
    student = build(distill_config(file, methods=["PKD"], teacher_opts=opts))
    grads = gradients(student, step(student, batch()))
    assert grads["distill.pkd.adapters.0.weight"].abs().max() > 0


def test_other_level_sizes_are_refused_at_the_first_batch(student):
    """A teacher that pads to multiples of 128 sees larger maps."""
    student.teacher.detector.backbone._size_divisibility = 128
    with pytest.raises(D2kdError, match="sizes"):
        step(student, batch())


def test_distilled_teacher_needs_no_teacher_of_its_own(teacher_file, tmp_path):
    torch.save({"model": build(distill_config(teacher_file)).state_dict()}, tmp_path / "distilled.pth")
    teacher = load_teacher(str(CONFIGS / "quick_crosskd_retinanet.yaml"), str(tmp_path / "distilled.pth"))
    assert teacher.detector.teacher is None
    assert teacher.detector.backbone.output_shape()["p3"] == ShapeSpec(channels=32, stride=8)


@pytest.mark.parametrize("style", ["yaml", "lazy"])
def test_a_teacher_config_that_distills_builds_no_teacher_of_its_own(teacher_file, tmp_path, style):
    """Its own teacher's file does not even exist."""
    torch.save({"model": build(distill_config(teacher_file)).state_dict()}, tmp_path / "distilled.pth")
    config, opts = {
        "yaml": ("quick_crosskd_retinanet.yaml", ["MODEL.DISTILL.INHERIT", "('neck',)"]),
        "lazy": ("lazy/quick_crosskd_retinanet.py", ["+model.inherit=[neck]"]),
    }[style]
    teacher = load_teacher(str(CONFIGS / config), str(tmp_path / "distilled.pth"), opts)
    assert teacher.detector.teacher is None
    assert not teacher.detector.methods


# After the end of a method's schedule


def ended(teacher_file, *methods, end=("PKD",), **options):
    opts = [x for name in end for x in (f"MODEL.DISTILL.SCHEDULE.{name.upper()}.END", "5")]
    return build(distill_config(teacher_file, *opts, methods=methods, **options))


def losses_at(student, iteration):
    with EventStorage(iteration):
        return student(batch())


@pytest.mark.slow
def test_after_the_end_of_all_methods_no_teacher_runs_and_the_keys_stay(tmp_path, monkeypatch):
    """Also in a run that is resumed after the end; adapters stay connected, as DistributedDataParallel needs."""
    file = save_teacher(tmp_path / "teacher.pth", *WIDER)
    methods = ("PKD", "MGD", "FGD")
    student = ended(file, *methods, end=methods, teacher_opts=WIDER)
    before = losses_at(student, 4)
    assert all(value > 0 for key, value in before.items() if "attention" not in key)
    resumed = ended(file, *methods, end=methods, teacher_opts=WIDER)
    monkeypatch.setattr(teacher.Teacher, "__call__", lambda *_: pytest.fail("the teacher ran"))
    for name, method in resumed.distill.items():
        monkeypatch.setattr(method, "forward", lambda *_, name=name: pytest.fail(f"{name} ran"))
    plain = build(small_config())
    losses, expected = losses_at(resumed, 5), losses_at(plain, 5)
    assert losses.keys() == before.keys()
    equal({key: losses[key] for key in expected}, expected)
    assert all(losses[key] == 0 for key in losses.keys() - expected.keys())
    assert all(value.dtype == torch.float32 for value in losses.values())
    own = gradients(resumed, losses)
    assert own.keys() == {name for name, p in resumed.named_parameters() if p.requires_grad}
    assert all(not grad.any() for name, grad in own.items() if name.startswith("distill."))


def test_after_the_end_data_parallel_training_finds_no_unused_parameters(tmp_path):
    """Which it would report in the step that follows."""
    file = save_teacher(tmp_path / "teacher.pth", *WIDER)
    student = ended(file, "MGD", end=["MGD"], teacher_opts=WIDER)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(student)
        for iteration in (4, 5, 6):
            sum(losses_at(parallel, iteration).values()).backward()
    finally:
        torch.distributed.destroy_process_group()


def test_only_what_active_methods_read_is_asked_of_the_teacher(teacher_file, monkeypatch):
    student = ended(teacher_file, "CrossKD", "PKD", end=["CrossKD"])
    asked = []
    run = teacher.Teacher.__call__
    monkeypatch.setattr(teacher.Teacher, "__call__", lambda *args: asked.append(args[3:5]) or run(*args))
    before, after = losses_at(student, 4), losses_at(student, 5)
    assert asked == [([(1, False)], True), ([], False)]
    assert before.keys() == after.keys()
    assert before["loss_crosskd_cls"] > 0 == after["loss_crosskd_cls"]
    assert after["loss_pkd_feature"] > 0


@pytest.mark.slow
def test_looking_for_the_names_of_losses_draws_no_random_numbers(teacher_file):
    for methods in (("MGD",), ("CrossKD", "PKD")):
        plain = build(distill_config(teacher_file, methods=methods))
        states = [torch.get_rng_state()]
        other = ended(teacher_file, *methods, end=methods)
        states.append(torch.get_rng_state())
        assert torch.equal(*states)
        equal(plain.state_dict(), other.state_dict())
        assert other.training
        assert not hasattr(other, "loss_normalizer")


def test_an_observation_holds_what_the_losses_are_made_of(teacher_file):
    student, twin = (build(distill_config(teacher_file)) for _ in range(2))
    with EventStorage():
        observation = student.observe(batch())
        assert not hasattr(student, "loss_normalizer")  # only losses move it
        losses = student.losses_of(observation)
    equal(losses, step(twin, batch()))
    assert student.loss_normalizer == twin.loss_normalizer
    assert observation.teacher.detector is student.teacher.detector
    assert observation.targets.labels.shape == observation.student.logits.shape[:2]
    assert [len(x) for x in observation.targets.instances] == [2, 2]


@pytest.mark.parametrize(
    ("opts", "methods", "message"),
    [
        ((), ("PKD", "PKD"), "PKD is named twice"),
        (("MODEL.DISTILL.PKD.WEIGHT", "-1.0"), ("PKD",), r"PKD's weight is -1\.0; set it to 0 or more"),
        (("MODEL.DISTILL.CROSSKD.BOX_WEIGHT", "-0.5"), ("CrossKD",), "CrossKD's box_weight is -0.5"),
        (("MODEL.DISTILL.FGD.BETA", "-1.0"), ("FGD",), "FGD's alpha, beta, gamma and lambda_ are"),
    ],
)
def test_methods_twice_and_negative_weights_are_refused(teacher_file, opts, methods, message):
    with pytest.raises(D2kdError, match=message):
        build(distill_config(teacher_file, *opts, methods=methods))


def test_load_teacher_loads_at_once_unless_asked_to_wait(tmp_path):
    config, missing = str(CONFIGS / "quick_retinanet.yaml"), str(tmp_path / "gone.pth")
    with pytest.raises(D2kdError, match=r"gone\.pth"):
        load_teacher(config, missing)
    later = load_teacher(config, missing, when_needed=True)
    assert not later.loaded
    with pytest.raises(D2kdError, match=r"gone\.pth"):
        later(batch(), "BGR")
