"""How the weight of a method changes during training."""

from typing import Any, NamedTuple

from ..errors import D2kdError


class Schedule(NamedTuple):
    """A factor on all losses of a method, as a function of the iteration.

    Attributes:
        warmup: number of iterations over which the factor grows linearly from 0 to 1; 0 means it starts at 1.
        decay: iteration at which the factor starts to fall linearly to 0 at ``end``; 0 keeps it at 1 until ``end``.
        end: iteration from which on the factor is 0; 0 means never.
    """

    warmup: int = 0
    decay: int = 0
    end: int = 0

    @classmethod
    def from_node(cls, node: Any) -> "Schedule":
        """Creates a schedule from a config node with the same keys in upper case.

        Raises:
            D2kdError: the decay does not start before the end, or there is no end.
        """
        schedule = cls(**{key.lower(): value for key, value in node.items()})
        if schedule.decay and schedule.decay >= schedule.end:
            raise D2kdError(
                f"MODEL.DISTILL.SCHEDULE: DECAY {schedule.decay} must be before END {schedule.end}; set both"
            )
        return schedule

    def weight(self, iteration: int) -> float:
        """Returns the factor at an iteration, 0 to 1."""
        if self.end and iteration >= self.end:
            return 0.0
        falling = (self.end - iteration) / (self.end - self.decay) if self.decay and iteration > self.decay else 1.0
        rising = min((iteration + 1) / self.warmup, 1.0) if self.warmup else 1.0
        return rising * falling
