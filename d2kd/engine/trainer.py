"""The trainer of both config styles: detectron2's DefaultTrainer with parts that a :class:`Recipe` makes."""

import logging
import weakref
from collections import OrderedDict
from typing import Any, Dict, Iterable, List, Optional, Sequence, Union

import torch
from detectron2.engine import DefaultTrainer, HookBase, SimpleTrainer, TrainerBase, default_writers, hooks
from detectron2.evaluation import (
    DatasetEvaluator,
    inference_on_dataset,
    print_csv_format,
    verify_results,
)
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from ..checkpoint.run_checkpoints import RunCheckpointer
from ..data.bad_images import BadImages
from ..diagnose.preflight import check_teacher
from ..errors import D2kdError, known_mistakes
from ..progress import progress_bar
from .accumulate import accumulate
from .devices import wrap_ddp
from .hooks import EMA, Evaluation, Progress, Reproducible, Saving, Watch, Writing
from .precision import amp_trainer, with_scaler_state
from .recipe import Config, RunOptions
from .styles import to_recipe


def make_loop(
    options: RunOptions, model: nn.Module, loader: Iterable[Any], optimizer: torch.optim.Optimizer
) -> SimpleTrainer:
    """Makes what runs the steps of a training, in the precision and with the micro-batches that the options ask for."""
    loop = (
        amp_trainer(model, loader, optimizer, options.amp_dtype)
        if options.amp
        else SimpleTrainer(model, loader, optimizer)
    )
    if options.accumulate > 1:
        accumulate(loop, options.accumulate, options.seed)
    return loop


