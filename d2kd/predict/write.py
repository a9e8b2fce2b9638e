"""Writes pictures and videos with detections, and all detections in COCO's format."""

import json
import logging
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import numpy as np
from detectron2.data.catalog import Metadata
from detectron2.data.detection_utils import read_image
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from detectron2.utils.colormap import colormap
from detectron2.utils.video_visualizer import VideoVisualizer
from detectron2.utils.visualizer import ColorMode, Visualizer
from PIL import Image
from tqdm import tqdm

from ..data.images import error_text
from ..errors import D2kdError
from ..exported import Categories
from ..report.runs import RESULTS
from .inputs import Input, Video, video_writer
from .predictor import Predictor

IMAGES = "images.json"
_LOG = logging.getLogger(__name__)


class Written(NamedTuple):
    """What was written.

    Attributes:
        images: number of images and frames.
        detections: number of detections in them.
        skipped: images that cannot be read.
    """

    images: int
    detections: int
    skipped: List[Path]


class Record:
    """Collects detections in COCO's format.

    Args:
        categories: of the detector.
    """

    def __init__(self, categories: Categories) -> None:
        self.categories = categories
        self.images: List[Dict[str, Any]] = []
        self.results: List[Dict[str, Any]] = []

    def add(self, image: np.ndarray, found: Instances, **names: Any) -> None:
        """Adds the detections of an image (H, W, 3), and what identifies it."""
        number = len(self.images) + 1
        self.images.append({"id": number, **names, "height": image.shape[0], "width": image.shape[1]})
        self.results += coco_results(found, number, self.categories)

    def write(self, folder: Path) -> None:
        """Writes the detections, and the images that their ids stand for with the categories."""
        categories = [{"id": category, "name": name} for category, name in self.categories.items()]
        (folder / RESULTS).write_text(json.dumps(self.results))
        (folder / IMAGES).write_text(json.dumps({"images": self.images, "categories": categories}, indent=1))


def coco_results(found: Instances, image_id: Any, categories: Categories) -> List[Dict[str, Any]]:
    """Detections as entries of COCO's results."""
    ids = list(categories)
    results = instances_to_coco_json(found, image_id)
    return [{**entry, "category_id": ids[entry["category_id"]]} for entry in results] if ids else results


def write_predictions(predictor: Predictor, inputs: Sequence[Input], output: Path, min_score: float = 0.4) -> Written:
    """Detects objects and writes a picture or video for each input, and all detections.

    Args:
        predictor: finds the objects.
        inputs: from :func:`find_inputs`.
        output: folder to write to: for each input a file of the same name, videos as mp4;
            ``coco_instances_results.json`` with all detections, and ``images.json``, which says what its ids stand for.
        min_score: detections below are not drawn.

    Raises:
        D2kdError: nothing can be read, a video cannot be read, or an input would be overwritten.
    """
    make_folder(output)
    same = [entry.path for entry in inputs if (output / entry.name).resolve() == entry.path.resolve()]
    if same:
        raise D2kdError(f"--output {output} would overwrite {same[0]}; choose another folder")
    videos = {entry: Video(entry.path) for entry in inputs if entry.is_video}  # a broken one shows before the work
    record, skipped = Record(predictor.categories), []
    metadata = drawing_metadata(predictor.categories)
    for entry in tqdm(inputs, unit="file", disable=None if len(inputs) > 1 else True):
        place = output / entry.name
        place.parent.mkdir(parents=True, exist_ok=True)
        if entry in videos:
            _write_video(predictor, videos[entry], place, metadata, min_score, record)
            continue
        image = read_if_possible(entry.path)
        if image is None:
            skipped.append(entry.path)
            continue
        found = predictor(image)
        record.add(image, found, file_name=str(entry.path))
        Image.fromarray(draw(image, found[found.scores >= min_score], metadata)).save(place)
    if not record.images:
        others = f", nor can the other {len(skipped) - 1} images" if len(skipped) > 1 else ""
        raise D2kdError(f"{skipped[0]} cannot be read{others}; fix or replace them")
    record.write(output)
    return Written(len(record.images), len(record.results), skipped)


def read_if_possible(path: Path) -> Optional[np.ndarray]:
    """An image (H, W, 3) BGR; None, with a warning, if it cannot be read."""
    try:
        return read_image(str(path), "BGR")
    except Exception as error:  # PIL's readers raise many types of errors for damaged files
        _LOG.warning("%s is left out: it cannot be read (%s)", path, error_text(error))
        return None


def make_folder(output: Path) -> None:
    """Makes the output folder; raises D2kdError if that is impossible."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise D2kdError(f"--output {output}: {error_text(error)}; choose a folder that can be written") from error


def _write_video(
    predictor: Predictor, video: Video, place: Path, metadata: Metadata, min_score: float, record: Record
) -> None:
    drawer = VideoVisualizer(metadata)  # the same object keeps its color from frame to frame
    writer = video_writer(place, video.fps, video.size)
    try:
        frames = tqdm(video, total=len(video) or None, unit="frame", desc=video.path.name, disable=None, leave=False)
        for number, frame in enumerate(frames):
            found = predictor(frame)
            record.add(frame, found, file_name=str(video.path), frame=number)
            shown = found[found.scores >= min_score]
            drawn = drawer.draw_instance_predictions(np.ascontiguousarray(frame[:, :, ::-1]), shown).get_image()
            writer.write(np.ascontiguousarray(drawn[:, :, ::-1]))
    finally:
        writer.release()


def drawing_metadata(categories: Categories) -> Metadata:
    """Names and a color for each class, for detectron2's Visualizer."""
    colors = colormap(rgb=True).astype(int).tolist()
    repeated = [colors[i % len(colors)] for i in range(len(categories))]
    return Metadata(name="predictions", thing_classes=list(categories.values()), thing_colors=repeated)


def draw(image: np.ndarray, found: Instances, metadata: Metadata) -> np.ndarray:
    """Draws objects with detectron2's Visualizer.

    Args:
        image: (H, W, 3) uint8, BGR.
        found: detections on the CPU; without scores, ground truth.
        metadata: from :func:`drawing_metadata`.

    Returns:
        A picture (H, W, 3) uint8, RGB.
    """
    mode = ColorMode.SEGMENTATION if metadata.thing_colors else ColorMode.IMAGE
    drawer = Visualizer(image[:, :, ::-1], metadata, instance_mode=mode)
    return drawer.draw_instance_predictions(found).get_image()
