"""The evaluator that fits a data set."""

from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, LVISEvaluator, PascalVOCDetectionEvaluator

from ..errors import D2kdError


def build_evaluator(name: str, output_dir: str) -> DatasetEvaluator:
    """Makes the evaluator that a data set's ``evaluator_type`` names, as detectron2's tools/train_net.py does.

    Args:
        name: of the data set.
        output_dir: where COCO's and LVIS's evaluators write their results.

    Raises:
        D2kdError: the data set names no type that detectors are evaluated by.
    """
    kind = MetadataCatalog.get(name).get("evaluator_type", None)
    if kind in ("coco", "coco_panoptic_seg"):
        return COCOEvaluator(name, output_dir=output_dir)
    if kind == "lvis":
        try:
            return LVISEvaluator(name, output_dir=output_dir)
        except ImportError as error:
            raise D2kdError(f"evaluating {name} needs the package lvis: install it with pip install lvis") from error
    if kind == "pascal_voc":
        return PascalVOCDetectionEvaluator(name)
    raise D2kdError(
        f"data set {name} has the evaluator_type {kind!r}; set MetadataCatalog.get({name!r}).evaluator_type to coco, "
        "lvis or pascal_voc, or override build_evaluator of d2kd.engine.Trainer"
    )
