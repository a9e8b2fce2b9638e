"""A generated data set of stained blood smears: made in seconds, without a download, and with complete labels."""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
from PIL import Image, ImageFilter

from ..errors import D2kdError
from .sets import write_coco

CLASS_NAMES = ("RBC", "WBC", "Platelets")
RBC, WBC, PLATELET = 1, 2, 3

# Increase this whenever pictures or labels change: files of other versions are regenerated instead of reused.
VERSION = 2

# All lengths below are in pixels of an image of this height. Other sizes show the same smear at another resolution.
NOMINAL_SIZE = (128, 170)

DIAMETER = {RBC: (18.0, 34.0), WBC: (40.0, 58.0), PLATELET: (14.0, 19.0)}
# The largest deviation from a circle: ratio of the axes, and amplitude of the outline's waves.
MIN_AXIS_RATIO = {RBC: 0.72, WBC: 0.8, PLATELET: 0.7}
WOBBLE = {RBC: 0.03, WBC: 0.05, PLATELET: 0.09}
# The minimum distance between two centers relative to the sum of their radii. Below 1 the cells may overlap.
SPACING = {RBC: 0.62, WBC: 0.8, PLATELET: 0.9}
PLACEMENT_TRIES = 30

# A cell is drawn only if at least MIN_INSIDE_FRACTION of it is inside the image, and labeled only if at least
# MIN_VISIBLE of that is not covered by other cells.
MIN_INSIDE_FRACTION = {RBC: 0.2, WBC: 0.3, PLATELET: 0.6}
MIN_VISIBLE = 0.15
OUTLINE_POINTS = 25

# RGB, 0 to 255.
BACKGROUND = np.array([220.0, 205.0, 209.0])
RBC_COLOR = np.array([190.0, 138.0, 138.0])
CYTOPLASM_COLOR = np.array([186.0, 162.0, 203.0])
NUCLEUS_COLOR = np.array([92.0, 56.0, 148.0])
PLATELET_COLOR = np.array([124.0, 96.0, 168.0])

Window = Tuple[slice, slice]


@dataclass(frozen=True)
class Cell:
    """An ellipse with a wavy outline; lengths in pixels, ``waves`` holds (order, amplitude, phase)."""

    category: int
    x: float
    y: float
    axes: Tuple[float, float]
    angle: float
    waves: Tuple[Tuple[int, float, float], ...]

    @property
    def mean_radius(self) -> float:
        return sum(self.axes) / 2

    def radius(self, theta: np.ndarray) -> np.ndarray:
        """Returns the distance from the center to the outline in the directions ``theta`` (radians)."""
        long, short = self.axes
        ellipse = long * short / np.hypot(short * np.cos(theta - self.angle), long * np.sin(theta - self.angle))
        waves = [amplitude * np.cos(order * theta + phase) for order, amplitude, phase in self.waves]
        return ellipse * (1 + np.sum(waves, axis=0))

    def box(self) -> np.ndarray:
        """Returns the bounding box (x0, y0, x1, y1) of the whole outline, which may extend beyond the image."""
        x, y = self.outline().T
        return np.array([x.min(), y.min(), x.max(), y.max()])

    def outline(self, points: int = 180) -> np.ndarray:
        """Returns points (x, y) on the outline, (points, 2); the last is the first again."""
        theta = np.linspace(0, 2 * np.pi, points)
        radius = self.radius(theta)
        return np.stack([self.x + radius * np.cos(theta), self.y + radius * np.sin(theta)], axis=1)


def write_blood_cells(root: Path, split: str, num_images: int, seed: int, size: Tuple[int, int] = NOMINAL_SIZE) -> Path:
    """Writes one split of the generated data set, or reuses an existing one with the same parameters.

    The pictures depend only on the parameters: the same call writes the same bytes. Splits with the same seed have no
    picture in common. The annotation file is written last and atomically, so it exists only if the split is complete.

    Args:
        root: folder of the data set, where ``images/<split>_00001.png`` ... and ``instances_<split>.json`` are written.
        split: name of the split, for instance ``train``.
        num_images: number of images, at least 1.
        seed: random seed, not negative.
        size: height and width of the images in pixels, at least 32 each; cells scale with the height.

    Returns:
        The path of the annotation file, in COCO format with the categories 1 RBC, 2 WBC and 3 Platelets.

    Raises:
        D2kdError: a parameter is out of range, or the annotation file exists but was not written by this function.
    """
    if num_images < 1 or seed < 0 or min(size) < 32:
        raise D2kdError(
            f"cannot generate {num_images} images of size {tuple(size)} with seed {seed}; use at least 1 image, a seed "
            "of 0 or more, and a height and width of at least 32"
        )
    root = Path(root)
    json_file = root / f"instances_{split}.json"
    generator = {"version": VERSION, "split": split, "num_images": num_images, "seed": seed, "size": list(size)}
    names = [f"{split}_{index:05d}.png" for index in range(1, num_images + 1)]
    if _written_parameters(json_file) == generator and all((root / "images" / name).is_file() for name in names):
        return json_file
    json_file.unlink(missing_ok=True)
    (root / "images").mkdir(parents=True, exist_ok=True)
    content = _empty_coco(generator)
    for index, name in enumerate(names, 1):
        # Each image has its own generator, so it does not depend on how many numbers the previous ones used.
        pixels, cells = draw_smear(np.random.default_rng([seed, zlib.crc32(split.encode()), index]), size)
        Image.fromarray(pixels).save(root / "images" / name)
        content["images"].append({"id": index, "file_name": name, "height": size[0], "width": size[1]})
        for cell in cells:
            content["annotations"].append(_annotation(len(content["annotations"]) + 1, index, cell, size))
    write_coco(content, json_file)
    return json_file


