"""The one trainer of both config styles: what a user overrides is used, and what both styles share is the same."""

import json
import logging
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, PascalVOCDetectionEvaluator
from small import CONFIGS, save_teacher, small_config

from d2kd.checkpoint import files
from d2kd.data.evaluators import build_evaluator
from d2kd.engine import Trainer, main
from d2kd.engine.styles import to_recipe
from d2kd.engine.styles.lazy_style import LazyRecipe, load_lazy, rates_in
from d2kd.errors import D2kdError
from d2kd.experiments.pictures import read_metrics

YAML = str(CONFIGS / "quick_crosskd_retinanet.yaml")
LAZY = str(CONFIGS / "lazy" / "quick_crosskd_retinanet.py")


class Count(HookBase):
    """Counts iterations, in the run's own folder."""

    def after_train(self):
        Path(self.trainer.recipe.options.output_dir, "iterations").write_text(str(self.trainer.iter))


class Boxes(DatasetEvaluator):
    """Counts images, where others would compute AP."""

    def reset(self):
        self.images = 0

    def process(self, inputs, outputs):
        self.images += len(outputs)

    def evaluate(self):
        return {"own": {"images": self.images}}


class MyTrainer(Trainer):
    """Every method that a user may override, each leaving a trace in the config's own folder."""

    @classmethod
    def trace(cls, cfg, name):
        with Path(to_recipe(cfg).options.output_dir, "trace").open("a") as file:
            file.write(f"{name}\n")

    @classmethod
    def build_model(cls, cfg):
        cls.trace(cfg, "model")
        return super().build_model(cfg)

    @classmethod
    def build_optimizer(cls, cfg, model):
        cls.trace(cfg, "optimizer")
        return super().build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer):
        cls.trace(cfg, "schedule")
        return super().build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg):
        cls.trace(cfg, "train loader")
        return super().build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        cls.trace(cfg, f"test loader {dataset_name}")
        return super().build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return Boxes()

    def build_hooks(self):
        return [*super().build_hooks(), Count()]

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        return {**super().test(cfg, model, evaluators), "mine": {"x": 1.0}}


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory, blood_cells):
    return save_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pth")


def arguments(style, teacher_file, folder, iterations=2):
    if style == "lazy":
        own = [f"model.teacher.weights={teacher_file}", f"train.output_dir={folder}", f"train.max_iter={iterations}"]
        return ["--config-file", LAZY, *own, f"train.eval_period={iterations}", "train.seed=3"]
    own = {"MODEL.DISTILL.TEACHER.WEIGHTS": teacher_file, "OUTPUT_DIR": folder, "SOLVER.MAX_ITER": iterations}
    return ["--config-file", YAML, *(str(x) for pair in own.items() for x in pair), "SEED", "3"]


@pytest.mark.slow
@pytest.mark.parametrize("style", ["yaml", "lazy"])
def test_a_subclass_runs_in_both_styles(style, teacher_file, tmp_path):
    run = tmp_path / "run"
    assert main(arguments(style, teacher_file, run), trainer=MyTrainer) == 0
    trace = (run / "trace").read_text().split("\n")[:-1]
    assert trace == ["model", "optimizer", "train loader", "schedule", "test loader blood_cells_val"]
    assert (run / "iterations").read_text() == "2"
    last = read_metrics(run)[-1]
    assert (last["own/images"], last["mine/x"]) == (4, 1)
    evaluation = ["--eval-only", *arguments(style, teacher_file, run)]
    evaluation += [
        f"train.init_checkpoint={run}/model_final.pth" if style == "lazy" else "MODEL.WEIGHTS",
        *([] if style == "lazy" else [str(run / "model_final.pth")]),
    ]
    assert main(evaluation, trainer=MyTrainer) == 0
    trace = (run / "trace").read_text().split("\n")[5:-1]
    assert trace == ["model", "test loader blood_cells_val"]


@pytest.mark.slow
def test_both_styles_write_the_same_files(teacher_file, tmp_path):
    """Predictions of the student and of its average lie in the same places."""
    written = []
    for style, average in (("yaml", ["SOLVER.EMA_DECAY", "0.9"]), ("lazy", ["train.ema_decay=0.9"])):
        run = tmp_path / style
        assert main([*arguments(style, teacher_file, run), *average]) == 0
        found = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
        written.append({name for name in found if not name.startswith(("events", "model_0"))})
    assert written[0] == written[1]
    assert "ema/inference/blood_cells_val/coco_instances_results.json" in written[0]


def test_a_script_can_use_the_trainer(teacher_file, tmp_path):
    """Without the command line; a negative seed becomes one that is known."""
    cfg = small_config("OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()")
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    assert trainer.train() == {}
    assert trainer.cfg.SEED >= 0
    assert (tmp_path / "model_final.pth").exists()


@pytest.mark.slow
def test_checkpoints_of_stock_lazy_runs_can_be_resumed(teacher_file, tmp_path):
    """Their trainer is detectron2's SimpleTrainer itself, so its state is not nested."""
    run = tmp_path / "run"
    assert main([*arguments("lazy", teacher_file, run), "train.eval_period=0"]) == 0
    path = run / "model_final.pth"
    state = files.read(str(path))
    inner = state["trainer"].pop("_trainer")
    momentum = inner["optimizer"]["state"][0]["momentum_buffer"]
    state["trainer"]["optimizer"] = inner["optimizer"]
    torch.save(state, path)
    trainer = Trainer(load_lazy(LAZY, arguments("lazy", teacher_file, run)[2:], eval_only=False).config)
    trainer.resume_or_load()
    assert trainer.start_iter == 2
    assert torch.equal(trainer.optimizer.state_dict()["state"][0]["momentum_buffer"], momentum)


