"""train_net.py as users run it: both config styles, one and two processes, evaluating, mistakes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import CONFIGS, build, distill_config, save_teacher

from d2kd.engine import main
from d2kd.experiments.pictures import read_metrics

ROOT = CONFIGS.parent
QUICK = str(CONFIGS / "quick_crosskd_retinanet.yaml")
LAZY = str(CONFIGS / "lazy" / "quick_crosskd_retinanet.py")
SAME_FOR_ANY_WORKERS = ["MODEL.DISTILL.SYNC_NORMALIZER", "True", "MODEL.DISTILL.CROSSKD.SYNC", "True"]
SAME_FOR_ANY_WORKERS += ["SEED", "3", "TEST.EVAL_PERIOD", "0", "DATASETS.TEST", "()"]


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory, blood_cells):
    return save_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pth")


def overrides(teacher_file, output, *more):
    return ["MODEL.DISTILL.TEACHER.WEIGHTS", str(teacher_file), "OUTPUT_DIR", str(output), *map(str, more)]


def train_net(*args, **options):
    """Runs the script in a process of its own."""
    command = [sys.executable, str(ROOT / "train_net.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, **options)


def weights(folder):
    return torch.load(folder / "model_final.pth")["model"]


@pytest.mark.slow
def test_train_then_evaluate_without_the_teacher(teacher_file, tmp_path, capsys):
    """Trains, deletes the teacher, and gets the same AP from the distilled and from the plain config."""
    own_teacher = tmp_path / "teacher.pth"
    own_teacher.write_bytes(teacher_file.read_bytes())
    run = tmp_path / "run"
    every_box = ["MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"]
    assert main(["--config-file", QUICK, *overrides(own_teacher, run, *every_box)]) == 0
    written = set().union(*read_metrics(run))
    assert {"loss_cls", "loss_box_reg", "loss_crosskd_cls", "loss_crosskd_box", "bbox/AP"} <= written
    state = weights(run)
    assert not any("teacher" in key for key in state)
    assert list(run.glob("events.out.tfevents*"))
    own_teacher.unlink()
    evaluation = ["--eval-only", "MODEL.WEIGHTS", str(run / "model_final.pth"), *every_box]
    results = []
    for config, more in (
        (QUICK, overrides(own_teacher, tmp_path / "eval")),
        (str(CONFIGS / "quick_retinanet.yaml"), []),
    ):
        output = tmp_path / Path(config).stem
        assert main(["--config-file", config, *evaluation, *more, "OUTPUT_DIR", str(output)]) == 0
        results.append((output / "inference" / "blood_cells_val" / "coco_instances_results.json").read_text())
    assert results[0] == results[1]
    assert len(json.loads(results[0])) > 0


@pytest.mark.slow
def test_two_processes_equal_one(teacher_file, tmp_path):
    """The same total batch on one and on two workers: equal losses in each iteration, equal weights at the end."""
    runs = []
    for workers in (1, 2):
        run = tmp_path / str(workers)
        args = overrides(teacher_file, run, *SAME_FOR_ANY_WORKERS)
        done = train_net("--config-file", QUICK, "--num-gpus", workers, "--dist-url", "auto", *args)
        assert done.returncode == 0, done.stderr[-3000:]
        runs.append(run)
    records = [read_metrics(run)[-1] for run in runs]
    for key in ("total_loss", "loss_cls", "loss_box_reg", "loss_crosskd_cls", "loss_crosskd_box"):
        assert records[0][key] == pytest.approx(records[1][key], rel=1e-5), key
    one, two = (weights(run) for run in runs)
    start = build(distill_config(teacher_file), seed=0).state_dict()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
    assert start.keys() == one.keys()


@pytest.mark.slow
def test_lazy_run_with_overrides(teacher_file, tmp_path, capsys):
    args = ["model.methods.0.cut=2", "train.max_iter=2", f"model.teacher.weights={teacher_file}"]
    assert main(["--config-file", LAZY, *args, f"train.output_dir={tmp_path}"]) == 0
    records = read_metrics(tmp_path)
    assert records[-1]["iteration"] <= 2
    assert "loss_crosskd_cls" in set().union(*records)
    evaluation = [f"train.init_checkpoint={tmp_path}/model_final.pth", "model.teacher.weights=gone.pth"]
    assert main(["--config-file", LAZY, "--eval-only", *evaluation, f"train.output_dir={tmp_path}"]) == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "name a config"),
        (["--config-file", "gone.yaml"], r"gone\.yaml"),
        (["--config-file", QUICK, "SOLVER.MAX_ITERS", "3"], r"did you mean SOLVER\.MAX_ITER\?"),
        (["--config-file", QUICK, "DATASETS.TRAIN", "('blood_cell_train',)"], "did you mean blood_cells_train"),
        (["--config-file", QUICK, "MODEL.RETINANET.NUM_CLASSES", "4"], "3 categories"),
        (["--config-file", QUICK, "MODEL.WEIGHTS", "gone.pth"], r"MODEL\.WEIGHTS: there is no file gone\.pth"),
        (["--config-file", QUICK, "SOLVER.OPTIMIZER", "AdmW", "MODEL.DISTILL.METHODS", "()"], "did you mean AdamW"),
        (["--config-file", QUICK, "--eval-only"], "--eval-only needs weights"),
        (["--config-file", QUICK, "MODEL.DISTILL.TEACHER.WEIGHTS", "gone.pth"], r"gone\.pth"),
        (["--config-file", LAZY, "train.max_iters=3"], "did you mean max_iter"),
        (["--config-file", LAZY, "--eval-only"], "--eval-only needs weights"),
    ],
)
def test_mistakes_end_with_one_sentence(blood_cells, tmp_path, capfd, args, message):
    output = ([f"train.output_dir={tmp_path}"] if LAZY in args else ["OUTPUT_DIR", str(tmp_path)]) if args else []
    assert main([*args, *output]) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert re.search(message, error), error
    assert not list(tmp_path.glob("model_*.pth"))
