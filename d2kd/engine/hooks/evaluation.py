"""Evaluations of a run, which SIGTERM may break off."""

from typing import Any, Callable, Dict

from detectron2.engine import hooks

from .saving import Saving


class Evaluation(hooks.EvalHook):
    """Evaluates periodically and at the end. What SIGTERM breaks off, the resumed run does again.

    Args:
        period: iterations between evaluations; 0 for the one at the end alone.
        evaluate: returns results.
        saving: saves the run if it is stopped meanwhile.
    """

    def __init__(self, period: int, evaluate: Callable[[], Dict[str, Any]], saving: Saving) -> None:
        def guarded() -> Dict[str, Any]:
            with saving.evaluating():
                return evaluate()

        super().__init__(period, guarded)
        self._saving = saving

    def before_train(self) -> None:
        if self._saving.evaluation_is_missing:
            self._set_iteration(self.trainer.start_iter - 1)
            self.after_step()
            self._set_iteration(self.trainer.start_iter)

    def _set_iteration(self, iteration: int) -> None:
        self.trainer.iter = self.trainer.storage.iter = iteration
