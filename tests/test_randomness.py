"""Random numbers of samples: those of a seed, whatever was drawn before, and without a trace afterwards."""

import random

import numpy as np
import pytest
import torch

from d2kd.data.randomness import _seed_cpu, seeded


def drawn():
    numbers = [random.random(), *np.random.rand(3), np.random.randint(1000), *np.random.randn(2)]
    return [*numbers, *np.random.permutation(5), *torch.rand(3).tolist(), torch.randint(1000, ()).item()]


def test_the_numbers_are_those_of_the_seed():
    """Of numpy's and Python's own ``seed``, as ever: resumed runs and published seeds depend on it."""
    with seeded(5, 0, 7):
        found = drawn()
    seed = int(np.random.SeedSequence((5, 0, 7)).generate_state(1)[0])
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    assert found == drawn()
    with seeded(5, 0, 8):
        assert found != drawn()


def test_what_comes_afterwards_is_as_if_nothing_had_been_drawn():
    _seed_cpu(3)
    drawn()
    expected = drawn()
    _seed_cpu(3)
    drawn()
    with seeded(1):
        one = drawn()
        with seeded(2):  # a data set made of another
            two = drawn()
        rest = drawn()
    with pytest.raises(ZeroDivisionError), seeded(2):
        raise ZeroDivisionError
    with seeded(2):
        assert drawn() == two
    assert drawn() == expected
    with seeded(1):
        assert [drawn(), drawn()] == [one, rest]