class Trainer(DefaultTrainer):
    """Trains teachers, plain baselines and students alike; a resumed run ends with the weights of an unbroken one.

    Override its methods as those of any :class:`DefaultTrainer`, and pass the class to :func:`d2kd.engine.main`. Each
    gets the user's config, of either style.

    Args:
        cfg: a ``CfgNode`` with d2kd's keys, or a LazyConfig. A negative seed stands for a random one.
    """

    iter: int

    def __init__(self, cfg: Config) -> None:
        # DefaultTrainer's own constructor leaves no choice of DDP on the CPU, checkpointer and precision.
        TrainerBase.__init__(self)
        self.recipe = to_recipe(cfg).for_workers(comm.get_world_size()).with_seed()
        self.cfg = cfg = self.recipe.config
        options = self.recipe.options
        # In this order, as in DefaultTrainer: each draws random numbers.
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        model = wrap_ddp(model, **self.recipe.ddp_options)
        self._trainer = make_loop(options, model, loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = RunCheckpointer(model, options.output_dir, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = options.max_iter
        self.watch = Watch(self._trainer)
        self.progress = Progress()
        self.results: Dict[str, Any] = {}
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """Resumes from the newest checkpoint in the run's folder, if there is one and ``resume``; else loads weights.

        Raises:
            D2kdError: no checkpoint can be read, or it does not fit the model.
        """
        self.checkpointer.resume_or_load(self.recipe.options.weights, resume=resume)
        if resume and self.checkpointer.has_checkpoint():
            self.start_iter = self.iter + 1

    def train(self) -> Dict[str, Any]:
        """Loads the teacher, checks it if training starts from the beginning, then trains.

        Returns:
            The last evaluation's results; empty if there was none.
        """
        options = self.recipe.options
        num_images = options.preflight if self.start_iter == 0 else 0
        amp_dtype = options.amp_dtype if options.amp else ""
        check_teacher(self.checkpointer.model, self.data_loader, num_images, amp_dtype)
        with self.watch:
            TrainerBase.train(self, self.start_iter, self.max_iter)
        if self.recipe.get("TEST.EXPECTED_RESULTS") and comm.is_main_process():
            verify_results(self.cfg, self.results)
        return self.results

    def run_step(self) -> None:
        """Runs an iteration.

        Raises:
            D2kdError: a loss is not finite, or another mistake shows in it.
        """
        try:
            with known_mistakes():
                super().run_step()
        except Exception as error:
            self.watch.explain(error)
            raise

    def after_train(self) -> None:
        self.iter = min(self.iter, self.max_iter)  # detectron2 counts one more where a finished run is resumed
        super().after_train()

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Loads the state of a checkpoint; those of stock LazyConfig runs hold the inner trainer's alone.

        Raises:
            D2kdError: it holds the state of another optimizer.
        """
        state = {"_trainer": state_dict, **state_dict}
        settings = [{**group} for group in self._trainer.optimizer.param_groups]
        self._check_optimizer(settings, state["_trainer"]["optimizer"]["param_groups"])
        super().load_state_dict({**state, "_trainer": with_scaler_state(self._trainer, state["_trainer"])})
        self._keep_settings(settings)

    def _check_optimizer(self, own: List[Dict[str, Any]], saved: List[Dict[str, Any]]) -> None:
        same = [len(group["params"]) for group in own] == [len(group["params"]) for group in saved]
        for one, other in zip(own, saved):  # versions of torch only add keys, or only drop them
            same = same and (one.keys() <= other.keys() or one.keys() >= other.keys())
        if not same:
            raise D2kdError(
                "the checkpoint holds the state of another optimizer, or of other weights: keep the optimizer as it "
                f"was, or start a new run with {self.recipe.key('MODEL.WEIGHTS')} set to the checkpoint"
            )

    def _keep_settings(self, settings: List[Dict[str, Any]]) -> None:
        """Puts back what the config sets, such as a learning rate that has changed; checkpoints hold these too."""
        groups = self._trainer.optimizer.param_groups
        for group, own in zip(groups, settings):
            group.update({key: value for key, value in own.items() if key not in ("params", "lr")})
        base_rates = [group.get("initial_lr", group["lr"]) for group in groups]
        if base_rates != self.scheduler.base_lrs:
            self.scheduler.base_lrs = base_rates
            for group, rate in zip(groups, self.scheduler.get_lr()):
                group["lr"] = rate

    def build_hooks(self) -> List[HookBase]:
        """Makes detectron2's hooks and d2kd's, in the order in which they run."""
        options, loader = self.recipe.options, self.data_loader
        built: List[HookBase] = [hooks.IterationTimer(), hooks.LRScheduler()]
        if options.precise_bn and get_bn_modules(self.model):
            own_loader = self.build_train_loader(self.recipe.changed("DATALOADER.NUM_WORKERS", 0).config)
            built.append(hooks.PreciseBN(options.eval_period, self.model, own_loader, options.precise_bn_iterations))
        built.append(Reproducible(loader, options.seed))
        ema = EMA(self.checkpointer.model, options.ema_decay, options.output_dir) if options.ema_decay else None
        built += [ema] if ema else []
        built += [BadImages()] if getattr(getattr(loader, "dataset", None), "skip_bad_images", False) else []
        saving = Saving(self.checkpointer, self.watch, options.checkpoint_period, options.max_to_keep)
        built += [self.progress, saving, Evaluation(options.eval_period, self._evaluate, saving)]
        if ema:
            average = ema.average
            built.append(Evaluation(options.eval_period, lambda: {"ema": self._evaluate_average(average)}, saving))
        if comm.is_main_process():
            built.append(Writing(self.build_writers(), options.log_period, options.output_dir))
        return built

    def _evaluate(self) -> Dict[str, Any]:
        self.progress.hide()
        self.results = self.test(self.cfg, self.model)
        return self.results

    def _evaluate_average(self, average: nn.Module) -> Dict[str, Any]:
        """Evaluates the EMA; its predictions go into a folder of their own."""
        self.progress.hide()
        return self.test(self.recipe.changed("OUTPUT_DIR", f"{self.recipe.options.output_dir}/ema").config, average)

    def build_writers(self) -> List[EventWriter]:
        """Makes detectron2's default writers."""
        return default_writers(self.recipe.options.output_dir, self.max_iter)

    @classmethod
    def build_model(cls, cfg: Config) -> nn.Module:
        """Makes the model."""
        model = to_recipe(cfg).build_model()
        logging.getLogger(__name__).info("Model:\n%s", model)
        return model

    @classmethod
    def build_optimizer(cls, cfg: Config, model: nn.Module) -> torch.optim.Optimizer:
        """Makes the optimizer of a model."""
        return to_recipe(cfg).build_optimizer(model)

    @classmethod
    def build_lr_scheduler(cls, cfg: Config, optimizer: torch.optim.Optimizer) -> LRScheduler:
        """Makes the learning-rate schedule of an optimizer."""
        return to_recipe(cfg).build_lr_scheduler(optimizer)

    @classmethod
    def build_train_loader(cls, cfg: Config) -> Iterable[Any]:
        """Makes the loader of training batches."""
        return to_recipe(cfg).build_train_loader()

    @classmethod
    def build_test_loader(cls, cfg: Config, dataset_name: str) -> Iterable[Any]:
        """Makes the loader of a data set for evaluation."""
        return to_recipe(cfg).build_test_loader(dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: Config, dataset_name: str) -> DatasetEvaluator:
        """Makes the evaluator of a data set: what a LazyConfig names, or the one of its ``evaluator_type``."""
        return to_recipe(cfg).build_evaluator(dataset_name)

    @classmethod
    def test(
        cls,
        cfg: Config,
        model: nn.Module,
        evaluators: Optional[Union[DatasetEvaluator, Sequence[DatasetEvaluator]]] = None,
    ) -> Dict[str, Any]:
        """Evaluates a model on all test sets.

        Args:
            cfg: of either style.
            model: with its weights.
            evaluators: one for each test set; by default those of :meth:`build_evaluator`.

        Returns:
            The results of the test set, or of each by its name if there are several.
        """
        names = to_recipe(cfg).test_sets
        given = [evaluators] if isinstance(evaluators, DatasetEvaluator) else evaluators
        results: Dict[str, Any] = OrderedDict()
        for i, name in enumerate(names):
            evaluator = given[i] if given is not None else cls.build_evaluator(cfg, name)
            loader = progress_bar(cls.build_test_loader(cfg, name), desc=f"evaluating on {name}", unit="batch")
            results[name] = inference_on_dataset(model, loader, evaluator)
            if comm.is_main_process():
                logging.getLogger(__name__).info("Evaluation results for %s in csv format:", name)
                print_csv_format(results[name])
        return results[names[0]] if len(names) == 1 else results
