"""FGD: parity with the authors' own numbers, what it does otherwise, and what it promises."""

from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import pytest
import torch
from detectron2.structures import Boxes, Instances
from goldens import DEFECTS, Golden, cases, close, of_committed_goldens
from torch import Tensor

from d2kd import level_losses
from d2kd.dense import DenseOutputs, Targets
from d2kd.errors import D2kdError
from d2kd.methods.fgd import FGD, Distances, Magnitudes, attention, focal_masks, relative_boxes

LOSS, GRADIENT = 1e-5, 1e-3
# Our losses, and the reference's terms and their weights.
NAMES = {
    "loss_fgd_fg": ("fg_loss", "alpha_fgd"),
    "loss_fgd_bg": ("bg_loss", "beta_fgd"),
    "loss_fgd_attention": ("mask_loss", "gamma_fgd"),
    "loss_fgd_relation": ("rela_loss", "lambda_fgd"),
}
# Parameters: the reference's names in ours. Its conv_mask_*.bias has no effect, so there is none.
PARAMETERS = {
    "align.weight": "adapters.0.weight",
    "align.bias": "adapters.0.bias",
    **{
        f"{theirs.format(short)}": f"{side}_contexts.0.{ours}"
        for short, side in (("s", "student"), ("t", "teacher"))
        for theirs, ours in {
            "conv_mask_{}.weight": "query.weight",
            "channel_add_conv_{}.0.weight": "transform.0.weight",
            "channel_add_conv_{}.0.bias": "transform.0.bias",
            "channel_add_conv_{}.1.weight": "transform.1.weight",
            "channel_add_conv_{}.1.bias": "transform.1.bias",
            "channel_add_conv_{}.3.weight": "transform.3.weight",
            "channel_add_conv_{}.3.bias": "transform.3.bias",
        }.items()
    },
}
NO_EFFECT = ("conv_mask_s.bias", "conv_mask_t.bias")
# Boxes with negative coordinates, which the reference puts at the far end.
DEFECT = [path for path in cases("fgd_") if path.name.startswith(DEFECTS)]
REPRODUCED = [path for path in cases("fgd_") if path not in DEFECT]
reproduced = pytest.mark.parametrize("path", REPRODUCED, ids=lambda p: p.stem)


def make_targets(
    boxes: Sequence[Tensor], sizes: Sequence[Sequence[int]], padded_size: Tuple[int, int] = (0, 0)
) -> Targets:
    """Targets of which only the boxes are there; the padded size is only read where boxes are scaled by it."""
    instances = [Instances(tuple(size), gt_boxes=Boxes(image)) for size, image in zip(sizes, boxes)]
    none = torch.zeros(0)
    return Targets(instances, none, none, none, none, none, padded_size)


def make(channels: int = 8, **options: Any) -> FGD:
    """The method for one pair of maps of equal channels, all parameters random."""
    torch.manual_seed(0)
    method = FGD(**options)
    method.setup(None, None, [(channels, channels)])
    for parameter in method.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return method


