"""Where numbers stop being finite."""

from typing import Any, Dict, List

import torch
from detectron2.modeling.meta_arch.dense_detector import DenseDetector

from ..dense import run_dense


@torch.no_grad()
def levels_not_finite(model: Any, batch: List[Dict[str, Any]]) -> List[str]:
    """Levels on which features or predictions of a detector, or of its teacher, are not finite for a batch.

    Args:
        model: any :class:`DenseDetector`.
        batch: images, as :class:`DatasetMapper` gives them.

    Returns:
        Such as "student p3"; empty where all are finite, or the model is none.
    """
    if not isinstance(model, DenseDetector):
        return []
    outputs = {"student": run_dense(model, model.preprocess_image(batch))}
    if getattr(model, "teacher", None) is not None:
        outputs["teacher"] = model.teacher(batch, getattr(model, "input_format", "BGR"))
    found = []
    for who, out in outputs.items():
        for name, *maps in zip(out.detector.head_in_features, out.features, *out.predictions):
            if not all(level.isfinite().all() for level in maps):
                found.append(f"{who} {name}")
    return found
