"""A teacher's detections as further labels of a training set: the simplest way to learn from a teacher."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np
from pycocotools.mask import iou

MIN_SCORE = 0.5
# A detection that overlaps a label of the same class as much as this repeats it.
MAX_IOU = 0.5


def add_pseudo_labels(
    truth: Dict[str, Any], detections: Sequence[Dict[str, Any]], min_score: float = MIN_SCORE, max_iou: float = MAX_IOU
) -> Tuple[Dict[str, Any], int]:
    """Adds detections to the labels of a data set, where there is no label of the same class.

    Args:
        truth: a data set in COCO format.
        detections: as COCO's evaluation takes them: ``image_id``, ``category_id``, ``bbox`` XYWH in pixels, ``score``.
        min_score: lowest score of a detection that is added.
        max_iou: highest IoU with a label of the same class.

    Returns:
        The data set with more annotations, and their number.
    """
    labels: Dict[Tuple[Any, Any], List[List[float]]] = defaultdict(list)
    for annotation in truth["annotations"]:
        labels[annotation["image_id"], annotation["category_id"]].append(annotation["bbox"])
    first = max([a["id"] for a in truth["annotations"]], default=0) + 1
    added: List[Dict[str, Any]] = []
    for found in detections:
        own = labels[found["image_id"], found["category_id"]]
        if found["score"] < min_score or (own and np.max(iou([found["bbox"]], own, [0] * len(own))) > max_iou):
            continue
        box = {key: found[key] for key in ("image_id", "category_id", "bbox")}
        added.append({**box, "id": first + len(added), "iscrowd": 0, "area": found["bbox"][2] * found["bbox"][3]})
    return {**truth, "annotations": [*truth["annotations"], *added]}, len(added)


def write_pseudo_labels(truth: Path, detections: Path, target: Path) -> int:
    """Does :func:`add_pseudo_labels` with files; returns the number of annotations that were added."""
    content, count = add_pseudo_labels(json.loads(truth.read_text()), json.loads(detections.read_text()))
    target.write_text(json.dumps(content))
    return count
