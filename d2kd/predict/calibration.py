"""Images to calibrate an INT8 file with."""

from pathlib import Path
from typing import Iterator, List, Sequence

from detectron2.data import DatasetCatalog
from torch import Tensor
from tqdm import tqdm

from ..errors import D2kdError
from .data_sets import find_data
from .inputs import find_inputs
from .predictor import Predictor
from .write import read_if_possible


def find_calibration(text: str, train_sets: Sequence[str], count: int, folder: Path) -> List[Path]:
    """Finds images for calibration, evenly spread over those that there are.

    Args:
        text: a folder of images, own data as for train_net.py's --val-data, or the name of a registered data set; ""
            for the config's training set.
        train_sets: names of the data sets that the config trains on.
        count: how many images, at most.
        folder: where own data that are not in COCO's format are converted to.

    Raises:
        D2kdError: there are none.
    """
    if count < 1:
        raise D2kdError(f"--calibration-images is {count}; it must be 1 or more")
    found = _images_in(text) if Path(text or "-").is_dir() else _images_of([text] if text else train_sets, folder)
    if not found:
        raise D2kdError("--int8 has no images for calibration: name a folder of images, or data as train.json:images")
    count = min(count, len(found))
    return [found[i * len(found) // count] for i in range(count)]


def _images_in(folder: str) -> List[Path]:
    return [entry.path for entry in find_inputs([folder]) if not entry.is_video]


def _images_of(texts: Sequence[str], folder: Path) -> List[Path]:
    found: List[Path] = []
    for text in texts:
        name = find_data(text, folder)[0]
        try:
            found += [Path(entry["file_name"]) for entry in DatasetCatalog.get(name)]
        except OSError as error:
            raise D2kdError(
                f"--int8: data set {name} is not here ({error.filename} cannot be read); name images for calibration, "
                "a folder or data as train.json:images"
            ) from error
    return found


def calibration_images(files: Sequence[Path], predictor: Predictor) -> Iterator[Tensor]:
    """Reads images and prepares each for a detector, (3, H, W) float32; leaves out, with a warning, what is damaged.

    Args:
        files: from :func:`find_calibration`.
        predictor: of the detector.

    Raises:
        D2kdError: none can be read.
    """
    count = 0
    for file in tqdm(files, unit="image", desc="calibration", disable=None):
        image = read_if_possible(file)
        if image is not None:
            count += 1
            yield predictor.prepare(image).float()
    if not count:
        raise D2kdError(f"none of the {len(files)} images for calibration can be read; fix or replace {files[0]}")
