"""What d2kd's trainer adds to detectron2's hooks: exact repetition, saving, EMA, non-finite losses, bad images."""

from .ema import EMA
from .reproducible import Reproducible
from .saving import EXIT_PREEMPTED, Preempted, Saving
from .watch import Watch

__all__ = ["EMA", "EXIT_PREEMPTED", "Preempted", "Reproducible", "Saving", "Watch"]
