"""What train_net.py calls: trainers for both config styles, checks before a run, and launching."""

from .main import main
from .trainer import Trainer

__all__ = ["Trainer", "main"]