def _written_parameters(json_file: Path) -> Optional[Dict[str, Any]]:
    """Returns the parameters that an existing annotation file was generated with, or None if there is no such file."""
    if not json_file.exists():
        return None
    try:
        return json.loads(json_file.read_text(encoding="utf-8"))["info"]["generator"]
    except (ValueError, KeyError, TypeError):
        # These may be the user's own annotations: never overwrite them.
        raise D2kdError(
            f"{json_file} was not written by the blood cell generator; move it away or choose another folder"
        ) from None


def _empty_coco(generator: Dict[str, Any]) -> Dict[str, Any]:
    return {
        "info": {"description": "generated blood smears", "generator": generator},
        "licenses": [],
        "images": [],
        "annotations": [],
        "categories": [
            {"id": index, "name": name, "supercategory": "cell"} for index, name in enumerate(CLASS_NAMES, 1)
        ],
    }


def _annotation(annotation_id: int, image_id: int, cell: Cell, size: Tuple[int, int]) -> Dict[str, Any]:
    x0, y0, x1, y1 = (round(float(corner), 2) for corner in _clip(cell.box(), size))
    outline = np.clip(cell.outline(OUTLINE_POINTS)[1:], 0, size[::-1])
    bbox = [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)]
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": cell.category,
        "bbox": bbox,
        "segmentation": [[round(float(x), 2) for x in outline.flat]],
        "area": round(bbox[2] * bbox[3], 2),
        "iscrowd": 0,
    }


def draw_smear(rng: np.random.Generator, size: Tuple[int, int]) -> Tuple[np.ndarray, List[Cell]]:
    """Draws one image.

    Args:
        rng: random number generator.
        size: height and width in pixels.

    Returns:
        The RGB image, (height, width, 3) uint8, and the labeled cells, which may extend beyond it.
    """
    scale = size[0] / NOMINAL_SIZE[0]
    canvas = _background(rng, size)
    _draw_smudges(rng, canvas, scale)
    cells = _place_cells(rng, size, scale)
    topmost = np.full(size, -1)
    footprint = []
    for index, cell in enumerate(cells):
        window, covered = _draw_cell(rng, canvas, cell)
        topmost[window][covered] = index
        footprint.append(covered.sum())
    _draw_specks(rng, canvas, scale)
    labeled = [cell for index, cell in enumerate(cells) if (topmost == index).sum() >= MIN_VISIBLE * footprint[index]]
    return _photograph(rng, canvas, scale), labeled


def _clip(box: np.ndarray, size: Tuple[int, int]) -> np.ndarray:
    height, width = size
    return np.clip(box, 0, [width, height, width, height])


def _area(box: np.ndarray) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))


def _background(rng: np.random.Generator, size: Tuple[int, int]) -> np.ndarray:
    """Returns a pinkish canvas (height, width, 3) with uneven staining."""
    color = BACKGROUND + rng.normal(0, 5, 3) + rng.normal(0, 7)
    coarse = Image.fromarray(rng.normal(0, 6, (6, 8)).astype(np.float32))
    fine = Image.fromarray(rng.normal(0, 3, (24, 32)).astype(np.float32))
    stain = sum(np.asarray(layer.resize(size[::-1], Image.Resampling.BICUBIC)) for layer in (coarse, fine))
    return color + np.asarray(stain, dtype=np.float64)[..., None] * np.array([0.6, 1.0, 0.8])


