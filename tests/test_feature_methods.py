"""MGD, CWD, FitNet and LD's imitation regions: parity, values by hand, and what they promise."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, List, Sequence, Tuple

import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes, Instances
from goldens import Golden, cases, close, of_committed_goldens
from small import batch, build, distill_config, gradients, save_teacher, step
from torch import Tensor

from d2kd.dense import DenseOutputs, Targets
from d2kd.errors import D2kdError
from d2kd.methods import CWD, MGD, FeatureMethod, FitNet
from d2kd.methods import fitnet as fitnet_module
from d2kd.methods.fitnet import REGIONS, mean_inside
from d2kd.methods.imitation import (
    MAX_INSTANCES,
    centers_inside,
    general_instances,
    instance_region,
    near_region,
    to_locations,
)
from d2kd.modeling.coders import IntegralBoxTransform

LOSS, GRADIENT = 1e-5, 1e-3
IMITATION = [path for path in cases("ld_repo_c") if path.stem.endswith("_imitation")]
NEAR = [path for path in cases("ld_repo_c") if "tgt.im_finegrained.0" in Golden(path)]
# LD's names of its regions and how FitNet is told to do the same.
PUBLISHED = {
    "gibox": {"region": "gibox", "gi_per_batch": True},
    "finegrained": {"region": "finegrained"},
    "fitnet": {"region": "boxes"},
    "decouple": {"region": "boxes", "background_weight": 2.0},
}
ALL_METHODS = [(MGD, {}), (CWD, {}), *((FitNet, {"region": region}) for region in REGIONS)]
ALL_METHODS += [(FitNet, PUBLISHED["gibox"]), (FitNet, PUBLISHED["decouple"])]
IDS = [f"{method.__name__}-{'-'.join(map(str, options.values()))}" for method, options in ALL_METHODS]


def detector(num_classes: int, strides: Sequence[int], scale: float, reg_max: int = 16) -> Any:
    """Stands for a GFL: what the methods read of it."""
    generator = DefaultAnchorGenerator(
        sizes=[[scale * s] for s in strides], aspect_ratios=[1.0], strides=strides, offset=0.0
    )
    coder = IntegralBoxTransform(reg_max, scale)
    return SimpleNamespace(num_classes=num_classes, box2box_transform=coder, anchor_generator=generator)


def per_level(golden: Golden, name: str) -> List[Tensor]:
    return [golden[f"{name}.{level}"] for level in range(sum(key.startswith(f"{name}.") for key in golden.arrays))]


def golden_targets(golden: Golden) -> Targets:
    settings = golden.json("settings")
    labels, boxes, weights = (
        torch.cat(per_level(golden, f"tgt.{x}"), dim=1) for x in ("labels", "bbox_targets", "label_weights")
    )
    positive = (labels < settings["num_classes"]) & (weights > 0)
    sizes = golden["in.img_shape"].tolist()
    instances = [Instances(tuple(size), gt_boxes=Boxes(golden[f"in.gt_boxes.{i}"])) for i, size in enumerate(sizes)]
    padded = tuple(golden["in.pad_shape"].amax(0).tolist())
    return Targets(instances, labels.long(), boxes, weights, torch.tensor(1.0), positive, padded)


def golden_detector(golden: Golden) -> Any:
    settings = golden.json("settings")
    strides, reg_max = golden["in.strides"].tolist(), settings["reg_max"]
    return detector(settings["num_classes"], strides, settings["octave_base_scale"], reg_max)


class ImitationCase:
    """Both detectors' features and predictions, the student's features as leaves, and the targets."""

    def __init__(self, path: Path) -> None:
        self.golden = Golden(path)
        common = Golden(path.with_name(self.golden.json("settings")["logits_and_targets_in"]))
        self.leaves = [x.requires_grad_() for x in per_level(self.golden, "in.feat_student")]
        features = (self.leaves, per_level(self.golden, "in.feat_teacher"))
        self.student, self.teacher = (
            DenseOutputs(
                golden_detector(common), maps, tuple(per_level(common, f"in.{k}_{who}") for k in ("cls", "reg"))
            )
            for maps, who in zip(features, ("student", "teacher"))
        )
        self.targets = golden_targets(common)

        self.idle = self.levels_without_positives()
        for level in self.idle:  # equal features have no loss
            self.student.features[level] = self.teacher.features[level]

    def levels_without_positives(self) -> List[int]:
        """Where the reference's loss is 0 though the region has places; ours is not, so they are left out."""
        sizes = [len(level) for level in self.student.anchors_per_level]
        return [i for i, level in enumerate(self.targets.positive.split(sizes, dim=1)) if not level.any()]

    def method(self, name: str) -> FitNet:
        method = FitNet(weight=float(self.golden.json("settings")["loss_im"].split()[1]), **PUBLISHED[name])
        method.setup(None, None, [(x.shape[1], x.shape[1]) for x in self.leaves])
        return method