def random_maps(*shape: int) -> Tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(*shape, generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher


def losses_of(method: FGD, student: Tensor, teacher: Tensor, targets: Targets) -> Dict[str, Tensor]:
    return method(DenseOutputs(None, [student]), DenseOutputs(None, [teacher]), targets)


class Case:
    """One golden: maps, boxes, and the method with the golden's parameters."""

    def __init__(self, path: Path) -> None:
        self.golden = Golden(path)
        self.settings = self.golden.json("settings")
        self.student = self.golden["in.student"].requires_grad_()
        self.teacher = self.golden["in.teacher"].requires_grad_()
        sizes = self.golden["in.img_hw"].tolist()
        self.boxes = [self.golden[f"in.gt_boxes.{i}"].reshape(-1, 4) for i in range(len(sizes))]
        self.targets = make_targets(self.boxes, sizes)

    def method(self, weighted: bool) -> FGD:
        """With the golden's weights or all 1."""
        alpha, beta, gamma, lambda_ = (self.settings[key] if weighted else 1.0 for _, key in NAMES.values())
        method = FGD(self.settings["temp"], alpha, beta, gamma, lambda_, unpadded=True)
        method.setup(None, None, [(self.settings["student_channels"], self.settings["teacher_channels"])])
        state = {PARAMETERS[k]: v for k, v in self.golden.group("param.").items() if k not in NO_EFFECT}
        own = method.state_dict()
        method.load_state_dict({key: value.reshape(own[key].shape) for key, value in state.items()})
        return method

    def losses(self, weighted: bool) -> Dict[str, Tensor]:
        return losses_of(self.method(weighted), self.student, self.teacher, self.targets)

    def masks(self) -> Tuple[Tensor, Tensor]:
        return focal_masks(relative_boxes(self.targets, unpadded=True), *self.student.shape[-2:])


@of_committed_goldens
def test_there_are_cases() -> None:
    assert REPRODUCED
    assert DEFECT


@reproduced
def test_parity_of_masks(path: Path) -> None:
    case = Case(path)
    for ours, name in zip(case.masks(), ("mask_fg", "mask_bg")):
        close(ours, case.golden[f"out.{name}"], LOSS, name)


@pytest.mark.parametrize("path", [*REPRODUCED, *DEFECT], ids=lambda p: p.stem)
def test_parity_of_attentions(path: Path) -> None:
    case = Case(path)
    adapted = case.method(weighted=True).adapters[0](case.student)
    for feature, short in ((adapted, "s"), (case.teacher, "t")):
        spatial, channel = attention(feature.flatten(2), case.settings["temp"])
        close(spatial.view(len(feature), *feature.shape[-2:]), case.golden[f"out.s_att_{short}"], LOSS, "spatial")
        close(channel, case.golden[f"out.c_att_{short}"], LOSS, "channel")


@pytest.mark.parametrize("path", [*REPRODUCED, *DEFECT], ids=lambda p: p.stem)
def test_parity_of_terms(path: Path) -> None:
    """Each term and its gradient; where boxes are negative, the two terms that read no boxes."""
    case = Case(path)
    losses = case.losses(weighted=False)
    assert list(losses) == list(NAMES)
    for key, (name, _) in NAMES.items():
        if path in DEFECT and name in ("fg_loss", "bg_loss"):
            continue
        assert losses[key].dtype == torch.float32
        close(losses[key], case.golden[f"out.{name}"], LOSS, name)
        (gradient,) = torch.autograd.grad(losses[key], case.student, retain_graph=True)
        close(gradient, case.golden[f"grad.{name}.student"], GRADIENT, f"gradient of {name}")


@reproduced
def test_parity_of_the_total(path: Path) -> None:
    case = Case(path)
    method = case.method(weighted=True)
    total = sum(losses_of(method, case.student, case.teacher, case.targets).values())
    close(total, case.golden["out.loss"], LOSS, "total")
    total.backward()
    close(case.student.grad, case.golden["grad.loss.student"], GRADIENT, "gradient")
    parameters = dict(method.named_parameters())
    theirs = case.golden.group("grad.loss.param.")
    for name in NO_EFFECT:
        assert theirs.pop(name).abs().max() <= 1e-9 * theirs["channel_add_conv_s.3.bias"].abs().max()
    assert len(theirs) == len(parameters)
    for name, gradient in theirs.items():
        ours = parameters[PARAMETERS[name]].grad
        close(ours, gradient.reshape(ours.shape), GRADIENT, name)
    assert case.teacher.grad is None


@pytest.mark.parametrize("path", DEFECT, ids=lambda p: p.stem)
def test_negative_coordinates_are_clipped(path: Path) -> None:
    """Not as the reference has it: the same as boxes clipped before, and nothing at the far end."""
    case = Case(path)
    foreground, background = case.masks()
    theirs = case.golden["out.mask_fg"]
    assert not torch.equal(foreground > 0, theirs > 0)
    inside = [image[(image[:, 2:] >= 0).all(1)].clamp(min=0) for image in case.boxes]
    assert sum(map(len, inside)) < sum(map(len, case.boxes))  # one lies outside
    case.targets = make_targets(inside, case.golden["in.img_hw"].tolist())
    for ours, expected in zip((foreground, background), case.masks()):
        assert torch.equal(ours, expected)


def masks_of(boxes: List[List[float]], size: Tuple[int, int], padded: Tuple[int, int], **options: Any) -> Tensor:
    """Foreground of one image at stride 8, with the reciprocals taken: cells of the smallest box."""
    targets = make_targets([torch.tensor(boxes).reshape(-1, 4)], [size], padded)
    foreground, _ = focal_masks(relative_boxes(targets, **options), padded[0] // 8, padded[1] // 8)
    return torch.where(foreground > 0, 1 / foreground, 0).round().int()[0]


def test_boxes_scale_by_the_padded_size() -> None:
    """A box of 12..20 in an image of 32x32, padded to 32x64: cells 1 to 3; by the unpadded size twice as far right."""
    box = [[12.0, 12.0, 20.0, 20.0]]
    ours, theirs = (masks_of(box, (32, 32), (32, 64), unpadded=option) for option in (False, True))
    expected = torch.zeros(2, 4, 8, dtype=torch.int)
    expected[0, 1:4, 1:4] = 9
    expected[1, 1:4, 3:6] = 9
    assert torch.equal(ours, expected[0])
    assert torch.equal(theirs, expected[1])


@pytest.mark.parametrize(
    ("box", "clipped"),
    [
        ([-20.0, -9.0, 20.0, 20.0], [0.0, 0.0, 20.0, 20.0]),
        ([12.0, 12.0, 99.0, 20.0], [12.0, 12.0, 40.0, 20.0]),
        ([12.0, 12.0, 20.0, 99.0], [12.0, 12.0, 20.0, 32.0]),
    ],
)
def test_boxes_are_clipped_to_their_image(box: List[float], clipped: List[float]) -> None:
    before, after = (masks_of([b], (32, 40), (32, 64), unpadded=False) for b in (box, clipped))
    assert torch.equal(before, after)
    assert before.any()


@pytest.mark.parametrize(
    "box", [[-20.0, 2.0, -1.0, 9.0], [2.0, -20.0, 9.0, -1.0], [40.0, 2.0, 50.0, 9.0], [2.0, 32.0, 9.0, 40.0]]
)
@pytest.mark.parametrize("unpadded", [False, True])
def test_boxes_beside_their_image_count_for_nothing(box: List[float], unpadded: bool) -> None:
    assert not masks_of([box], (32, 40), (32, 64), unpadded=unpadded).any()
    kept = [0.0, 0.0, 8.0, 8.0]
    assert torch.equal(*(masks_of(b, (32, 40), (32, 64), unpadded=unpadded) for b in ([box, kept], [kept])))


def test_masks_by_hand() -> None:
    """Of overlapping boxes the smaller counts; a point covers up to 2x2 cells; the background is what is left."""
    boxes = torch.tensor([[0.0, 0.0, 24.0, 24.0], [8.0, 8.0, 8.0, 8.0]])
    foreground, background = focal_masks(relative_boxes(make_targets([boxes], [(40, 40)], (40, 40)), False), 5, 5)
    expected = torch.zeros(5, 5)
    expected[:4, :4] = 1 / 16
    expected[1, 1] = 1.0
    torch.testing.assert_close(foreground[0], expected)
    torch.testing.assert_close(background[0], (expected == 0) / 9)


def test_an_image_full_of_boxes_has_no_background() -> None:
    foreground, background = focal_masks([torch.tensor([[0.0, 0.0, 1.0, 1.0]])], 3, 4)
    assert (foreground > 0).all()
    assert not background.any()


def test_levels_and_images_add_up() -> None:
    """Two levels give the sum of both; two equal images the mean, so the loss of one."""
    one, two = FGD(), FGD()
    one.setup(None, None, [(8, 8)])  # its context blocks add nothing yet
    two.setup(None, None, [(8, 8)] * 2)
    student, teacher = random_maps(1, 8, 4, 5)
    box = torch.tensor([[4.0, 4.0, 20.0, 20.0]])
    targets, doubled = (make_targets([box] * n, [(32, 40)] * n, (32, 40)) for n in (1, 2))
    first, second = (losses_of(one, student[..., :x], teacher[..., :x], targets) for x in (5, 2))
    both = two(*(DenseOutputs(None, [x, x[..., :2]]) for x in (student, teacher)), targets)
    batch = losses_of(one, student.repeat(2, 1, 1, 1), teacher.repeat(2, 1, 1, 1), doubled)
    for key in NAMES:
        torch.testing.assert_close(both[key], first[key] + second[key])
        torch.testing.assert_close(batch[key], first[key])


def test_equal_maps_have_no_loss() -> None:
    method = make()
    method.teacher_contexts.load_state_dict(method.student_contexts.state_dict())
    student, _ = random_maps(2, 8, 4, 5)
    targets = make_targets([torch.rand(3, 4).cumsum(1) * 8] * 2, [(32, 40)] * 2, (32, 40))
    assert not any(losses_of(method, student, student.detach().clone(), targets).values())


def test_context_blocks_add_nothing_at_first() -> None:
    """As published: only the last layers get a gradient from the relation, which is the maps' squared distance."""
    method = FGD(lambda_=1.0)
    method.setup(None, None, [(8, 8)])
    student, teacher = random_maps(2, 8, 4, 5)
    loss = losses_of(method, student, teacher, make_targets([torch.zeros(0, 4)] * 2, [(32, 40)] * 2, (32, 40)))
    relation = loss["loss_fgd_relation"]
    torch.testing.assert_close(relation, (teacher - student).square().sum() / 2)
    relation.backward()
    reached = {name for name, p in method.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {
        f"{side}_contexts.0.transform.3.{x}" for side in ("student", "teacher") for x in ("weight", "bias")
    }


@pytest.fixture(params=[1, 14, 2**18], ids=["single channels", "pairs of channels", "whole maps"])
def _any_parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits the gradients of maps of 7 cells in different ways, unevenly too."""
    monkeypatch.setitem(level_losses.PART_SIZES, "cpu", request.param)


@pytest.mark.usefixtures("_any_parts")
def test_gradients_numerically() -> None:
    torch.manual_seed(0)
    student, teacher, weights = (torch.randn(2, c, 7, dtype=torch.float64) for c in (3, 3, 2))
    assert torch.autograd.gradcheck(lambda x: Distances.apply(x, teacher, weights), student.requires_grad_())
    assert torch.autograd.gradcheck(Magnitudes.apply, student)


@pytest.mark.usefixtures("_any_parts")
def test_gradient_of_attention_is_that_of_norms() -> None:
    """Also where a value is 0."""
    student = random_maps(2, 3, 7)[0].detach()
    student[0, 1, 2:4] = 0
    student.requires_grad_()
    expected = tuple(torch.linalg.vector_norm(student, ord=1, dim=dim) / student.shape[dim] for dim in (1, 2))
    found = Magnitudes.apply(student)
    weights = [torch.randn_like(x) for x in found]
    assert all(map(torch.equal, found, expected))
    grads = [torch.autograd.grad(x, student, weights)[0] for x in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-7)
    assert not grads[0][0, 1, 2:4].any()


@pytest.mark.parametrize("function", [Magnitudes, Distances])
def test_cannot_be_differentiated_twice(function: Any) -> None:
    student, teacher = random_maps(2, 3, 7)
    inputs = (student,) if function is Magnitudes else (student, teacher, torch.ones(2, 1, 7))
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(function.apply(*inputs)[0].sum(), student, create_graph=True)


def test_autocast_changes_nothing() -> None:
    method = make()
    targets = make_targets([torch.rand(3, 4).cumsum(1) * 8] * 2, [(32, 40)] * 2, (32, 40))
    maps = random_maps(2, 8, 4, 5)
    exact = losses_of(method, *maps, targets)
    with torch.autocast("cpu", torch.bfloat16):
        assert losses_of(method, *maps, targets) == exact


def test_only_the_maps_are_kept_for_the_gradient() -> None:
    """What autograd saves beside the two maps is less than half of one."""
    method = make(64)
    student, teacher = random_maps(2, 64, 40, 48)
    targets = make_targets([torch.rand(5, 4).cumsum(1) * 80] * 2, [(320, 384)] * 2, (320, 384))
    saved: Dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses_of(method, student, teacher, targets)
    for feature in (student, teacher):
        saved.pop(feature.data_ptr())
    assert sum(saved.values()) < student.untyped_storage().nbytes() / 2


def test_nothing_is_read_back_from_the_device() -> None:
    """Tensors without values: reading one raises."""
    method = make().to("meta")
    student, teacher = (x.detach().to("meta").requires_grad_(x.requires_grad) for x in random_maps(2, 8, 4, 5))
    boxes = [torch.zeros(3, 4, device="meta"), torch.zeros(0, 4, device="meta")]
    for unpadded in (False, True):
        relative = relative_boxes(make_targets(boxes, [(32, 40)] * 2, (32, 40)), unpadded)
        method._terms(0, student, teacher, relative).sum().backward()
    assert student.grad is not None


def test_temperature_must_be_positive() -> None:
    with pytest.raises(D2kdError, match="temperature is 0"):
        FGD(temperature=0)
