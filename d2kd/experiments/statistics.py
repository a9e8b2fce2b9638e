"""Means over seeds and paired differences, with the uncertainty of few measurements."""

from statistics import mean, stdev
from typing import NamedTuple, Sequence

#: 97.5 % quantiles of Student's t distribution, for 1 degree of freedom and more.
T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)
T_OF_MANY = 2.086  # of 20: a little too wide for more


class Difference(NamedTuple):
    """A paired difference.

    Attributes:
        mean: over pairs.
        half_width: of its 95 % confidence interval; infinite for a single pair.
    """

    mean: float
    half_width: float

    def __str__(self) -> str:
        if self.half_width == float("inf"):
            return f"{self.mean:+.1f}"
        return f"{self.mean:+.1f} [{self.mean - self.half_width:+.1f}, {self.mean + self.half_width:+.1f}]"


def paired_difference(values: Sequence[float], others: Sequence[float]) -> Difference:
    """Mean of the differences between paired values, with the interval of Student's t distribution.

    Args:
        values: one for each seed.
        others: what to compare with, of the same seeds.
    """
    differences = [value - other for value, other in zip(values, others)]
    if len(differences) == 1:
        return Difference(differences[0], float("inf"))
    freedom = len(differences) - 1
    quantile = T_QUANTILES[freedom - 1] if freedom <= len(T_QUANTILES) else T_OF_MANY
    return Difference(mean(differences), quantile * stdev(differences) / len(differences) ** 0.5)