def _place_cells(rng: np.random.Generator, size: Tuple[int, int], scale: float) -> List[Cell]:
    """Returns the cells from bottom to top."""
    density = size[1] / scale / NOMINAL_SIZE[1]
    counts: Dict[int, int] = {
        WBC: int(rng.choice([0, 1, 2], p=[0.06, 0.86, 0.08])),
        RBC: round(rng.integers(9, 24) * density),
        PLATELET: int(rng.choice([1, 2, 3, 4, 5], p=[0.1, 0.3, 0.3, 0.2, 0.1])),
    }
    cells: List[Cell] = []
    for category, count in counts.items():
        for _ in range(count):
            tries = (_random_cell(rng, category, size, scale) for _ in range(PLACEMENT_TRIES))
            cells += next(([cell] for cell in tries if _fits(cell, cells, size)), [])
    # White cells are placed first, while there is room, but are drawn on top of red ones.
    return sorted(cells, key=lambda cell: cell.category)


def _random_cell(rng: np.random.Generator, category: int, size: Tuple[int, int], scale: float) -> Cell:
    radius = scale * rng.uniform(*DIAMETER[category]) / 2
    flat = np.sqrt(rng.uniform(MIN_AXIS_RATIO[category], 1))
    waves = tuple(
        (order, rng.uniform(0, WOBBLE[category]) * 2 / order, rng.uniform(0, 2 * np.pi)) for order in (2, 3, 4, 5)
    )
    # Centers may lie outside, so that cells are cut off at all four borders.
    x, y = (rng.uniform(-radius, length + radius) for length in size[::-1])
    return Cell(category, x, y, (radius / flat, radius * flat), rng.uniform(0, np.pi), waves)


def _fits(cell: Cell, others: List[Cell], size: Tuple[int, int]) -> bool:
    """Returns whether enough of the cell is inside the image and it is far enough from the other cells."""
    box = cell.box()
    if _area(_clip(box, size)) < MIN_INSIDE_FRACTION[cell.category] * _area(box):
        return False
    return all(
        np.hypot(cell.x - other.x, cell.y - other.y) >= SPACING[cell.category] * (cell.mean_radius + other.mean_radius)
        for other in others
    )


def _window(cell: Cell, shape: Tuple[int, ...]) -> Tuple[Window, np.ndarray, np.ndarray]:
    """Returns the window around a cell, and for each pixel the distance to the center and the outline's radius."""
    x0, y0, x1, y1 = _clip(cell.box() + np.array([-3, -3, 4, 4]), (shape[0], shape[1])).astype(int)
    y, x = np.mgrid[y0:y1, x0:x1] + 0.5
    distance = np.hypot(x - cell.x, y - cell.y)
    return (slice(y0, y1), slice(x0, x1)), distance, cell.radius(np.arctan2(y - cell.y, x - cell.x))


def _blend(canvas: np.ndarray, window: Window, color: np.ndarray, opacity: np.ndarray) -> None:
    canvas[window] += opacity[..., None] * (color - canvas[window])


def _draw_cell(rng: np.random.Generator, canvas: np.ndarray, cell: Cell) -> Tuple[Window, np.ndarray]:
    """Draws a cell. Returns its window, and the mask of the pixels it covers in that window."""
    window, distance, radius = _window(cell, canvas.shape)
    # The divisor is the width of the edge in pixels: cells lie at different depths, so some are out of focus.
    cover = np.clip((radius - distance) / rng.uniform(1.0, 3.0) + 0.5, 0, 1)
    draw = {RBC: _draw_rbc, WBC: _draw_wbc, PLATELET: _draw_platelet}[cell.category]
    draw(rng, canvas, cell, window, cover, distance / radius)
    return window, cover > 0.5


def _draw_rbc(
    rng: np.random.Generator, canvas: np.ndarray, cell: Cell, window: Window, cover: np.ndarray, depth: np.ndarray
) -> None:
    """Draws a disc with a pale center and a darker rim; ``depth`` is 0 at the center and 1 at the outline."""
    opacity = rng.uniform(0.25, 0.45) if rng.random() < 0.2 else rng.uniform(0.6, 0.95)
    pallor = rng.uniform(0, 0.9) * np.exp(-((depth / rng.uniform(0.3, 0.6)) ** 2))
    rim = rng.uniform(0, 22) * np.exp(-(((depth - 0.9) / 0.12) ** 2))
    color = RBC_COLOR + rng.normal(0, 3, 3) + rng.normal(0, 7) - rim[..., None]
    _blend(canvas, window, color, cover * opacity * (1 - pallor))