@of_committed_goldens
def test_there_are_cases() -> None:
    assert IMITATION
    assert NEAR


@pytest.mark.parametrize("name", ["gibox", "finegrained", "fitnet"])
@pytest.mark.parametrize("path", IMITATION, ids=lambda p: p.stem)
def test_parity_of_the_imitation(path: Path, name: str) -> None:
    case = ImitationCase(path)
    method = case.method(name)
    for level, region in enumerate(method.regions(case.student, case.teacher, case.targets)):
        if name == "gibox":  # the file's gibox.region is the one of the boxes
            chosen = case.golden[f"tgt.gibox.index.{level}"].sort().values
            assert torch.equal(region.flatten().nonzero()[:, 0], chosen)
        else:
            assert torch.equal(region.flatten(1), case.golden[f"tgt.{name}.region.{level}"] > 0)
    losses = method(case.student, case.teacher, case.targets)
    assert list(losses) == ["loss_fitnet_feature"]
    expected = case.golden[f"out.{name}.loss_im"]
    assert not expected[case.idle].any()
    close(losses["loss_fitnet_feature"], expected.sum(), LOSS, name)
    losses["loss_fitnet_feature"].backward()
    gradients_of = per_level(case.golden, f"grad.{name}.feat_student")
    assert len(gradients_of) == len(case.leaves)
    for level, (leaf, expected) in enumerate(zip(case.leaves, gradients_of)):
        if level in case.idle:
            assert not expected.any()
        else:
            close(leaf.grad, expected, GRADIENT, f"gradient of {name}")


@pytest.mark.parametrize("path", IMITATION, ids=lambda p: p.stem)
def test_parity_of_decoupled_imitation(path: Path) -> None:
    case = ImitationCase(path)
    losses = case.method("decouple")(case.student, case.teacher, case.targets)
    assert list(losses) == ["loss_fitnet_feature", "loss_fitnet_background"]
    close(sum(losses.values()), case.golden["derived.decouple_fixed.loss_im"].sum(), LOSS, "decouple")


@pytest.mark.parametrize("path", NEAR, ids=lambda p: p.stem)
def test_parity_of_the_near_region(path: Path) -> None:
    golden = Golden(path)
    maps = per_level(golden, "in.cls_student")
    region = near_region(DenseOutputs(golden_detector(golden), maps), golden_targets(golden))
    assert torch.equal(region, torch.cat(per_level(golden, "tgt.im_finegrained"), dim=1) > 0)


def outputs(*maps: Any) -> DenseOutputs:
    return DenseOutputs(None, [torch.as_tensor(x, dtype=torch.float32) for x in maps])


def ready(method: FeatureMethod, *channels: Tuple[int, int]) -> FeatureMethod:
    method.setup(None, None, channels)
    return method


def test_fitnet_by_hand() -> None:
    """Errors 1 and 3 squared on one level: mean 5; error 2 on the other: 4; so 9 times the weight."""
    method = ready(FitNet(weight=0.5), (1, 1), (1, 1))
    losses = method(outputs([[[[1.0, 3.0]]]], [[[[2.0]]]]), outputs([[[[0.0, 0.0]]]], [[[[0.0]]]]), None)
    assert losses == {"loss_fitnet_feature": pytest.approx(4.5)}


def test_cwd_by_hand() -> None:
    """Teacher uniform (1/2, 1/2), student peaked (1/4, 3/4): KL = ln(2/sqrt 3) = 0.1438; a shift changes nothing."""
    student, teacher = outputs([[[[0.0, 3.0**0.5]], [[5.0, 5.0]]]]), outputs([[[[7.0, 7.0]], [[1.0, 1.0]]]])
    student.features[0][0, 0, 0, 1] = torch.tensor(3.0).log()
    expected = torch.tensor(2 / 3**0.5).log() / 2  # the other channel agrees
    value = ready(CWD(weight=1.0), (2, 2))(student, teacher, None)["loss_cwd_feature"]
    torch.testing.assert_close(value, expected)
    halved = outputs(student.features[0] / 2)
    warm = ready(CWD(weight=1.0, temperature=0.5), (2, 2))(halved, outputs(teacher.features[0] / 2), None)
    torch.testing.assert_close(warm["loss_cwd_feature"], expected / 4)  # times the temperature squared
    assert ready(CWD(), (2, 2))(teacher, teacher, None)["loss_cwd_feature"] == pytest.approx(0, abs=1e-6)


