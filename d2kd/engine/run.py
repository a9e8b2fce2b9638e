"""One run in one process: training, evaluating, or looking at one batch. The same for both config styles."""

from typing import Any, Dict, Type

from ..checkpoint import load_strict
from ..checkpoint.run_checkpoints import RunCheckpointer
from ..diagnose.dry_run import dry_run as describe
from ..errors import D2kdError
from .accumulate import micro_batches
from .recipe import Recipe
from .trainer import Trainer
from .values import warn_of_learning_rate


def train(recipe: Recipe, trainer: Type[Trainer] = Trainer, resume: bool = False) -> Dict[str, Any]:
    """Trains a model.

    Args:
        recipe: of the run.
        trainer: runs it.
        resume: continue from the newest checkpoint in the run's folder, if there is one.

    Returns:
        Results of the last evaluation.

    Raises:
        D2kdError: something in the config, data or files is wrong.
    """
    warn_of_learning_rate(recipe.rates(), recipe.key("SOLVER.BASE_LR"))
    running = trainer(recipe.config)
    running.resume_or_load(resume=resume)
    return running.train()


def evaluate(recipe: Recipe, trainer: Type[Trainer] = Trainer, resume: bool = False) -> Dict[str, Any]:
    """Evaluates the weights that the config names.

    Args:
        recipe: of the run.
        trainer: its methods make model, loaders and evaluators.
        resume: evaluate the newest checkpoint in the run's folder instead, if there is one.

    Returns:
        Results of the evaluation.

    Raises:
        D2kdError: there are no weights, or they do not fit.
    """
    model = trainer.build_model(recipe.config)
    saved = RunCheckpointer(model, recipe.options.output_dir).newest_readable() if resume else ""
    weights = saved or recipe.options.weights
    if not weights:
        override = "train.init_checkpoint=<file>" if recipe.is_lazy else "MODEL.WEIGHTS <file>"
        raise D2kdError(
            f"--eval-only needs weights: append {override}, or use --resume with {recipe.key('OUTPUT_DIR')} of a run"
        )
    load_strict(model, weights)
    return trainer.test(recipe.config, model)


def dry_run(recipe: Recipe, trainer: Type[Trainer] = Trainer) -> str:
    """Describes what training does with one batch, and trains nothing; see :func:`d2kd.diagnose.dry_run.dry_run`."""
    recipe = recipe.with_seed(0)
    model = trainer.build_model(recipe.config)
    RunCheckpointer(model, save_to_disk=False).load(recipe.options.weights)
    batch = next(iter(trainer.build_train_loader(recipe.config)))
    return describe(model.train(), micro_batches(batch, recipe.options.accumulate)[0])
