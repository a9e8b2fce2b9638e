"""Pictures of a report: detections of each run beside the ground truth, and what distillation compares."""

import base64
import io
import json
from functools import reduce
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from detectron2.utils.visualizer import Visualizer
from matplotlib.image import imsave
from PIL import Image
from torch import Tensor

from ..checkpoint import load_strict
from ..config import load_config, read_lazy
from ..contract import channel_order
from ..dense import DenseOutputs
from ..errors import D2kdError
from ..export import evaluation_size
from ..meta_arch import DistillMetaArch
from ..overrides import apply_override
from .charts import COLORS
from .runs import ReportRun

WIDTH = 480  # pixels of a picture
MIN_SCORE = 0.4


class Picture(NamedTuple):
    """A picture in the page.

    Attributes:
        title: what it shows.
        source: a data URI.
    """

    title: str
    source: str


class TestSet:
    """The images and ground truth of a registered test set.

    Args:
        name: of the data set.

    Raises:
        D2kdError: it is not registered here, or its file cannot be read.
    """

    def __init__(self, name: str) -> None:
        metadata = MetadataCatalog.get(name) if name in DatasetCatalog else None
        if metadata is None or not metadata.get("json_file"):
            raise D2kdError(f"the data set {name} is not registered in this process")
        try:
            self.truth = json.loads(Path(metadata.json_file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise D2kdError(f"{metadata.json_file} cannot be read ({error})") from error
        self.folder = Path(metadata.image_root)
        self.names = {category["id"]: category["name"] for category in self.truth["categories"]}

    def sample(self, count: int) -> List[Dict[str, Any]]:
        """Images with ground truth, evenly spaced in the set."""
        labeled = {annotation["image_id"] for annotation in self.truth["annotations"]}
        images = [image for image in self.truth["images"] if image["id"] in labeled]
        return images[:: max(len(images) // count, 1)][:count]

    def path(self, image: Mapping[str, Any]) -> str:
        """The file of an image."""
        return str(self.folder / image["file_name"])

    def colors(self) -> Dict[int, str]:
        """A color for each category."""
        return dict(zip(sorted(self.names), COLORS * len(self.names)))


def detection_rows(
    test_set: TestSet, images: Sequence[Mapping[str, Any]], detections: Mapping[str, Path]
) -> Tuple[List[List[Picture]], float]:
    """Ground truth and detections of each run, a row for each image, and the lowest score that is shown.

    It is :data:`MIN_SCORE`, or less after a short training whose best run would otherwise show fewer detections than
    half of the objects.

    Args:
        test_set: of the images.
        images: to show.
        detections: file of the detections of each run, by label.
    """
    found = {label: json.loads(file.read_text()) for label, file in detections.items()}
    truth = test_set.truth["annotations"]
    enough = max(len(truth) // 2, 1)
    scores = [sorted((box["score"] for box in boxes), reverse=True)[:enough] for boxes in found.values()]
    lowest = min(MIN_SCORE, max((best[-1] for best in scores if best), default=MIN_SCORE))
    columns = {"ground truth": truth}
    columns.update({label: [box for box in boxes if box["score"] >= lowest] for label, boxes in found.items()})
    rows = []
    for image in images:
        pixels = utils.read_image(test_set.path(image), "RGB")
        own = {label: [b for b in boxes if b["image_id"] == image["id"]] for label, boxes in columns.items()}
        rows.append([Picture(label, draw_boxes(pixels, boxes, test_set.colors())) for label, boxes in own.items()])
    return rows, lowest


def draw_boxes(pixels: np.ndarray, boxes: Sequence[Mapping[str, Any]], colors: Mapping[int, str]) -> str:
    """An image (H, W, 3) RGB with boxes in COCO's format, as a data URI."""
    scale = WIDTH / pixels.shape[1]
    resized = Image.fromarray(pixels).resize((WIDTH, round(pixels.shape[0] * scale)))
    corners = np.array([box["bbox"] for box in boxes], dtype=float).reshape(-1, 4) * scale
    corners[:, 2:] += corners[:, :2]
    drawer = Visualizer(np.asarray(resized))
    for box, corner in zip(boxes, corners):
        drawer.draw_box(corner, alpha=1.0, edge_color=colors[box["category_id"]])
    written = io.BytesIO()
    Image.fromarray(drawer.output.get_image()).save(written, format="JPEG", quality=80)
    return _uri(written, "jpeg")


def load_student(run: ReportRun) -> DistillMetaArch:
    """The trained student of a run together with its teacher, on the CPU.

    Raises:
        D2kdError: its config is not known, or its checkpoint or its teacher cannot be loaded.
    """
    path, opts = run.config
    if path.endswith(".py"):
        cfg = reduce(apply_override, opts, read_lazy(path))
        student = instantiate(cfg.model).to("cpu")
    else:
        student = build_model(load_config(path, ["MODEL.DEVICE", "cpu"]))
    load_strict(student, str(run.folder / "model_final.pth"))
    student.prepare_teacher()
    return student.eval()


def comparison_rows(
    student: DistillMetaArch, run: ReportRun, test_set: TestSet, images: Sequence[Mapping[str, Any]]
) -> List[List[Picture]]:
    """What a student and its teacher make of images: FPN features, scores and, for CrossKD, scores of the cross head.

    Args:
        student: from :func:`load_student`.
        run: of the student.
        test_set: of the images.
        images: to show, a row for each.
    """
    resize = T.ResizeShortestEdge(*evaluation_size(*run.config))
    rows = []
    for image in images:
        pixels = utils.read_image(test_set.path(image), channel_order(student))
        rows.append(_compare(student, resize.get_transform(pixels).apply_image(pixels)))
    return rows


@torch.no_grad()
def _compare(student: DistillMetaArch, pixels: np.ndarray) -> List[Picture]:
    tensor = torch.as_tensor(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    nothing = Instances(pixels.shape[:2], gt_boxes=Boxes(torch.zeros(0, 4)), gt_classes=torch.zeros(0).long())
    with EventStorage():  # as in the first iteration, before any method ends
        seen = student.observe([{"image": tensor, "instances": nothing}])
    assert seen.teacher is not None
    both = {"teacher": seen.teacher, "student": seen.student}
    features = {f"{name}: features": outputs.features[0][0].abs().mean(0) for name, outputs in both.items()}
    outputs = {name: found for name, found in both.items() if found.predictions}
    if "crosskd" in student.distill:
        crossed = student.distill["crosskd"].cross(seen.student, seen.teacher)  # type: ignore[operator]
        outputs = {"teacher": seen.teacher, "cross head": crossed, "student": seen.student}
    scores = {f"{name}: scores": highest_scores(found) for name, found in outputs.items()}
    shape = seen.student.features[0].shape[-2:]
    padded = seen.images.tensor.shape[-2:]
    inside = [-(-size * side // whole) for size, side, whole in zip(pixels.shape, shape, padded)]
    maps = [*((title, x, float(x.max())) for title, x in features.items()), *((t, x, 1.0) for t, x in scores.items())]
    return [Picture(title, heat_map(x[: inside[0], : inside[1]], high)) for title, x, high in maps]


def highest_scores(outputs: DenseOutputs) -> Tensor:
    """The highest class score at each place of the finest level, over all levels: (H, W)."""
    maps = [level[0].sigmoid().amax(0)[None, None] for level in outputs.predictions[0]]
    size = maps[0].shape[-2:]
    return torch.cat([F.interpolate(x, size=size) for x in maps]).amax((0, 1))


def heat_map(values: Tensor, high: float) -> str:
    """A map (H, W) of values from 0 to ``high`` as a data URI."""
    written = io.BytesIO()
    imsave(written, values.numpy(), cmap="magma", vmin=0.0, vmax=max(high, 1e-6), format="png")
    return _uri(written, "png")


def _uri(written: io.BytesIO, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(written.getvalue()).decode()}"


def legend(test_set: TestSet) -> List[Tuple[str, str]]:
    """Name and color of each category."""
    return [(test_set.names[category], color) for category, color in test_set.colors().items()]