def mgd(mask_ratio: float, weight: float = 1.0) -> MGD:
    """Generators that give what they get where it is not negative."""
    method = ready(MGD(weight=weight, mask_ratio=mask_ratio), (2, 2))
    for conv in method.generators[0][::2]:
        torch.nn.init.dirac_(conv.weight)
        torch.nn.init.zeros_(conv.bias)
    return method


def test_mgd_by_hand() -> None:
    """With nothing masked the student's map comes through; with all masked only the teacher's squares remain."""
    torch.manual_seed(0)
    own, theirs = torch.rand(3, 2, 8, 8), torch.rand(3, 2, 8, 8)
    full = mgd(0.0, weight=0.1)(outputs(own), outputs(theirs), None)
    torch.testing.assert_close(full["loss_mgd_feature"], 0.1 * (own - theirs).square().sum() / 3)
    nothing = mgd(1.0)(outputs(own), outputs(theirs), None)
    torch.testing.assert_close(nothing["loss_mgd_feature"], theirs.square().sum() / 3)


def test_mgd_masks_places_at_the_ratio_and_repeatably() -> None:
    own = torch.ones(4, 2, 50, 50)
    seen = []
    method = mgd(0.65)
    method.generators[0].register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        method(outputs(own), outputs(own), None)
    assert torch.equal(seen[0][:, 0], seen[0][:, 1])  # whole places
    assert float((seen[0] == 0).float().mean()) == pytest.approx(0.65, abs=0.02)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


def test_centers_inside_by_hand() -> None:
    anchors = torch.tensor([[0.0, 0.0, 4.0, 4.0], [4.0, 4.0, 8.0, 8.0], [8.0, 8.0, 12.0, 12.0]])  # centers 2, 6, 10
    assert centers_inside(anchors, Boxes(torch.tensor([[3.0, 3.0, 9.0, 9.0]]))).tolist() == [False, True, False]
    assert centers_inside(anchors, Boxes(torch.tensor([[6.0, 0.0, 9.0, 9.0]]))).tolist() == [False] * 3  # on the edge
    assert centers_inside(anchors, Boxes(torch.zeros(0, 4))).tolist() == [False] * 3


def test_general_instances_by_hand() -> None:
    """Differences 0.5, 0.4, 0.3, 0.2: the second's box, the student's as it scores higher, lies on the first's."""
    own_scores = torch.tensor([[0.1, 0.0], [0.9, 0.5], [0.5, 0.5], [0.2, 0.2]])
    scores = torch.tensor([[0.1, 0.5], [0.5, 0.6], [0.8, 0.5], [0.3, 0.4]])
    first, second, third = ([x, 0.0, x + 4, 4.0] for x in (0, 10, 20))
    own_boxes, boxes = torch.tensor([third, first, first, first]), torch.tensor([first, second, second, third])
    none = torch.zeros(4, dtype=torch.bool)
    chosen = general_instances(own_scores, scores, own_boxes, boxes, none)
    assert chosen.tolist() == [True, False, True, True]
    excluded = torch.tensor([True, False, False, False])
    chosen = general_instances(own_scores, scores, own_boxes, boxes, excluded)
    assert chosen.tolist() == [False, True, True, True]
    alone = torch.tensor([False, False, True, False])  # nothing suppresses its box
    chosen = general_instances(own_scores, scores, own_boxes, boxes, alone)
    assert chosen.tolist() == [True, False, False, True]
    assert not general_instances(own_scores[:, :0], scores[:, :0], own_boxes, boxes, none).any()


def random_pair(images: int) -> Tuple[DenseOutputs, DenseOutputs, Targets]:
    """Student, teacher and targets of random values for images of 64 x 64, the last column of each in padding."""
    generator = torch.Generator().manual_seed(0)
    model = detector(3, [8, 16], 2)
    pair = []
    for _ in range(2):
        maps = [[torch.randn(images, c, s, s, generator=generator) for s in (8, 4)] for c in (5, 3, 68)]
        pair.append(DenseOutputs(model, maps[0], (maps[1], maps[2])))
    instances = [Instances((64, 56), gt_boxes=Boxes(torch.tensor([[8.0, 8.0, 40.0, 44.0]]))) for _ in range(images)]
    weights = torch.ones(images, 80)
    weights[:, 7:64:8] = 0
    labels = torch.full((images, 80), 3)
    targets = Targets(instances, labels, torch.zeros(images, 80, 4), weights, torch.tensor(1.0), labels < 3, (64, 64))
    return (*pair, targets)


