"""Gradient accumulation in one process; tests/test_distributed.py compares it with several."""

import itertools

import pytest
import torch
from detectron2.data.samplers import TrainingSampler
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from small import batch, build, distill_config, gradients, save_teacher, small_config, step

from d2kd.data.loader import ResumableBatches, images_per_worker
from d2kd.diagnose.gradients import GRADIENT
from d2kd.engine.accumulate import Accumulated, accumulate, micro_batches
from d2kd.engine.styles import YamlRecipe
from d2kd.engine.values import check_batch
from d2kd.errors import D2kdError
from d2kd.workers import num_workers

SEED = 3


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pth")


@pytest.fixture
def student(teacher_file):
    return build(distill_config(teacher_file))


def accumulated_gradients(model, inputs, count, scale=None):
    """Losses, and gradients of all parameters, as a trainer gets them."""
    model.zero_grad()
    with EventStorage():
        losses = Accumulated(model, count, SEED, scale)(inputs)
    total = sum(losses.values())
    (scale(total) if scale else total).backward()
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("start", [0, 3])
def test_micro_batches_get_the_images_of_processes(monkeypatch, start):
    """With 2 processes of 3 micro-batches, as with 6 processes: the same images, positions, and groups."""
    groups = [i % 3 // 2 for i in range(20)]

    def first_batches(rank, processes, accumulate):
        monkeypatch.setattr(comm, "get_rank", lambda: rank)
        monkeypatch.setattr(comm, "get_world_size", lambda: processes)
        batches = ResumableBatches(TrainingSampler(len(groups), seed=1), groups, 2, accumulate)
        batches.start = start
        return list(itertools.islice(batches, 4))

    several = [first_batches(rank, 6, 1) for rank in range(6)]
    for rank in range(2):
        for i, found in enumerate(first_batches(rank, 2, 3)):
            assert found == [place for worker in (rank, 2 + rank, 4 + rank) for place in several[worker][i]]


def test_gradients_are_the_mean_of_those_of_micro_batches():
    """Of two equal ones, so that averages are each one's own; the losses too."""
    model = build(small_config("MODEL.META_ARCHITECTURE", "GFL"))
    inputs = batch([(96, 128)])
    losses, found = accumulated_gradients(model, inputs * 2, 2)
    alone = step(model, inputs)
    for name, loss in alone.items():
        torch.testing.assert_close(losses[name], loss)
    for name, gradient in gradients(model, alone).items():
        torch.testing.assert_close(found[name], gradient)


def test_the_gradient_scaler_scales_each_micro_batch(student):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    inputs = batch([(96, 128)] * 2)
    _, plain = accumulated_gradients(student, inputs, 2)
    plain = {name: gradient.clone() for name, gradient in plain.items()}
    del student.loss_normalizer
    _, scaled = accumulated_gradients(student, inputs, 2, scaler.scale)
    assert all(torch.allclose(scaled[name], 8 * gradient, rtol=1e-5) for name, gradient in plain.items())


def test_statistics_are_measured_once(teacher_file):
    """The pass that only collects averages moves no statistics of BatchNorm; each micro-batch moves them once."""
    model = build(distill_config(teacher_file, "MODEL.RESNETS.NORM", "BN"))
    norm = model.backbone.bottom_up.stem.conv1.norm
    accumulated_gradients(model, batch([(96, 128)] * 2), 2)
    assert norm.num_batches_tracked == 2


def test_only_what_is_averaged_runs_twice(student):
    """CrossKD's N+ needs all images, so their heads run twice; a plain RetinaNet's losses need no others."""
    runs = []
    student.head.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    trainer = SimpleTrainer(student, [batch()] * 2, torch.optim.SGD(student.parameters(), lr=0.0))
    accumulate(trainer, 2, SEED)
    trainer.train(0, 2)
    assert runs == [False, False, True, True] * 2
    runs.clear()
    student.distill.clear()
    accumulated = Accumulated(student, 2, SEED)
    for _ in range(2):
        with EventStorage():
            accumulated(batch())
    assert runs == [False, True, True, True, True]


def test_gradients_at_the_fpn_are_logged_once(teacher_file):
    student = build(distill_config(teacher_file, "MODEL.DISTILL.GRADIENT_PERIOD", "1"))
    with EventStorage() as storage:
        Accumulated(student, 2, SEED)(batch())
    logged = [history for name, history in storage.histories().items() if name.startswith(GRADIENT)]
    assert logged
    assert {len(history.values()) for history in logged} == {1}


def test_evaluation_and_other_uses_see_the_whole_batch(student):
    accumulated = Accumulated(student, 2, SEED)
    seen = []
    student.register_forward_pre_hook(lambda _m, inputs: seen.append(len(inputs[0])))
    with torch.no_grad(), EventStorage():
        accumulated(batch())
        accumulated.eval()(batch())
    assert seen == [2, 2]
    assert num_workers() == 1


def test_mistakes(teacher_file):
    with pytest.raises(
        D2kdError, match=r"4 images cannot be divided by 2 processes with 4 micro-batches.*IMS_PER_BATCH"
    ):
        check_batch(YamlRecipe(small_config("SOLVER.ACCUMULATE", "4")), 2)
    assert images_per_worker(8, 2, 4) == 1
    with pytest.raises(D2kdError, match=r"2 images cannot be divided into 3 micro-batches \(SOLVER\.ACCUMULATE\)"):
        micro_batches(batch(), 3)
    with pytest.raises(D2kdError, match="of the type dict cannot be divided"):
        micro_batches({}, 3)
    synced = build(distill_config(teacher_file, "MODEL.DISTILL.CROSSKD.SYNC", "True"))
    with pytest.raises(D2kdError, match=r"CrossKD's sync .* set sync to False, or SOLVER\.ACCUMULATE to 1"):
        Accumulated(synced, 2, SEED)
