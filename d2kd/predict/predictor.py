"""A detector with what belongs to it: how images are prepared for it, and what its classes are called."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import List, Optional, Sequence, Tuple, cast

import numpy as np
import torch
from detectron2.config import CfgNode, instantiate
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.structures import Instances
from omegaconf import OmegaConf
from torch import Tensor, nn

from ..checkpoint import load_strict
from ..contract import channel_order, num_classes
from ..data.coco import read_classes
from ..data.own import OwnData
from ..engine.recipe import Recipe
from ..engine.sources import DATA_FILE
from ..engine.styles import load_for_evaluation
from ..errors import D2kdError, known_mistakes
from ..export import evaluation_edges
from ..exported import Categories, ExportReport, is_exported, load_exported, read_report
from ..report.runs import ReportRun


@dataclass
class Predictor:
    """Finds objects in an image.

    Attributes:
        model: takes and returns what detectron2's models do.
        input_format: its channel order, "BGR" or "RGB".
        augmentations: how images are resized for it.
        categories: names of its classes by category id, in their order; empty if unknown.
    """

    model: nn.Module
    input_format: str
    augmentations: T.AugmentationList
    categories: Categories

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> Instances:
        """Finds the objects in an image, (H, W, 3) uint8, BGR; boxes are in its pixels, on the CPU.

        Raises:
            D2kdError: the model detects no objects, or more classes than it has names.
        """
        height, width = image.shape[:2]
        found = self.model([{"image": self.prepare(image), "height": height, "width": width}])[0]
        if "instances" not in found:
            raise D2kdError(f"{type(self.model).__name__} does not detect objects; name the config of a detector")
        instances = found["instances"].to("cpu")
        highest = int(instances.pred_classes.max()) if len(instances) else -1
        if self.categories and highest >= len(self.categories):
            raise D2kdError(
                f"the detector finds class {highest}, but there are {len(self.categories)} names of classes; give all "
                "with --names, or with the data set that it was trained on"
            )
        return instances

    def prepare(self, image: np.ndarray) -> Tensor:
        """Resizes an image, (H, W, 3) uint8, BGR, for the model: (3, H', W') uint8, in its channel order."""
        given = T.AugInput(image if self.input_format == "BGR" else image[:, :, ::-1])
        self.augmentations(given)
        return torch.from_numpy(np.ascontiguousarray(given.image.transpose(2, 0, 1)))

    def with_names(self, names: Sequence[str], data_set: str = "") -> "Predictor":
        """A predictor with other names of classes: given ones, or those of a registered data set.

        Without either, classes whose names are unknown get numbers.

        Raises:
            D2kdError: the detector has another number of classes.
        """
        given = dict(enumerate(names)) or (registered_categories(data_set) if data_set else {})
        count = num_classes(self.model)
        if given and count not in (None, len(given)):
            raise D2kdError(f"there are {len(given)} names of classes, but the detector has {count} classes; name each")
        numbers = {i: f"class {i}" for i in range(count or 0)}
        return replace(self, categories=given or self.categories or numbers)


def open_predictor(
    weights: str,
    config_file: str = "",
    opts: Sequence[str] = (),
    device: str = "cpu",
    data: Optional[OwnData] = None,
) -> Predictor:
    """Loads a detector, without its teacher, from a checkpoint or a file that tools/export.py wrote.

    Args:
        weights: any checkpoint with a config, or an exported file (.onnx, .ts) with its export.json.
        config_file: YAML, LazyConfig or a name of the zoo. A checkpoint in the folder of its run needs none.
        opts: overrides of the config, in its own style.
        device: where it runs.
        data: own data, registered, which the config is adapted to.

    Raises:
        D2kdError: a file is missing, or the weights do not fill the detector.
    """
    if is_exported(weights):
        if config_file or opts:
            raise D2kdError(f"{weights} is an exported file, which needs no config; leave config and overrides out")
        return _open_exported(weights, device, data)
    if not config_file:
        config_file, own = _config_of_run(weights)
        opts = [*own, *opts]
    recipe = load_for_evaluation(config_file, opts, data).changed("MODEL.DEVICE", device)
    with known_mistakes():
        model = recipe.build_model().eval()
    load_strict(model, weights)
    input_format, augmentations = preparation(recipe)
    return Predictor(model, input_format, augmentations, categories_of(recipe, weights, num_classes(model)))


def _open_exported(weights: str, device: str, data: Optional[OwnData]) -> Predictor:
    report = read_report(weights)
    if data:
        report = report._replace(categories=read_classes(data.val[0].json_file))
    return predictor_of(load_exported(weights, report.score_threshold, device), report)


def predictor_of(model: nn.Module, report: ExportReport) -> Predictor:
    """The predictor of a detector, or of a file that it was exported to.

    Args:
        model: takes and returns what detectron2's models do.
        report: from :func:`describe_export`.
    """
    shortest, longest = report.edges
    resize = [T.ResizeShortestEdge([shortest] * 2, longest)] if shortest else []
    return Predictor(model, report.input_format, T.AugmentationList(resize), report.categories)


def _config_of_run(weights: str) -> Tuple[str, List[str]]:
    """The config of the run in whose folder a checkpoint lies, and overrides."""
    run = ReportRun("", Path(weights).parent)
    if not Path(weights).exists():
        raise D2kdError(f"{weights}: no such file")
    if not run.values:
        raise D2kdError(f"{weights} does not lie in the folder of its run; name its config with --config-file")
    return run.config


def describe_export(config_file: str, opts: Sequence[str], weights: str, detector: nn.Module) -> ExportReport:
    """What export.json says of a detector, by the config that it comes from."""
    recipe = load_for_evaluation(config_file, opts)
    threshold = float(cast(float, detector.test_score_thresh))
    edges = evaluation_edges(recipe.config)
    categories = categories_of(recipe, weights, num_classes(detector))
    return ExportReport(channel_order(detector), edges, threshold, categories)


def preparation(recipe: Recipe) -> Tuple[str, T.AugmentationList]:
    """Channel order and resizing of a config's evaluation.

    Raises:
        D2kdError: a LazyConfig does not say.
    """
    if isinstance(recipe.config, CfgNode):
        mapper = DatasetMapper(recipe.config, is_train=False)
    else:
        node = OmegaConf.select(recipe.config, "dataloader.test.mapper")
        mapper = None if node is None else instantiate(node)
    if not (hasattr(mapper, "image_format") and hasattr(mapper, "augmentations")):
        raise D2kdError("the config does not tell how to resize images: give it detectron2's dataloader.test.mapper")
    return mapper.image_format, mapper.augmentations


def categories_of(recipe: Recipe, weights: str, count: Optional[int]) -> Categories:
    """Names of classes by category id: of the config's data sets, or of the run that a checkpoint belongs to.

    Args:
        recipe: of the config.
        weights: the checkpoint.
        count: number of the detector's classes, if it says.

    Returns:
        Them in the order of the detector's classes; empty if no data set with as many classes is here.
    """
    names = [name for name in (*recipe.test_sets, *recipe.train_sets) if name in DatasetCatalog]
    recorded = Path(weights).parent / DATA_FILE
    sets = json.loads(recorded.read_text()).values() if recorded.is_file() else ()
    files = [data["file"] for data in sets if Path(data["file"]).is_file()]
    found = [*map(registered_categories, names), *map(read_classes, files)]
    return next((x for x in found if x and count in (None, len(x))), {})


def registered_categories(name: str) -> Categories:
    """Names of the classes of a registered data set by category id; empty if its file is not here."""
    metadata = MetadataCatalog.get(name)
    names, file = metadata.get("thing_classes"), metadata.get("json_file")
    if not names:
        return read_classes(file) if file and Path(file).is_file() else {}
    numbers = metadata.get("thing_dataset_id_to_contiguous_id") or {i: i for i in range(len(names))}
    return {category: names[number] for category, number in sorted(numbers.items(), key=lambda pair: pair[1])}
