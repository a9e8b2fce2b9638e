"""The dry run's tables and the logged gradient ratios."""

import re

import pytest
import torch
from detectron2.utils.events import EventStorage
from small import CONFIGS, batch, build, distill_config, save_teacher

from d2kd.diagnose import finite
from d2kd.diagnose.dry_run import dry_run
from d2kd.diagnose.finite import levels_after_error, levels_not_finite
from d2kd.diagnose.gradients import gradient_ratios, weight_warnings
from d2kd.engine import main
from d2kd.engine.estimate import Measured, Processes, measure_training, num_evaluations, training_table
from d2kd.engine.main import parser
from d2kd.engine.styles import load_recipe

WIDER = ("MODEL.FPN.OUT_CHANNELS", "64")


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pth", *WIDER)


def make(file, *opts, methods=("PKD", "FitNet")):
    return build(distill_config(file, *opts, methods=methods, teacher_opts=WIDER))


def test_ratios_by_hand():
    """Own loss 3 a: gradient 3 per element; KD losses 6 a and 0 a."""
    a = torch.ones(4, requires_grad=True)
    losses = {"loss_cls": a.sum(), "loss_box": 2 * a.sum(), "loss_kd_one": 6 * a.sum(), "loss_kd_two": torch.zeros(())}
    ratios = gradient_ratios(losses, ["kd"], [a])
    assert ratios == pytest.approx({"loss_cls": 1 / 3, "loss_box": 2 / 3, "loss_kd_one": 2, "loss_kd_two": 0, "kd": 2})
    assert a.grad is None


def test_warnings_about_weights_that_are_too_large_or_too_small():
    said = weight_warnings({"a": 20.0, "b": 1.0, "c": 0.005, "d": 0.0}, ["a", "b", "c", "d"], {"a": 6.0, "b": 1.0})
    assert len(said) == 3
    assert all(words in text for words, text in zip(("of a at", "of c at", "d does"), said))
    assert "lower its weight to about 0.3," in said[0]
    assert "raise its weights, to 2e+02 times what they are" in said[1]
    assert "does not reach" in said[2]


@pytest.mark.slow
def test_dry_run_describes_the_wiring(teacher_file):
    model = make(teacher_file, "MODEL.DISTILL.PKD.WEIGHT", "1e5")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    text = dry_run(model, batch())
    for words in (
        r"p3 / p3\s+8 / 8\s+32 / 64\s+9 / 9",
        r"parameters\s+0\.\d+ M\s+0\.\d+ M",
        r"MACs, 96 x 128\s+0\.\d+ G\s+0\.\d+ G",
        r"latency, cpu\s+\d+ ms\s+\d+ ms",
        r"classes\s+3\s+3",
        r"PKD\s+FPN features\s+8448 parameters: 4 Conv2d",
        r"loss_pkd_feature\s+[\d.e+]+\s+[\d.e+]+",
        "warning: the gradient of pkd .* lower its weight",
    ):
        assert re.search(words, text), text
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_ratios_are_logged_every_so_many_iterations(teacher_file):
    model = make(teacher_file, "MODEL.DISTILL.GRADIENT_PERIOD", "5")
    for iteration, logged in ((0, True), (4, False), (5, True)):
        with EventStorage(iteration) as storage:
            losses = model(batch())
        assert ("gradient/pkd" in storage.latest()) == logged
        sum(losses.values()).backward()


