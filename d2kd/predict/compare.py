"""Detectors side by side with the ground truth, images first on which they differ most."""

import io
import json
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Sequence

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import Boxes, BoxMode, Instances
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from ..contract import num_classes
from ..errors import D2kdError
from ..exported import Categories
from .predictor import Predictor, registered_categories
from .write import coco_results, draw, drawing_metadata, make_folder

TRUTH = "ground truth"
SUMMARY = "comparison.json"


class Score(NamedTuple):
    """How well detections agree with the ground truth, in percent, averaged over the classes in it.

    Attributes:
        ap: COCO's, averaged over IoU 0.5 to 0.95.
        recall: at IoU 0.5.
    """

    ap: float
    recall: float


@dataclass
class Compared:
    """An image and its scores.

    Attributes:
        entry: of the data set, as detectron2 reads it.
        scores: by label.
    """

    entry: Dict[str, Any]
    scores: Dict[str, Score]

    def difference(self, by: str) -> float:
        """Between the best and the worst detector, of a field of :class:`Score`."""
        values = [getattr(score, by) for score in self.scores.values()]
        return max(values) - min(values)


class Comparison(NamedTuple):
    """Scores of several detectors.

    Attributes:
        whole: on the whole data set, by label.
        images: those with ground truth, largest difference first.
    """

    whole: Dict[str, Score]
    images: List[Compared]


def compare(
    predictors: Mapping[str, Predictor],
    data_set: str,
    output: Path,
    count: int = 20,
    by: str = "ap",
    min_score: float = 0.4,
) -> Comparison:
    """Compares detectors image by image and draws the images on which they differ most.

    Args:
        predictors: at least two, by label.
        data_set: name of a registered data set in COCO's format.
        output: folder for a picture of each of these images, and ``comparison.json`` with the scores of all.
        count: number of images to draw.
        by: what they differ in, "ap" or "recall".
        min_score: detections below are not drawn.

    Raises:
        D2kdError: the data set cannot be read, or a detector's classes are others.
    """
    if len(predictors) < 2:
        raise D2kdError("--compare needs two or more detectors: label=config:weights, or label=model.onnx")
    truth = _read_truth(data_set)
    categories = registered_categories(data_set)
    for label, predictor in predictors.items():
        check_classes(label, predictor, categories, data_set)
    make_folder(output)
    entries = DatasetCatalog.get(data_set)
    scorers = {label: Scorer(truth, detect(one, entries, categories, label)) for label, one in predictors.items()}
    labeled = [entry for entry in entries if truth.getAnnIds(imgIds=[entry["image_id"]], iscrowd=False)]
    if not labeled:
        raise D2kdError(f"data set {data_set} has no ground truth; name one with annotations")
    images = [
        Compared(entry, {label: scorer([entry["image_id"]]) for label, scorer in scorers.items()}) for entry in labeled
    ]
    images.sort(key=lambda image: -image.difference(by))
    everything = [entry["image_id"] for entry in entries]
    comparison = Comparison({label: scorer(everything) for label, scorer in scorers.items()}, images)
    _write_summary(comparison, output)
    for rank, image in enumerate(tqdm(images[:count], unit="picture", disable=None), 1):
        _draw_row(image, predictors, categories, min_score, output / picture_name(image, rank))
    return comparison


def picture_name(image: Compared, rank: int) -> str:
    """The file of a picture in the output folder."""
    return f"{rank:03d}_{Path(image.entry['file_name']).stem}.jpg"


def check_classes(label: str, predictor: Predictor, categories: Categories, data_set: str) -> None:
    """Raises D2kdError unless a detector has the classes of a data set, in their order."""
    count, wanted = num_classes(predictor.model), list(categories.values())
    own = list(predictor.categories.values())
    if count not in (None, len(wanted)) or (own and own != wanted):
        names = f" ({', '.join(own[:5])}{', ...' if len(own) > 5 else ''})" if own else ""
        raise D2kdError(
            f"{label} has {count or len(own)} classes{names}, but data set {data_set} has {len(wanted)} "
            f"({', '.join(wanted[:5])}{', ...' if len(wanted) > 5 else ''}); compare detectors of the same classes"
        )


