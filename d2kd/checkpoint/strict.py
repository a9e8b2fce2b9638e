"""Strict loading of weights: a detector that was silently loaded only in part is the worst kind of teacher."""

import re
from typing import Any, Dict, List

from detectron2.modeling.backbone.fpn import LastLevelP6P7
from torch import nn

from ..errors import D2kdError
from ..keys import key
from .mmdet import convert_mmdet, is_mmdet, mmdet_detector
from .names import plain_state
from .safe import CONFIG_HINT, SafeCheckpointer, mismatches

_HARMLESS = re.compile(r"(.*\.)?(num_batches_tracked|pixel_mean|pixel_std)|distill\..*|(.*\.)?anchor_generator\..*")


def load_strict(model: nn.Module, path: str) -> None:
    """Loads all weights of a model from a file, or raises an error.

    Args:
        model: a detector, plain or wrapped in DistributedDataParallel.
        path: a detectron2 or mmdetection checkpoint or a zoo file; anything that detectron2's PathManager resolves.

    Raises:
        D2kdError: the path is empty or missing, the file has no weights, or its keys or shapes differ from the model's.
    """
    StrictCheckpointer(model, save_to_disk=False).load(path, checkpointables=[])


class StrictCheckpointer(SafeCheckpointer):
    """A SafeCheckpointer that raises D2kdError where its base classes only log a warning.

    Also reads mmdetection's detectors. For files written by torch, names are never matched by heuristics, whatever
    ``?matching_heuristics`` says. Missing or unexpected ``num_batches_tracked``, ``pixel_mean`` and ``pixel_std`` are
    harmless and allowed, as are unexpected ``distill.*`` (adapters of a distilled student) and ``anchor_generator.*``.
    """

    def load(self, path: str, *args: Any, **kwargs: Any) -> Dict[str, Any]:
        """Loads a file, see :func:`load_strict` and the base class."""
        if not path:
            raise D2kdError("the path of the weights is empty; set it to a checkpoint file (key WEIGHTS)")
        return super().load(path, *args, **kwargs)

    def _load_file(self, filename: str) -> Dict[str, Any]:
        loaded = super()._load_file(filename)
        if self.is_legacy:
            return loaded
        # Older versions of detectron2 match the names of every file by heuristics, which is not strict.
        loaded = {**loaded, "matching_heuristics": False}
        if is_mmdet(loaded["model"]):
            loaded["model"] = self._convert(loaded["model"])
        return loaded

    def _convert(self, state: Dict[str, Any]) -> Dict[str, Any]:
        try:
            self._check_p7(mmdet_detector(plain_state(state)))
            return convert_mmdet(state, *_anchor_grid(self.model))
        except D2kdError as error:
            raise D2kdError(f"{self._filename}: {error}") from error

    def _check_p7(self, detector: str) -> None:
        extra = getattr(getattr(self.model, "backbone", None), "top_block", None)
        has_relu = isinstance(extra, LastLevelP6P7) or getattr(extra, "relu", False)
        if extra is not None and has_relu != (detector == "FCOS"):
            raise D2kdError(
                f"mmdetection's {detector} has {'no' if has_relu else 'a'} ReLU between P6 and P7, "
                "unlike the model, so its weights would see features they were not trained on; set MODEL.BACKBONE.NAME "
                f'"build_extra_fpn_backbone" and MODEL.FPN.EXTRA.RELU {not has_relu}'
            )

    def _load_model(self, checkpoint: Dict[str, Any]) -> Any:
        names = {re.sub(r"^module\.", "", str(name)) for name in checkpoint["model"]}
        incompatible = super()._load_model(checkpoint)
        missing = incompatible.missing_keys
        if not self.is_legacy:
            missing = [name for name in self.model.state_dict() if name not in names]  # FrozenBN hides missing buffers
        wrong = mismatches(_harmful(missing), _harmful(incompatible.unexpected_keys), incompatible.incorrect_shapes)
        if wrong:
            hint = self._classes_hint(incompatible.incorrect_shapes) or CONFIG_HINT
            raise D2kdError(f"{self._filename} does not fit the model: {wrong}; {hint}")
        return incompatible

    def _classes_hint(self, shapes: List[Any]) -> str:
        """What to do if the file is a detector of the same kind with another number of classes; "" if it is not."""
        classes = getattr(self.model, "num_classes", 0)
        if not shapes or not classes or not all(name.startswith("head.cls_score.") for name, *_ in shapes):
            return ""
        _, in_file, in_model = shapes[0]
        return (
            f"the file holds a detector of {in_file[0] * classes // in_model[0]} classes and the config has {classes}: "
            "train one on the same data with train_net.py, or set NUM_CLASSES to the file's number (for a teacher in "
            f"{key('MODEL.DISTILL.TEACHER.OPTS')}, with {key('MODEL.DISTILL.CLASS_MAP')} or methods that read features "
            "only)"
        )


def _harmful(names: List[str]) -> List[str]:
    return [name for name in names if not _HARMLESS.fullmatch(name)]


def _anchor_grid(model: nn.Module) -> List[int]:
    """Returns the number of aspect ratios and of sizes of the model's anchors, or 3 and 3 if it has no anchors."""
    generator = getattr(model, "anchor_generator", None)
    if generator is None:
        return [3, 3]
    left, top, right, bottom = next(iter(generator.cell_anchors)).unbind(dim=1)
    ratios = len(((bottom - top) / (right - left)).log().mul(1e3).round().unique())
    return [ratios, len(left) // ratios]