def image_of(index: int, student: DenseOutputs, teacher: DenseOutputs, targets: Targets) -> Tuple[Any, ...]:
    """One image of a batch alone."""
    one = slice(index, index + 1)
    pair = [
        DenseOutputs(x.detector, [f[one] for f in x.features], tuple([p[one] for p in out] for out in x.predictions))
        for x in (student, teacher)
    ]
    fields = (targets.labels[one], targets.boxes[one], targets.weights[one], targets.num_pos, targets.positive[one])
    return (*pair, Targets(targets.instances[one], *fields, targets.padded_size))


def test_general_instances_of_images_are_independent_and_none_lies_in_padding() -> None:
    student, teacher, targets = random_pair(3)
    region = instance_region(student, teacher, targets)
    alone = [instance_region(*image_of(i, student, teacher, targets)) for i in range(3)]
    assert torch.equal(region, torch.cat(alone))
    assert not region[targets.weights == 0].any()
    assert all(0 < count <= MAX_INSTANCES for part in region.split([64, 16], dim=1) for count in part.sum(1).tolist())
    together = instance_region(student, teacher, targets, whole_batch=True)
    assert 1 < together[:, :64].sum() <= MAX_INSTANCES


def test_levels_without_positive_anchors_are_imitated() -> None:
    """Not as the reference has it, where they have no loss."""
    student, teacher, targets = random_pair(1)
    assert not targets.positive.any()
    method = ready(FitNet(weight=1.0, region="boxes"), (5, 5), (5, 5))
    regions = method.regions(student, teacher, targets)
    squares = [(own - theirs).square().mean(1) for own, theirs in zip(student.features, teacher.features)]
    expected = sum(square[region].mean() for square, region in zip(squares, regions))
    assert all(region.any() for region in regions)
    torch.testing.assert_close(method(student, teacher, targets)["loss_fitnet_feature"], expected)


def test_no_anchor_in_padding_is_near() -> None:
    """A box as near to the last column, which is padding, as to the one before."""
    student, _, targets = random_pair(1)
    targets.instances[0].gt_boxes = Boxes(torch.tensor([[48.0, 24.0, 56.0, 40.0]]))
    region = near_region(student, targets)[0, :64].view(8, 8)
    assert region[:, 6].any()
    assert not region[:, 7].any()


def test_general_instances_of_shared_classes_only() -> None:
    student, teacher, targets = random_pair(1)
    teacher.predictions[0][0][:, 2] += 20.0 * (torch.arange(8) == 3)  # would win
    everything = instance_region(student, teacher, targets)
    student.classes = teacher.classes = torch.tensor([0, 1])
    shared = instance_region(student, teacher, targets)
    assert not torch.equal(everything, shared)
    student.classes = teacher.classes = torch.tensor([], dtype=torch.long)
    assert not instance_region(student, teacher, targets).any()


def test_instance_region_leaves_gradients_of_the_boxes_to_others() -> None:
    student, teacher, targets = random_pair(1)
    for level in student.predictions[1]:
        level.requires_grad_()
    assert not instance_region(student, teacher, targets).requires_grad
    assert student.boxes.requires_grad


def test_a_place_counts_if_any_of_its_anchors_does() -> None:
    student = SimpleNamespace(
        anchors_per_level=[range(12), range(3)], features=[torch.zeros(1, 5, 2, 2), torch.zeros(1, 5, 1, 1)]
    )
    region = torch.zeros(1, 15, dtype=torch.bool)
    region[0, [4, 5]] = True  # second and third anchor of the second place
    first, second = to_locations(region, student)
    assert first.tolist() == [[[False, True], [False, False]]]
    assert second.tolist() == [[[False]]]


def test_empty_regions_have_no_loss_and_others_do_not_mind() -> None:
    errors = [torch.ones(1, 2, 2, requires_grad=True), torch.full((1, 1, 1), 3.0, requires_grad=True)]
    means = mean_inside(errors, [torch.zeros(1, 2, 2, dtype=torch.bool), torch.ones(1, 1, 1, dtype=torch.bool)])
    assert means.tolist() == [0.0, 3.0]
    means.sum().backward()
    assert not errors[0].grad.any()
    assert errors[1].grad.tolist() == [[[1.0]]]


