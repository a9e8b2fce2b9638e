"""Loading weights with no leniency: a detector that was silently loaded in part is the worst kind of teacher."""

import os
import re
from typing import Any, Dict, List
from urllib.parse import urlparse

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from fvcore.common.checkpoint import Checkpointer
from torch import nn

from ..errors import D2kdError
from . import files
from .mmdet import convert_mmdet, is_mmdet, mmdet_detector
from .names import plain_state, some

_HARMLESS = re.compile(r"(.*\.)?(num_batches_tracked|pixel_mean|pixel_std)|distill\..*|(.*\.)?anchor_generator\..*")
_MEND = "check that the model's config is the one the file was trained with"


def load_strict(model: nn.Module, path: str) -> None:
    """Loads all of a model's weights from a file, or raises.

    Args:
        model: a detector; plain, or wrapped in DistributedDataParallel.
        path: anything detectron2's PathManager resolves: a detectron2 or mmdetection checkpoint, a zoo file.

    Raises:
        D2kdError: the path is empty or missing, the file holds no weights, or its keys or shapes are not the model's.
    """
    StrictCheckpointer(model, save_to_disk=False).load(path, checkpointables=[])


class _SafeFiles(Checkpointer):
    """Stands between DetectionCheckpointer and fvcore, whose ``torch.load`` unpickles anything on torch < 2.6."""

    def _load_file(self, f: str) -> Dict[str, Any]:
        return files.read(f)


class StrictCheckpointer(DetectionCheckpointer, _SafeFiles):
    """A DetectionCheckpointer that raises D2kdError where its parents log a warning and go on.

    Reads mmdetection's RetinaNet as well. Names are never guessed in a file written by torch, whatever
    ``?matching_heuristics`` says. Harmless and allowed: a missing or additional ``num_batches_tracked``,
    ``pixel_mean`` or ``pixel_std``, additional ``distill.*`` (a distiller's adapters) and ``anchor_generator.*``.
    """

    def load(self, path: str, *args: Any, **kwargs: Any) -> Dict[str, Any]:
        """Loads a file; see :func:`load_strict` and the parent's ``load``."""
        self._check_path(path)
        try:
            return super().load(path, *args, **kwargs)
        finally:
            self._parsed_url_during_load = None  # the parent forgets to after an error and refuses the next load

    def _check_path(self, path: str) -> None:
        if not path:
            raise D2kdError("the path of the weights is empty; set it to a checkpoint file (key WEIGHTS)")
        try:
            local = self.path_manager.get_local_path(urlparse(path)._replace(query="").geturl())
        except OSError as error:
            raise D2kdError(f"{path} could not be fetched ({error}); download it by hand and give its path") from error
        if not os.path.isfile(local):
            raise D2kdError(f"{path}: no such file; check the path of the weights")

    def _load_file(self, filename: str) -> Dict[str, Any]:
        self._filename = filename
        try:
            loaded = super()._load_file(filename)
        except D2kdError:
            raise
        except Exception as error:  # a damaged pickle raises nearly anything
            raise D2kdError(f"{filename} cannot be read as weights ({error}); fetch it again") from error
        return loaded if self._is_legacy else self._plain(loaded)

    @property
    def _is_legacy(self) -> bool:
        """Whether the file is of a kind (zoo, Caffe2, pycls) whose names and statistics the parents fill in."""
        return self._filename.endswith((".pkl", ".pyth"))

    def _plain(self, loaded: Dict[str, Any]) -> Dict[str, Any]:
        # Older detectron2 guesses the names of every file; a guess is not what "strict" means.
        loaded = {**loaded, "matching_heuristics": False}
        if not isinstance(loaded["model"], dict):
            raise D2kdError(f"{self._filename} holds no state dict under its key model; save a state dict there")
        if is_mmdet(loaded["model"]):
            loaded["model"] = self._convert(loaded["model"])
        return loaded

    def _convert(self, state: Dict[str, Any]) -> Dict[str, Any]:
        self._check_p7(mmdet_detector(plain_state(state)))
        try:
            return convert_mmdet(state, *_anchor_grid(self.model))
        except D2kdError as error:
            raise D2kdError(f"{self._filename}: {error}") from error

    def _check_p7(self, detector: str) -> None:
        extra = getattr(getattr(self.model, "backbone", None), "top_block", None)
        has_relu = isinstance(extra, LastLevelP6P7) or getattr(extra, "relu", False)
        if extra is not None and has_relu != (detector == "FCOS"):
            raise D2kdError(
                f"{self._filename}: mmdetection's {detector} has {'no' if has_relu else 'a'} ReLU between P6 and P7, "
                "unlike the model, which would run on features it was not trained with; set MODEL.BACKBONE.NAME "
                f'"build_extra_fpn_backbone" and MODEL.FPN.EXTRA.RELU {not has_relu}'
            )

    def _load_model(self, checkpoint: Dict[str, Any]) -> Any:
        names = [re.sub(r"^module\.", "", str(name)) for name in checkpoint["model"]]
        try:
            incompatible = super()._load_model(checkpoint)
        except (ValueError, TypeError) as error:  # a value that is no tensor, a name that is no string
            raise D2kdError(f"{self._filename} holds other things than weights ({error}); save a state dict") from error
        shapes = {name: f"{name} {a} in the file, {b} in the model" for name, a, b in incompatible.incorrect_shapes}
        missing = [name for name in incompatible.missing_keys if name not in shapes]
        if not self._is_legacy:
            missing = [name for name in self.model.state_dict() if name not in names]  # FrozenBN hides its own
        self._refuse(names, missing, list(incompatible.unexpected_keys), list(shapes.values()))
        return incompatible

    def _refuse(self, names: List[str], missing: List[str], unexpected: List[str], shapes: List[str]) -> None:
        missing = [name for name in missing if not _HARMLESS.fullmatch(name)]
        if missing and len(unexpected) == len(names):
            first = f"first: {names[0]}; " if names else ""
            raise D2kdError(
                f"{self._filename}: none of its {len(names)} keys match ({first}expected e.g. {missing[0]}); {_MEND}"
            )
        unexpected = [name for name in unexpected if not _HARMLESS.fullmatch(name)]
        kinds = {"missing in the file": missing, "unknown to the model": unexpected, "of another shape": shapes}
        wrong = [f"{len(found)} {kind} ({some(found)})" for kind, found in kinds.items() if found]
        if wrong:
            raise D2kdError(f"{self._filename} does not fit the model: {'; '.join(wrong)}; {_MEND}")


def _anchor_grid(model: nn.Module) -> List[int]:
    """Returns the numbers of aspect ratios and of sizes of the model's anchors; 3 and 3 if it has no anchors."""
    generator = getattr(model, "anchor_generator", None)
    if generator is None:
        return [3, 3]
    left, top, right, bottom = next(iter(generator.cell_anchors)).unbind(dim=1)
    ratios = len(((bottom - top) / (right - left)).log().mul(1e3).round().unique())
    return [ratios, len(left) // ratios]
