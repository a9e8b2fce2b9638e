"""Pictures of training runs: loss and AP over iterations, and detections next to the ground truth."""

import json
from pathlib import Path
from statistics import mean, median
from typing import Any, Dict, List, Mapping, Sequence, Tuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import Rectangle

from ..methods import method_names

COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")


def read_metrics(run: Path) -> List[Dict[str, Any]]:
    """Reads the records in the ``metrics.json`` that detectron2 writes for a run, sorted by iteration.

    A resumed run writes some iterations twice; the later record is used. Incomplete lines of interrupted runs are
    skipped.
    """
    records: Dict[int, Dict[str, Any]] = {}
    file = run / "metrics.json"
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        records.setdefault(record["iteration"], {}).update(record)
    return [records[key] for key in sorted(records)]


def draw_curves(runs: Mapping[str, Path], file: Path) -> None:
    """Plots the detection loss and the AP of several runs over iterations.

    Args:
        runs: the output folder of each run, by label.
        file: the picture to write.
    """
    figure = Figure(figsize=(11, 4))
    losses, aps = figure.subplots(1, 2)
    for color, (label, folder) in zip(COLORS * len(runs), runs.items()):
        records = read_metrics(folder)
        own = [(r["iteration"], detection_loss(r)) for r in records if "total_loss" in r]
        ap = [(r["iteration"] + 1, r["bbox/AP"]) for r in records if "bbox/AP" in r]
        losses.plot(*zip(*own), color=color, label=label)
        aps.plot(*zip(*ap), "o-", color=color, label=label)
    losses.set(xlabel="iteration", ylabel="detection loss (without distillation)", yscale="log")
    aps.set(xlabel="iteration", ylabel="AP", ylim=(0, None))
    aps.legend()
    figure.tight_layout()
    _save(figure, file)


def draw_comparison(runs: Mapping[str, Sequence[Path]], file: Path) -> None:
    """Plots the AP of several rows over iterations and over seconds of training, averaged over seeds.

    Args:
        runs: the output folders of each row's runs, by label.
        file: the picture to write.
    """
    figure = Figure(figsize=(11, 4))
    by_iteration, by_second = figure.subplots(1, 2, sharey=True)
    for color, (label, folders) in zip(COLORS * len(runs), runs.items()):
        curves = [ap_curve(folder) for folder in folders]
        points = [tuple(map(mean, zip(*same))) for same in zip(*curves)]  # of the seeds, evaluation by evaluation
        iterations, seconds, aps = zip(*points)
        by_iteration.plot(iterations, aps, "o-", color=color, label=f"{label} ({len(folders)})", markersize=3)
        by_second.plot(seconds, aps, "o-", color=color, markersize=3)
    by_iteration.set(xlabel="iteration", ylabel="AP")
    by_second.set(xlabel="seconds of training")
    by_iteration.legend(title="row (seeds)", fontsize=8)
    figure.tight_layout()
    _save(figure, file)


def ap_curve(run: Path) -> List[Tuple[float, float, float]]:
    """Iterations, seconds of training without evaluations, and AP, for each evaluation of a run."""
    records = read_metrics(run)
    step = median(r["time"] for r in records if "time" in r)
    return [(r["iteration"] + 1, step * (r["iteration"] + 1), r["bbox/AP"]) for r in records if "bbox/AP" in r]


def detection_loss(record: Mapping[str, Any]) -> float:
    """Returns the sum of the detector's own losses in a record, without those of distillation methods."""
    methods = tuple(f"loss_{name.lower()}_" for name in method_names())
    return sum(value for key, value in record.items() if key.startswith("loss_") and not key.startswith(methods))


def draw_grid(
    annotations: Path, images: Path, runs: Mapping[str, Path], file: Path, num_images: int = 4, min_score: float = 0.4
) -> None:
    """Draws images with the ground truth and the detections of each run side by side.

    Args:
        annotations: COCO JSON of the test set.
        images: folder of its images.
        runs: the ``coco_instances_results.json`` of each run, by label.
        file: the picture to write.
        num_images: number of rows; the images are evenly spaced in the set.
        min_score: detections with lower scores are not drawn.
    """
    truth = json.loads(annotations.read_text())
    names = {c["id"]: c["name"] for c in truth["categories"]}
    columns = {"ground truth": truth["annotations"]}
    for label, results in runs.items():
        columns[label] = [d for d in json.loads(results.read_text()) if d["score"] >= min_score]
    shown = truth["images"][:: max(len(truth["images"]) // num_images, 1)][:num_images]
    figure = Figure(figsize=(3 * len(columns), 2.4 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), len(columns), squeeze=False)
    for row, image in zip(axes, shown):
        pixels = imread(images / image["file_name"])
        for axis, (label, boxes) in zip(row, columns.items()):
            axis.imshow(pixels)
            axis.set_axis_off()
            _draw_boxes(axis, [b for b in boxes if b["image_id"] == image["id"]], sorted(names))
            if image is shown[0]:
                axis.set_title(label)
    handles = [Rectangle((0, 0), 1, 1, fill=False, edgecolor=c) for c in COLORS[: len(names)]]
    figure.legend(handles, [names[i] for i in sorted(names)], loc="outside lower center", ncols=len(names))
    _save(figure, file)


def _save(figure: Figure, file: Path) -> None:
    FigureCanvasAgg(figure)  # not pyplot, which keeps global state
    figure.savefig(file, dpi=110)


def _draw_boxes(axis: Axes, boxes: Sequence[Dict[str, Any]], categories: List[int]) -> None:
    for box in boxes:
        x, y, width, height = box["bbox"]
        corner: Tuple[float, float] = (x, y)
        color = COLORS[categories.index(box["category_id"]) % len(COLORS)]
        axis.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=color, linewidth=1.2))
