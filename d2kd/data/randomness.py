"""Seeds for each sample and each iteration, so that no random state has to be saved."""

import random
from contextlib import contextmanager
from typing import Iterator

import numpy as np
import torch
from detectron2.utils.env import seed_all_rng

# Second number of each seed, so that samples and iterations draw from different streams.
SAMPLES, ITERATIONS = 0, 1


def seed_all(*numbers: int) -> None:
    """Seeds torch (all devices), numpy and Python from several non-negative integers."""
    seed_all_rng(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Calls :func:`seed_all`, and puts the states of numpy, Python and torch's CPU generator back afterwards."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    seed_all(*numbers)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
