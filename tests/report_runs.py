"""Folders of runs as training writes them, made without training."""

import json
import math
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import torch
from detectron2.config import CfgNode
from small import build, distill_config, small_config

from d2kd.engine.recipe import flatten

FINAL = {"teacher": 40.0, "student": 27.0, "crosskd": 33.0}
ITERATIONS = 200


def make_runs(folder: Path, data: Path) -> Path:
    """A teacher, two seeds of a plain student, and a distilled student; numbers are made up.

    Args:
        folder: where the runs are written.
        data: folder of the blood cells, from the fixture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    teacher = small_config("MODEL.RESNETS.STEM_OUT_CHANNELS", 8)
    _write(folder / "teacher", teacher, data, "teacher", 0)
    for seed in (1, 2):
        _write(folder / f"student_seed{seed}", small_config("SEED", seed), data, "student", seed)
    opts = ["MODEL.RESNETS.STEM_OUT_CHANNELS", "8"]
    file = folder / "teacher" / "model_final.pth"
    distilled = distill_config(file, "SEED", 1, methods=("CrossKD", "PKD"), teacher_opts=opts)
    _write(folder / "crosskd_seed1", distilled, data, "crosskd", 1)
    return folder


def _write(run: Path, cfg: CfgNode, data: Path, kind: str, seed: int) -> None:
    results = run / "inference" / "blood_cells_val"
    results.mkdir(parents=True)
    (run / "config.yaml").write_text(cfg.dump())
    (run / "run.json").write_text(json.dumps(flatten(cfg)))
    (run / "commands.txt").write_text(
        f"cd /d2kd && python train_net.py --config-file configs/{kind}.yaml  # 2026-01-01 12:00:00\n"
    )
    model = build(cfg, seed)
    with torch.no_grad():  # away from the prior, so that scores differ from place to place
        model.head.cls_score.weight.normal_(std=0.3)
    torch.save({"model": model.state_dict()}, run / "model_final.pth")
    rng = np.random.default_rng([seed, len(kind)])
    (run / "metrics.json").write_text("".join(json.dumps(record) + "\n" for record in _metrics(kind, rng)))
    (results / "coco_instances_results.json").write_text(json.dumps(_detections(data, rng)))


def _metrics(kind: str, rng: np.random.Generator) -> List[Dict[str, Any]]:
    records: List[Dict[str, Any]] = []
    for iteration in range(19, ITERATIONS, 20):
        fall = math.exp(-iteration / 70) * (1 + rng.normal(0, 0.05))
        losses = {"loss_cls": 0.2 + 1.5 * fall, "loss_box_reg": 0.2 + 0.8 * fall}
        if kind == "crosskd":
            losses.update(loss_crosskd_cls=1.4 * fall, loss_crosskd_box=0.3 + fall, loss_pkd_feature=6 * fall + 0.5)
            pulls = {name: rng.uniform(0.2, 2) for name in ("loss_cls", "loss_box_reg", "loss_crosskd_cls", "crosskd")}
            records.append({"iteration": iteration, **{f"gradient/{name}": pull for name, pull in pulls.items()}})
        time = 0.15 if kind == "student" else 0.25
        records.append({"iteration": iteration, "time": time, "total_loss": sum(losses.values()), **losses})
    for step in range(1, 5):
        ap = FINAL[kind] * step / 4 + rng.normal(0, 0.5)
        parts = {"AP": ap, "AP50": ap * 1.6, "AP75": ap * 0.9, "APs": ap * 0.6, "APm": ap * 1.1, "APl": math.nan}
        parts.update({"AP-RBC": ap * 1.2, "AP-WBC": ap * 1.4, "AP-Platelets": ap * 0.4})
        iteration = ITERATIONS * step // 4 - (step < 4)  # as detectron2 counts
        records.append({"iteration": iteration, **{f"bbox/{name}": value for name, value in parts.items()}})
    return records


def _detections(data: Path, rng: np.random.Generator) -> List[Dict[str, Any]]:
    truth = json.loads((data / "instances_val.json").read_text())
    found = []
    for box in truth["annotations"]:
        moved = (np.array(box["bbox"]) + rng.normal(0, 1.5, 4)).tolist()
        found.append({**box, "bbox": moved, "score": float(rng.uniform(0.2, 1.0))})
    return found