def _draw_wbc(
    rng: np.random.Generator, canvas: np.ndarray, cell: Cell, window: Window, cover: np.ndarray, depth: np.ndarray
) -> None:
    """Draws grainy, semi-transparent cytoplasm and a dark nucleus with one to four lobes."""
    grain = rng.normal(0, 9, (*cover.shape, 1))
    color = CYTOPLASM_COLOR + rng.normal(0, 8, 3)
    _blend(canvas, window, color + grain, cover * rng.uniform(0.55, 0.9))
    nucleus_color, nucleus_opacity = NUCLEUS_COLOR + rng.normal(0, 9, 3), rng.uniform(0.75, 0.95)
    lobes = rng.integers(1, 5)
    direction = rng.uniform(0, 2 * np.pi)
    for _ in range(lobes):
        # Several lobes are smaller and farther out; a single one fills most of the cell.
        reach = cell.mean_radius * (rng.uniform(0.25, 0.4) if lobes > 1 else rng.uniform(0, 0.15))
        size = cell.mean_radius * (rng.uniform(0.32, 0.44) if lobes > 1 else rng.uniform(0.55, 0.75))
        x, y = cell.x + reach * np.cos(direction), cell.y + reach * np.sin(direction)
        lobe = Cell(WBC, x, y, (size * 1.15, size / 1.15), rng.uniform(0, np.pi), cell.waves)
        _draw_lobe(rng, canvas, lobe, nucleus_color, nucleus_opacity)
        direction += 2 * np.pi / lobes + rng.normal(0, 0.3)


def _draw_lobe(rng: np.random.Generator, canvas: np.ndarray, lobe: Cell, color: np.ndarray, opacity: float) -> None:
    window, distance, radius = _window(lobe, canvas.shape)
    cover = np.clip((radius - distance) / 2 + 0.5, 0, 1)
    _blend(canvas, window, color + rng.normal(0, 8, (*cover.shape, 1)), cover * opacity)


def _draw_platelet(
    rng: np.random.Generator, canvas: np.ndarray, cell: Cell, window: Window, cover: np.ndarray, depth: np.ndarray
) -> None:
    """Draws a small, grainy, violet body that fades toward its outline."""
    grain = rng.normal(0, 12, (*cover.shape, 1))
    color = PLATELET_COLOR + rng.normal(0, 10, 3)
    _blend(canvas, window, color + grain, cover * rng.uniform(0.5, 0.9) * (1 - 0.3 * depth.clip(0, 1)))


def _draw_smudges(rng: np.random.Generator, canvas: np.ndarray, scale: float) -> None:
    """Draws unlabeled clutter below the cells: out-of-focus stains in the colors of the cells."""
    for _ in range(rng.integers(2, 7)):
        color = (RBC_COLOR, CYTOPLASM_COLOR, PLATELET_COLOR)[rng.integers(3)] + rng.normal(0, 8, 3)
        _draw_soft_spot(rng, canvas, scale * rng.uniform(3, 11), color, rng.uniform(0.1, 0.35))


def _draw_specks(rng: np.random.Generator, canvas: np.ndarray, scale: float) -> None:
    """Draws unlabeled clutter above the cells: dark dust and bright reflections, smaller than any platelet."""
    for _ in range(rng.integers(2, 9)):
        color = np.array([70.0, 55.0, 80.0]) if rng.random() < 0.5 else np.array([245.0, 238.0, 240.0])
        _draw_soft_spot(rng, canvas, scale * rng.uniform(0.7, 1.4), color, rng.uniform(0.4, 0.8))


def _draw_soft_spot(
    rng: np.random.Generator, canvas: np.ndarray, sigma: float, color: np.ndarray, opacity: float
) -> None:
    """Blends in a Gaussian spot of width ``sigma`` (in pixels) at a random position."""
    height, width = canvas.shape[:2]
    x, y = rng.uniform(0, width), rng.uniform(0, height)
    flat, angle = rng.uniform(0.5, 1), rng.uniform(0, np.pi)
    down, right = np.mgrid[:height, :width] + 0.5
    along = (right - x) * np.cos(angle) + (down - y) * np.sin(angle)
    across = (down - y) * np.cos(angle) - (right - x) * np.sin(angle)
    spot = np.exp(-(along**2 + (across / flat) ** 2) / (2 * sigma**2))
    _blend(canvas, (slice(None), slice(None)), color, opacity * spot)


def _photograph(rng: np.random.Generator, canvas: np.ndarray, scale: float) -> np.ndarray:
    """Returns the canvas as seen by a camera: exposed, slightly out of focus and noisy, uint8."""
    exposed = canvas * rng.uniform(0.85, 1.08) + rng.normal(0, 4, 3)
    picture = Image.fromarray(np.clip(exposed, 0, 255).astype(np.uint8))
    blurred = np.asarray(picture.filter(ImageFilter.GaussianBlur(scale * rng.uniform(0.3, 1.2))), dtype=np.float64)
    noisy = blurred + rng.normal(0, rng.uniform(2, 7), blurred.shape)
    return np.clip(noisy.round(), 0, 255).astype(np.uint8)
