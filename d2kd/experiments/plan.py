"""Settings of a training from the data: image size, anchors, iterations and learning rate; measured time and memory."""

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

import numpy as np
import yaml
from detectron2.config import CfgNode

from ..config import detector_node
from ..data.coco import read_coco
from ..engine.estimate import Measured, measure_training
from ..engine.main import parser
from ..engine.styles import load_recipe
from ..quiet import quiet_known_warnings
from .series import environment

# Widths of anchors that are tried, relative to the config's own.
FACTORS = (0.25, 0.375, 0.5, 0.75, 1.0, 1.5, 2.0)
# Sides of an anchor that a box must overlap at least, as RetinaNet's assignment asks for.
OVERLAP = 0.5
# Strides of the first level of all configs here.
FIRST_STRIDE = 8


class Images(NamedTuple):
    """Sizes in an annotation file.

    Attributes:
        shorter: shorter side of each image, (N,).
        boxes: width and height of each box, (M, 2).
        of_image: number of each box's image, (M,).
        longer: longer side of each image, (N,).
    """

    shorter: np.ndarray
    longer: np.ndarray
    boxes: np.ndarray
    of_image: np.ndarray

    def boxes_at(self, size: int, longest: int) -> np.ndarray:
        """Width and height of each box, (M, 2), where shorter sides are resized to ``size``, longer to ``longest``."""
        scale = np.minimum(size / self.shorter, longest / self.longer)
        return self.boxes * scale[self.of_image, None]


def read_sizes(json_file: str) -> Images:
    """Reads the sizes of images and boxes."""
    content = read_coco(json_file)
    place = {image["id"]: i for i, image in enumerate(content["images"])}
    sizes = np.array([sorted((image["width"], image["height"])) for image in content["images"]], dtype=float)
    used = [x for x in content["annotations"] if min(x["bbox"][2:]) > 0 and not x.get("iscrowd")]
    boxes = np.array([x["bbox"][2:] for x in used], dtype=float).reshape(-1, 2)
    return Images(sizes[:, 0], sizes[:, 1], boxes, np.array([place[x["image_id"]] for x in used], dtype=int))


def image_size(images: Images, largest: int) -> int:
    """A shorter side for training: the images' median, in steps of 32, up to ``largest``."""
    return int(np.clip(round(float(np.median(images.shorter)) / 32) * 32, 64, largest))


def coverage(boxes: np.ndarray, anchors: np.ndarray) -> Tuple[float, float]:
    """How well anchors fit boxes when their centers agree.

    Args:
        boxes: widths and heights, (M, 2).
        anchors: widths and heights, (A, 2).

    Returns:
        The fraction of boxes whose best IoU is at least :data:`OVERLAP`, and the mean best IoU.
    """
    common = np.minimum(boxes[:, None], anchors[None]).prod(axis=2)
    best = (common / (boxes.prod(axis=1)[:, None] + anchors.prod(axis=1)[None] - common)).max(axis=1)
    return float((best >= OVERLAP).mean()), float(best.mean())


@dataclass(frozen=True)
class Anchors:
    """Anchors for a data set.

    Attributes:
        settings: config keys and values, the same for teacher and student; empty if there are no anchors to choose.
        smallest: side of the smallest anchor, in pixels.
        largest: of the largest.
        covered: fraction of boxes that overlap one by half or more.
        covered_before: the same for the config's own anchors.
    """

    settings: Dict[str, Any]
    smallest: float = 0.0
    largest: float = 0.0
    covered: float = 0.0
    covered_before: float = 0.0


def choose_anchors(config: CfgNode, boxes: np.ndarray, factors: Sequence[float] = FACTORS) -> Anchors:
    """Multiplies a config's anchors by the factor with which they cover most boxes.

    Args:
        config: of the teacher or the student.
        boxes: widths and heights in pixels, (M, 2).
        factors: to try.
    """
    node = detector_node(config)
    if node == "RETINANET":
        sizes, ratios = config.MODEL.ANCHOR_GENERATOR.SIZES, config.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS[0]
    elif node in ("GFL", "ATSS"):
        options = config.MODEL[node]
        levels = range(len(options.IN_FEATURES))
        sizes, ratios = [[options.ANCHOR_SCALE * FIRST_STRIDE * 2**level] for level in levels], [1.0]
    else:
        return Anchors({})

    def fit(factor: float) -> Tuple[float, float]:
        sides = np.array([side * factor for level in sizes for side in level])
        return coverage(boxes, np.concatenate([np.stack([sides / r**0.5, sides * r**0.5], axis=1) for r in ratios]))

    # Smaller anchors than their distance from each other would miss boxes between them.
    possible = [factor for factor in factors if factor == 1.0 or sizes[0][0] * factor >= FIRST_STRIDE]
    best = max(possible, key=fit)
    chosen = [[round(side * best, 3) for side in level] for level in sizes]
    key = "MODEL.ANCHOR_GENERATOR.SIZES" if node == "RETINANET" else f"MODEL.{node}.ANCHOR_SCALE"
    value = chosen if node == "RETINANET" else config.MODEL[node].ANCHOR_SCALE * best
    return Anchors({key: value}, chosen[0][0], chosen[-1][-1], fit(best)[0], fit(1.0)[0])


def measure(configs: Sequence[str], data: Sequence[str]) -> List[Measured]:
    """Runs a few training steps of each config in a process of its own, and trains nothing.

    Args:
        configs: paths of plain configs.
        data: arguments that name the data.

    Raises:
        D2kdError: a config is wrong.
    """
    os.environ.update(environment())  # as runs have it: threads that wait must not take time from those that work
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return [pool.submit(_measure, config, list(data)).result() for config in configs]


def _measure(config: str, data: List[str]) -> Measured:
    quiet_known_warnings()
    recipe = load_recipe(parser().parse_args(["--config-file", config, *data])).with_seed(0)
    return measure_training(recipe, recipe.build_model().train(), iter(recipe.build_train_loader()))


def write_config(file: Path, base: str, settings: Dict[str, Any]) -> None:
    """Writes a YAML config.

    Args:
        file: the config.
        base: path of the config that it builds on.
        settings: dotted keys and their values.
    """
    nested: Dict[str, Any] = {"_BASE_": base}
    for key, value in settings.items():
        *parents, leaf = key.split(".")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(nested, sort_keys=False, default_flow_style=None, width=120), encoding="utf-8")
