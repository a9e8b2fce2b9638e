"""Small teachers that know a few images by heart."""

from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage


def train_by_heart(
    cfg: CfgNode, batch: List[Dict[str, Any]], path: Path, iterations: int, weak: Optional[int] = None
) -> None:
    """Trains a detector on one batch and writes its weights.

    Args:
        cfg: of the detector.
        batch: images with annotations.
        path: the file.
        iterations: of the whole batch.
        weak: after how many of them it also writes ``weak_<name>``.
    """
    torch.manual_seed(0)
    model = build_model(cfg).train()
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.003, total_steps=iterations)
    for iteration in range(iterations):
        if iteration == weak:
            torch.save({"model": model.state_dict()}, path.with_name(f"weak_{path.name}"))
        with EventStorage():
            sum(model(batch).values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    torch.save({"model": model.state_dict()}, path)