def test_mean_over_workers_is_that_of_one_worker_with_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers with 1 and 3 places: each divides by 2, so that their mean is the mean over 4."""
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    errors = [torch.tensor([[[2.0, 4.0, 6.0, 8.0]]])]
    regions = [[torch.tensor([[[True, False, False, False]]])], [torch.tensor([[[False, True, True, True]]])]]
    for average in (2.0, 0.5):
        monkeypatch.setattr(fitnet_module, "mean_over_workers", lambda counts, a=average: torch.full_like(counts, a))
        assert [float(mean_inside(errors, region)) for region in regions] == [2 / average, 18 / average]


@pytest.fixture(scope="module")
def teacher_files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("teachers")
    return {
        name: save_teacher(folder / f"{name}.pth", "MODEL.META_ARCHITECTURE", name, "MODEL.FPN.OUT_CHANNELS", 64)
        for name in ("RetinaNet", "GFL")
    }


def narrow_student(teacher_files: Any, name: str, method: type, options: Any) -> Any:
    """A student of 32 channels with a teacher of 64."""
    opts = ["MODEL.META_ARCHITECTURE", f"Distill{name}"]
    for key, value in options.items():
        opts += [f"MODEL.DISTILL.{method.__name__.upper()}.{key.upper()}", value]
    teacher_opts = ["MODEL.META_ARCHITECTURE", name, "MODEL.FPN.OUT_CHANNELS", "64"]
    return build(distill_config(teacher_files[name], *opts, methods=[method.__name__], teacher_opts=teacher_opts))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["RetinaNet", "GFL"])
@pytest.mark.parametrize(("method", "options"), ALL_METHODS, ids=IDS)
def test_wider_teachers_and_images_without_ground_truth(
    teacher_files: Any, method: type, options: Any, name: str
) -> None:
    student = narrow_student(teacher_files, name, method, options)
    prefix = f"loss_{method.__name__.lower()}_"
    keys = None
    for boxes in ((2, 2), (2, 0), (0, 0)):
        losses = {key: value for key, value in step(student, batch(boxes=boxes)).items() if key.startswith(prefix)}
        keys = keys or list(losses)
        assert list(losses) == keys
        reads_boxes = options.get("region") in ("boxes", "finegrained")
        for key, value in losses.items():
            assert value.dtype == torch.float32
            assert value.shape == ()
            assert value.isfinite()
            assert (value > 0) == (any(boxes) or not reads_boxes or key.endswith("background"))
        found = gradients(student, losses)
        adapters = [key for key, _ in student.named_parameters() if key.startswith("distill.")]
        convs = 3 if method is MGD else 1  # with weight and bias each
        assert len(adapters) == 2 * convs * len(student.head_in_features)
        assert all(found[key].isfinite().all() for key in adapters)  # there is a gradient on every call, as DDP needs
        if any(boxes) or not reads_boxes:
            assert any(found[key].any() for key in adapters)
        assert all(p.grad is None for p in student.teacher.detector.parameters())


@pytest.mark.slow
def test_the_teachers_head_runs_for_general_instances_only(teacher_files: Any) -> None:
    for method, options in ALL_METHODS:
        student = narrow_student(teacher_files, "GFL", method, options)
        runs: List[int] = []
        student.teacher.detector.head.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        step(student, batch())
        assert bool(runs) == (options.get("region") == "gibox")


@pytest.mark.parametrize("region", REGIONS)
def test_regions_need_the_levels(teacher_files: Any, region: str) -> None:
    opts = ["MODEL.META_ARCHITECTURE", "DistillRetinaNet", "MODEL.DISTILL.FEATURES", "('backbone.bottom_up.res4',)"]
    teacher_opts = ["MODEL.FPN.OUT_CHANNELS", "64"]
    student = build(
        distill_config(
            teacher_files["RetinaNet"],
            *opts,
            "MODEL.DISTILL.FITNET.REGION",
            region,
            methods=["FitNet"],
            teacher_opts=teacher_opts,
        )
    )
    if region == "whole":
        assert step(student, batch())["loss_fitnet_feature"] > 0
        return
    with pytest.raises(D2kdError, match=r"MODEL\.DISTILL\.FEATURES"):
        step(student, batch())


def test_bad_options_are_refused() -> None:
    with pytest.raises(D2kdError, match="did you mean finegrained"):
        FitNet(region="fine-grained")
    with pytest.raises(D2kdError, match="needs a region"):
        FitNet(background_weight=2.0)
    with pytest.raises(D2kdError, match="from 0 to 1"):
        MGD(mask_ratio=65.0)
    with pytest.raises(D2kdError, match="above 0"):
        CWD(temperature=0.0)
