"""What several processes agree on in a step, and what each seeds, without starting any."""

import os
import random
import signal

import numpy as np
import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from torch import nn

from d2kd.data.randomness import seed_all, seeded
from d2kd.engine.hooks import Watch
from d2kd.engine.launch import once_per_machine
from d2kd.errors import D2kdError


class Model(nn.Module):
    """Its loss is its weight."""

    def __init__(self, weight=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, _):
        return {"loss": self.weight * 1.0, "other": self.weight * 2.0}


def trainer(weight=1.0):
    model = Model(weight)
    batches = [[{"image_id": 7, "file_name": "a.png"}]] * 9
    return SimpleTrainer(model, batches, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.fixture
def two_processes(monkeypatch):
    """Makes this process the first of two; the other reports ``flags``. Returns what was sent in each step."""
    sent, flags = [], [0.0, 0.0]

    def all_reduce(tensor, op):
        assert op == torch.distributed.ReduceOp.MAX
        sent.append(tensor.numel() * tensor.element_size())
        tensor.copy_(torch.maximum(tensor, torch.tensor(flags)))

    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(SimpleTrainer, "_write_metrics", lambda *_: None)
    monkeypatch.setattr(comm, "all_gather", lambda found: sent.append("gather") or [found, "the other's loss is nan"])
    return sent, flags


def test_a_step_sends_eight_bytes_and_nothing_pickled(two_processes):
    sent, _ = two_processes
    running = trainer()
    with Watch(running) as watch:
        running.train(0, 3)
    assert sent == [8, 8, 8]
    assert not watch.stop


def test_sigterm_of_another_process_stops_this_one(two_processes):
    two_processes[1][1] = 1.0
    running = trainer()
    with Watch(running) as watch:
        running.train(0, 1)
    assert watch.stop


def test_own_sigterm_waits_for_the_next_reduction(two_processes):
    running = trainer()
    with Watch(running) as watch:
        os.kill(os.getpid(), signal.SIGTERM)
        assert not watch.stop
        running.train(0, 1)
    assert watch.stop


def test_alone_sigterm_is_known_at_once():
    before, running = signal.getsignal(signal.SIGTERM), trainer()
    with Watch(running) as watch:
        os.kill(os.getpid(), signal.SIGTERM)
        assert watch.stop
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_loss_of_another_process_ends_this_one_before_the_update(two_processes):
    sent, flags = two_processes
    flags[0] = 1.0
    running = trainer()
    with (
        Watch(running),
        pytest.raises(D2kdError, match=r"iteration 0: the other's loss is nan; lower"),
    ):
        running.train(0, 1)
    assert running.model.weight.item() == 1.0
    assert sent == [8, "gather"]


def test_a_loss_that_is_not_finite_names_itself_and_the_image(monkeypatch):
    monkeypatch.setattr(SimpleTrainer, "_write_metrics", lambda *_: None)
    running = trainer(float("inf"))
    with Watch(running), pytest.raises(D2kdError, match=r"loss is inf, other is inf on images 7 \(a\.png\)"):
        running.train(0, 1)
    assert not running.model._forward_hooks


def test_one_process_of_each_machine_checks(monkeypatch):
    """The second process of the second of two machines learns what the first there has found."""
    monkeypatch.setattr(comm, "get_rank", lambda: 3)
    monkeypatch.setattr(comm, "get_local_rank", lambda: 1)
    found = ["here", None, "there", None]
    monkeypatch.setattr(comm, "all_gather", lambda own: found)
    assert once_per_machine(lambda: pytest.fail("it checked, too")) == "there"
    found[0] = D2kdError("set KEY to 3")
    with pytest.raises(D2kdError, match="set KEY to 3"):
        once_per_machine(lambda: None)
    monkeypatch.setattr(comm, "get_local_rank", lambda: 0)
    monkeypatch.setattr(comm, "all_gather", lambda own: [own])
    monkeypatch.setattr(comm, "get_rank", lambda: 0)
    assert once_per_machine(lambda: "mine") == "mine"


def test_a_seeded_block_leaves_everything_else_as_it_was(monkeypatch):
    """Also CUDA's generators, from which a model on a GPU draws, and the environment."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("CUDA was seeded"))
    environment = dict(os.environ)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    with seeded(1, 2):
        drawn = torch.rand(1).item(), np.random.rand(), random.random()
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(states[0], after[0])
    assert states[1:] == after[1:]
    assert dict(os.environ) == environment
    with seeded(1, 2):
        assert (torch.rand(1).item(), np.random.rand(), random.random()) == drawn


def test_an_iteration_seeds_cuda_where_it_is_in_use(monkeypatch):
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    for in_use in (False, True):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda in_use=in_use: in_use)
        seed_all(3, 1, 4)
    assert seeds == [torch.initial_seed()]
