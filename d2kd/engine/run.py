"""One run in one process: training, evaluating, or looking at one batch. The same for both config styles."""

from typing import Any, Dict, List, Type

from ..checkpoint import load_strict
from ..checkpoint.run_checkpoints import RunCheckpointer
from ..diagnose.dry_run import dry_run as describe
from ..errors import D2kdError
from ..export import evaluation_size_of
from .accumulate import micro_batches
from .estimate import ONE_PROCESS, Processes, measure_training, training_table
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


def dry_run(recipe: Recipe, trainer: Type[Trainer] = Trainer, processes: Processes = ONE_PROCESS) -> str:
    """Describes what training does with one batch and what it takes, and trains nothing.

    Args:
        recipe: of the run.
        trainer: its methods make model and loaders.
        processes: that the run would have; here there is one, which sees its part of a batch.

    Returns:
        What :func:`d2kd.diagnose.dry_run.dry_run` says, and a table of time and memory.

    Raises:
        D2kdError: something in the config, data or files is wrong.
    """
    recipe = recipe.for_workers(processes.total).with_seed(0)
    model = trainer.build_model(recipe.config)
    RunCheckpointer(model, save_to_disk=False).load(recipe.options.weights)
    batches = iter(trainer.build_train_loader(processes.part(recipe).config))
    batch = micro_batches(next(batches), recipe.options.accumulate)[0]
    text = describe(model.train(), batch, evaluation_size_of(recipe.config))
    try:
        measured = measure_training(recipe, model, batches)
    except FloatingPointError:
        return f"{text}\n\nwarning: a loss is not finite, so that nothing can be trained or measured"
    loaders: List[Any] = [trainer.build_test_loader(recipe.config, name) for name in recipe.test_sets]
    images = sum(len(getattr(loader, "dataset", loader)) for loader in loaders)
    return f"{text}\n\n{training_table(recipe, measured, images, processes)}"