@pytest.mark.slow
@pytest.mark.parametrize("style", ["yaml", "lazy"])
def test_command_line(teacher_file, blood_cells, tmp_path, capsys, style):
    """It prints, and writes nothing."""
    file = save_teacher(tmp_path / "teacher.pth")
    words = {
        "yaml": ["configs/quick_crosskd_retinanet.yaml", "MODEL.DISTILL.TEACHER.WEIGHTS", str(file)],
        "lazy": ["configs/lazy/quick_crosskd_retinanet.py", f"model.teacher.weights={file}"],
    }[style]
    out = {"yaml": ["OUTPUT_DIR", str(tmp_path / "out")], "lazy": [f"train.output_dir={tmp_path / 'out'}"]}[style]
    assert main(["--dry-run", "--config-file", str(CONFIGS.parent / words[0]), *words[1:], *out]) == 0
    said = capsys.readouterr().out
    for words in ("loss_crosskd_box", "MACs, 128 x ", "training takes about", "4 iterations", "4 images evaluated"):
        assert words in said
    assert re.search(r"memory\s+[\d.]+ GB of the process", said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cuda", [False, True])
def test_time_of_several_processes(monkeypatch, cuda):
    """By hand: 10 iterations of 2 s, and 3 evaluations of 8 images of 0.5 s, by four processes on two machines."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    opts = ["SOLVER.MAX_ITER", "10", "TEST.EVAL_PERIOD", "4", "SOLVER.IMS_PER_BATCH", "8"]
    recipe = load_recipe(parser().parse_args(["--config-file", str(CONFIGS / "quick_retinanet.yaml"), *opts]))
    processes = Processes(4, 2)
    assert processes.part(recipe).options.max_iter == 10
    assert processes.part(recipe).get("SOLVER.IMS_PER_BATCH") == (2 if cuda else 4)
    assert recipe.get("SOLVER.IMS_PER_BATCH") == 8
    text = training_table(recipe, Measured(2.0, 0.5, 900.0), 8, processes)
    evaluating = 3 if cuda else 6
    for words in (
        r"an iteration\s+2 s, 8 images by 4 processes",
        r"10 iterations\s+20 s",
        rf"3 x 8 images evaluated\s+{evaluating} s",
        rf"together\s+{20 + evaluating} s",
        r"memory\s+0.9 GB",
    ):
        assert re.search(words, text), text


def test_number_of_evaluations():
    """The last one is at the end, whether it is due or not."""
    assert [num_evaluations(*x) for x in ((10, 0), (10, 4), (10, 5), (10, 10), (10, 11))] == [1, 3, 2, 1, 1]


def test_measuring_leaves_the_weights_as_they_are(blood_cells):
    recipe = load_recipe(parser().parse_args(["--config-file", str(CONFIGS / "quick_retinanet.yaml")])).with_seed(0)
    model = recipe.build_model().train()
    before = {name: value.clone() for name, value in model.named_parameters()}
    images = [x for size in ((96, 128), (80, 112)) for x in batch([size])]
    measured = measure_training(recipe, model, iter([images] * 8))
    assert min(measured) > 0
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert model.training


def test_command_line_without_methods(blood_cells, capsys):
    assert main(["--dry-run", "--config-file", str(CONFIGS / "quick_retinanet.yaml")]) == 2
    assert "set MODEL.DISTILL.METHODS" in capsys.readouterr().err


def test_levels_that_are_not_finite_are_named(teacher_file):
    model = make(teacher_file)
    assert levels_not_finite(model, batch()) == []
    with torch.no_grad():
        model.teacher.detector.backbone.fpn_output4.bias[0] = torch.nan
        model.backbone.fpn_output3.bias[0] = torch.inf
    assert levels_not_finite(model, batch()) == ["student p3", "teacher p4"]
    assert levels_not_finite(torch.nn.Identity(), batch()) == []


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
def test_looking_for_levels_has_no_effects(teacher_file, norm):
    """SyncBN in training mode would wait for other workers; here it would refuse to run on the CPU."""
    model = make(teacher_file, "MODEL.RESNETS.NORM", norm)
    model.backbone.bottom_up.eval()  # one part in a mode of its own
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    assert levels_not_finite(model, batch()) == []
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert not hasattr(model, "loss_normalizer")


def test_nothing_runs_again_when_memory_ran_out(teacher_file, monkeypatch):
    model = make(teacher_file)
    with torch.no_grad():
        model.backbone.fpn_output3.bias[0] = torch.inf
    assert levels_after_error(AssertionError(), model, batch()) == ["student p3"]
    monkeypatch.setattr(finite, "levels_not_finite", lambda *_: 1 / 0)
    assert levels_after_error(AssertionError(), model, batch()) == []
    monkeypatch.setattr(finite, "levels_not_finite", lambda *_: pytest.fail("it ran"))
    assert levels_after_error(torch.OutOfMemoryError(), model, batch()) == []