@pytest.mark.slow
def test_values_of_a_lazy_config_are_checked(teacher_file, tmp_path, capfd):
    for override, message in (
        ("train.max_iter=0", "train.max_iter is 0; it must be 1 or more"),
        ("model.pixel_std=[1,2]", "model.pixel_std is [1, 2]; it must be three numbers above 0"),
        ("train.ema_decay=2", "train.ema_decay is 2; it must be at least 0 (no average) and below 1"),
        ("train.amp={enabled:true,dtype:half}", "train.amp.dtype is 'half'; use one of float16, bfloat16"),
        ("dataloader.train.total_batch_size=0", "dataloader.train.total_batch_size is 0"),
    ):
        assert main([*arguments("lazy", teacher_file, tmp_path / "run"), override]) == 2, override
        assert message in capfd.readouterr().err.strip().splitlines()[-1]


def test_mistakes_in_a_lazy_file_name_its_line(tmp_path, capfd):
    for text, message in (
        ("x = 1\ny = undefined\n", "own.py, line 2: NameError: name 'undefined' is not defined"),
        ("x = (\n", "own.py has syntax error: line 1, "),
        ("model = dict(a=1)\n", "own.py defines no train, dataloader, optimizer, lr_multiplier"),
    ):
        (tmp_path / "own.py").write_text(text)
        assert main(["--config-file", str(tmp_path / "own.py")]) == 2
        assert message in capfd.readouterr().err.strip().splitlines()[-1]


def test_the_learning_rate_rule_reads_what_a_lazy_file_builds_on(tmp_path, teacher_file):
    """The rate of the base was chosen for the batch of the base, also where a file in between changes that batch."""
    (tmp_path / "base.py").write_text("optimizer = dict(lr=0.01)\ndataloader = dict(train=dict(total_batch_size=16))\n")
    (tmp_path / "own.py").write_text("from .base import dataloader, optimizer\ndataloader.train.total_batch_size = 4\n")
    assert list(rates_in(tmp_path / "own.py")) == [(0.01, 16), (0.01, 4)]


def test_evaluators_follow_the_data_set(tmp_path):
    MetadataCatalog.get("tests_voc").set(
        evaluator_type="pascal_voc", dirname=str(tmp_path), split="val", year=2007, thing_classes=["a"]
    )
    MetadataCatalog.get("tests_odd").set(evaluator_type="cityscapes_instance")
    try:
        assert type(build_evaluator("blood_cells_val", str(tmp_path))) is COCOEvaluator
        assert type(build_evaluator("tests_voc", str(tmp_path))) is PascalVOCDetectionEvaluator
        for name in ("tests_odd", "tests_none"):
            with pytest.raises(D2kdError, match=r"set MetadataCatalog\.get"):
                build_evaluator(name, str(tmp_path))
    finally:
        for name in ("tests_voc", "tests_odd", "tests_none"):
            MetadataCatalog.pop(name)


def test_sets_that_are_not_coco_are_compared_by_their_names(tmp_path, capfd):
    DatasetCatalog.register("tests_pascal", lambda: [])
    MetadataCatalog.get("tests_pascal").set(evaluator_type="pascal_voc", thing_classes=["cat", "dog"])
    try:
        config = str(CONFIGS / "quick_retinanet.yaml")
        assert main(["--config-file", config, "OUTPUT_DIR", str(tmp_path), "DATASETS.TRAIN", "('tests_pascal',)"]) == 2
        assert "data set tests_pascal has 2 categories, but the model has 3" in capfd.readouterr().err
    finally:
        DatasetCatalog.pop("tests_pascal")
        MetadataCatalog.pop("tests_pascal")


def test_a_lazy_config_may_name_several_test_sets(blood_cells):
    recipe = load_lazy(LAZY, ["dataloader.test.dataset.names=[blood_cells_val,blood_cells_train]"], eval_only=True)
    assert list(recipe.test_sets) == ["blood_cells_val", "blood_cells_train"]
    assert [len(recipe.build_test_loader(name).dataset) for name in recipe.test_sets] == [4, 12]
    assert isinstance(recipe.build_evaluator("blood_cells_train"), COCOEvaluator)
    assert isinstance(LazyRecipe(recipe.config).with_seed(7).options.seed, int)


@pytest.mark.slow
def test_a_run_logs_each_line_once_and_leaves_the_loggers_as_they_were(teacher_file, tmp_path, capfd):
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "d2kd")]
    before = [(x.level, x.propagate, list(x.handlers)) for x in loggers]
    assert main([*arguments("yaml", teacher_file, tmp_path), "DATASETS.TEST", "()"]) == 0
    assert [(x.level, x.propagate, list(x.handlers)) for x in loggers] == before
    for text in (capfd.readouterr().out, (tmp_path / "log.txt").read_text()):
        assert text.count("Starting training from iteration 0") == 1
    assert json.loads((tmp_path / "run.json").read_text())["SEED"] == 3
