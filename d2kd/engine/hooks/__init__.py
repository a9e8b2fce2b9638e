"""What d2kd's trainer adds to detectron2's hooks: exact repetition, saving, EMA, bar, finite losses, metrics."""

from .ema import EMA
from .evaluation import Evaluation
from .progress import Progress
from .reproducible import Reproducible
from .saving import Saving
from .watch import EXIT_PREEMPTED, Preempted, Watch
from .writing import Writing

__all__ = ["EMA", "EXIT_PREEMPTED", "Evaluation", "Preempted", "Progress", "Reproducible", "Saving", "Watch", "Writing"]
