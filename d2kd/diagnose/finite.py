"""Where numbers stop being finite."""

from typing import Any, Dict, List, Optional, cast

import torch
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from torch import nn

from ..contract import Dense, channel_order, level_names
from ..dense import evaluation_mode, run_dense


@torch.no_grad()
def levels_not_finite(model: nn.Module, batch: List[Dict[str, Any]]) -> List[str]:
    """Finds the levels on which features or predictions of a detector, or of its teacher, are not finite.

    It runs both once more, in evaluation mode: no statistics or normalizers change, and no worker waits for another.

    Args:
        model: any model; only a dense detector is examined.
        batch: images, as :class:`DatasetMapper` returns them.

    Returns:
        Levels such as "student p3"; empty if all are finite.
    """
    if not isinstance(model, DenseDetector):
        return []
    student = cast(Dense, model)
    with evaluation_mode(student):
        outputs = {"student": run_dense(student, student.preprocess_image(batch))}
    teacher = getattr(model, "teacher", None)
    if teacher is not None and teacher.loaded:
        outputs["teacher"] = teacher(batch, channel_order(model))
    found = []
    for who, out in outputs.items():
        for name, *maps in zip(level_names(out.detector), out.features, *out.predictions):
            if not all(level.isfinite().all() for level in maps):
                found.append(f"{who} {name}")
    return found


def levels_after_error(error: Optional[BaseException], model: nn.Module, batch: List[Dict[str, Any]]) -> List[str]:
    """Like :func:`levels_not_finite`, for a step that ended with an error.

    Returns:
        Levels; none if memory ran out, or if the same error occurs again.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return []
    try:
        return levels_not_finite(model, batch)
    except Exception:
        return []