def evaluate(predictor: Predictor, data_set: str, label: str) -> Score:
    """Evaluates a detector on a data set.

    Args:
        predictor: of the detector.
        data_set: name of a registered data set in COCO's format.
        label: what to call the detector in messages.

    Raises:
        D2kdError: the data set cannot be read, or the detector's classes are others.
    """
    truth, categories = _read_truth(data_set), registered_categories(data_set)
    check_classes(label, predictor, categories, data_set)
    entries = DatasetCatalog.get(data_set)
    return Scorer(truth, detect(predictor, entries, categories, label))([entry["image_id"] for entry in entries])


def detect(predictor: Predictor, entries: Sequence[Mapping[str, Any]], categories: Categories, label: str) -> List:
    """Detections in all images of a data set, as entries of COCO's results."""
    results = []
    for entry in tqdm(entries, unit="image", desc=label, disable=None):
        results += coco_results(predictor(read_image(entry["file_name"], "BGR")), entry["image_id"], categories)
    return results


class Scorer:
    """Scores detections with pycocotools.

    Args:
        truth: the ground truth.
        results: the detections.
    """

    def __init__(self, truth: COCO, results: List[Dict[str, Any]]) -> None:
        with redirect_stdout(io.StringIO()):  # pycocotools prints
            self._evaluation = COCOeval(truth, truth.loadRes(results), "bbox") if results else None
        if self._evaluation:
            self._evaluation.params.areaRng, self._evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]

    def __call__(self, image_ids: Sequence[Any]) -> Score:
        """The score on some images."""
        if self._evaluation is None:
            return Score(0.0, 0.0)
        self._evaluation.params.imgIds = list(image_ids)
        with redirect_stdout(io.StringIO()):
            self._evaluation.evaluate()
            self._evaluation.accumulate()
        precision, recall = self._evaluation.eval["precision"][..., 0, -1], self._evaluation.eval["recall"][0, :, 0, -1]
        return Score(*(100 * float(values[values > -1].mean()) for values in (precision, recall)))


def _read_truth(data_set: str) -> COCO:
    file = MetadataCatalog.get(data_set).get("json_file") if data_set in DatasetCatalog else None
    if not file or not Path(file).is_file():
        raise D2kdError(f"data set {data_set} has no annotation file here; name one in COCO's format with --val-data")
    with redirect_stdout(io.StringIO()):
        return COCO(file)


def _write_summary(comparison: Comparison, output: Path) -> None:
    images = [
        {"file_name": image.entry["file_name"], **{label: score._asdict() for label, score in image.scores.items()}}
        for image in comparison.images
    ]
    whole = {label: score._asdict() for label, score in comparison.whole.items()}
    (output / SUMMARY).write_text(json.dumps({"all images": whole, "images": images}, indent=1))


def _draw_row(
    image: Compared, predictors: Mapping[str, Predictor], categories: Categories, min_score: float, file: Path
) -> None:
    pixels = read_image(image.entry["file_name"], "BGR")
    metadata = drawing_metadata(categories)
    panels = {TRUTH: draw(pixels, truth_of(image.entry), metadata)}
    for label, predictor in predictors.items():
        score, found = image.scores[label], predictor(pixels)
        title = f"{label}: AP {score.ap:.0f}, recall {score.recall:.0f}"
        panels[title] = draw(pixels, found[found.scores >= min_score], metadata)
    height, width = pixels.shape[:2]
    figure = Figure(figsize=(5 * len(panels), 5 * height / width + 0.4), layout="constrained")
    FigureCanvasAgg(figure)  # not pyplot, which keeps global state
    for axis, (title, panel) in zip(figure.subplots(1, len(panels)), panels.items()):
        axis.imshow(panel)
        axis.set_title(title)
        axis.set_axis_off()
    figure.savefig(file, dpi=110)


def truth_of(entry: Mapping[str, Any]) -> Instances:
    """The ground truth of an image, as detections without scores."""
    boxes = [BoxMode.convert(x["bbox"], x["bbox_mode"], BoxMode.XYXY_ABS) for x in entry["annotations"]]
    found = Instances((entry["height"], entry["width"]))
    found.pred_boxes = Boxes(torch.from_numpy(np.array(boxes, dtype=np.float32).reshape(-1, 4)))
    found.pred_classes = torch.tensor([x["category_id"] for x in entry["annotations"]], dtype=torch.int64)
    return found
