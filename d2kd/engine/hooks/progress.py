"""The bar of a training on a terminal."""

from typing import Any, Optional

from detectron2.engine import HookBase
from tqdm import tqdm

from ...progress import on_terminal, progress_bar

# Iterations over whose losses the median is taken, as in detectron2's lines.
WINDOW = 20


class Progress(HookBase):
    """Shows iterations, remaining time, loss and the last AP, on a terminal only. Register it before evaluations."""

    def __init__(self) -> None:
        self._bar: Optional[tqdm[Any]] = None

    def after_step(self) -> None:
        if not on_terminal():
            return
        done, numbers = self.trainer.iter + 1, self._numbers()
        if self._bar is None:
            self._bar = progress_bar(desc="training", initial=done, total=self.trainer.max_iter, postfix=numbers)
        else:
            self._bar.set_postfix_str(numbers, refresh=False)
            self._bar.update()

    def _numbers(self) -> str:
        histories = self.trainer.storage.histories()
        found = [f"loss {histories['total_loss'].median(WINDOW):.3g}"] if "total_loss" in histories else []
        found += [f"AP {value.latest():.1f}" for key, value in histories.items() if key.endswith("bbox/AP")]
        return ", ".join(found)

    def after_train(self) -> None:
        """Removes the bar."""
        self.hide()

    def hide(self) -> None:
        """Removes the bar until the next step: COCO's evaluation prints to the terminal."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
