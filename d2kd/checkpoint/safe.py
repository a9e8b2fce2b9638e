"""Loading weights like detectron2, including partial loading, but without running code from the file."""

import os
import re
from typing import Any, Dict, List
from urllib.parse import urlparse

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from fvcore.common.checkpoint import Checkpointer
from torch import Tensor

from ..errors import D2kdError
from . import files
from .mmdet import is_mmdet
from .names import some

CONFIG_HINT = "check that the model's config is the one the file was trained with"
_CONVERT_HINT = "convert it with python -m d2kd.checkpoint.convert"


class _SafeFiles(Checkpointer):
    """Comes between DetectionCheckpointer and fvcore's Checkpointer to replace its ``torch.load``."""

    def _load_file(self, f: str) -> Dict[str, Any]:
        return files.read(f)


class SafeCheckpointer(DetectionCheckpointer, _SafeFiles):
    """A DetectionCheckpointer for untrusted files.

    Reads the formats of the base class (``.pth``, the zoo's and Caffe2's ``.pkl``, pycls's ``.pyth``) and
    ``.safetensors``, all through :func:`files.read`. As in the base class, a file may hold only a backbone: missing and
    unexpected tensors and those with different shapes give one warning. Raises D2kdError if no weights fit at all, or
    if the file cannot be read.
    """

    _filename = ""

    def load(self, path: str, *args: Any, **kwargs: Any) -> Dict[str, Any]:
        """Loads a file, see the base class. An empty path loads nothing.

        Raises:
            D2kdError: the file is missing, cannot be read, has no weights, or none that fit the model.
        """
        if path:
            self._check_path(path)
        try:
            return super().load(path, *args, **kwargs)
        finally:
            self._parsed_url_during_load = None  # otherwise the base class refuses to load again after an error

    def _check_path(self, path: str) -> None:
        try:
            local = self.path_manager.get_local_path(urlparse(path)._replace(query="").geturl())
        except (OSError, RuntimeError, KeyError) as error:  # the last two: unknown to detectron2's catalog
            raise D2kdError(
                f"{path} could not be downloaded ({error}); download it manually and set its path"
            ) from error
        if not os.path.isfile(local):
            raise D2kdError(f"{path}: no such file; check the path of the weights")

    @property
    def is_legacy(self) -> bool:
        """Whether the base classes convert names and statistics for the format of the file (zoo, Caffe2, pycls)."""
        return self._filename.endswith((".pkl", ".pyth"))

    def _load_file(self, filename: str) -> Dict[str, Any]:
        self._filename = filename
        if self.is_legacy:
            loaded = _legacy_format(files.read(filename))
        else:
            try:
                loaded = super()._load_file(filename)
            except D2kdError:
                raise
            except ValueError as error:  # an unknown query
                raise D2kdError(f"{filename}: {error}; only ?matching_heuristics=True is supported") from error
        if not isinstance(loaded["model"], dict):
            raise D2kdError(f"{filename} has no state dict under its key 'model'; save one there")
        return loaded

    def _load_model(self, checkpoint: Dict[str, Any]) -> Any:
        names = [str(name) for name in checkpoint["model"]]
        self._check_kinds(checkpoint["model"])
        from_mmdet = is_mmdet(checkpoint["model"])
        try:
            incompatible = super()._load_model(checkpoint)
        except (ValueError, TypeError, AttributeError, RuntimeError) as error:
            # A value that is not a tensor, or a name that is not a string.
            text = " ".join(str(error).split())
            raise D2kdError(
                f"{self._filename} holds values that are not weights ({text}); save a state dict"
            ) from error
        wanted = [name for name, _ in self.model.named_parameters()]  # buffers are never missing: FrozenBN adds its own
        if set(wanted) <= set(incompatible.missing_keys):
            fix = _CONVERT_HINT if from_mmdet else CONFIG_HINT
            raise D2kdError(
                f"{self._filename}: {_nothing_fits(names, wanted[0], incompatible.incorrect_shapes)}; {fix}"
            )
        return incompatible

    def _check_kinds(self, state: Dict[str, Any]) -> None:
        """Raises D2kdError for names that are no text of one line, and for weights that are no real numbers.

        torch would cast int8, bool and complex numbers silently to those of the model.
        """
        own_state = self.model.state_dict()
        for name, value in state.items():
            if not str(name).isprintable():  # fvcore and detectron2 log names as they are
                raise D2kdError(f"{self._filename} holds the name {name}, which no detector has; save a state dict")
            own = own_state.get(re.sub(r"^module\.", "", str(name)))
            if own is not None and own.is_floating_point() and not _is_real(value):
                raise D2kdError(
                    f"{self._filename}: {name} holds {value.dtype}, the model {own.dtype}; save the weights as they "
                    "were trained, not quantized or converted"
                )

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        found = mismatches(incompatible.missing_keys, incompatible.unexpected_keys, incompatible.incorrect_shapes)
        if found:
            self.logger.warning("%s fits only part of the model; the rest is not changed: %s", self._filename, found)


def _is_real(value: Any) -> bool:
    """Whether a value is an array of floating-point numbers, or no array at all, of which others complain."""
    if isinstance(value, Tensor):
        return value.is_floating_point() and value.layout == torch.strided
    return not isinstance(value, np.ndarray) or value.dtype.kind == "f"


def _nothing_fits(names: List[str], expected: str, shapes: List[Any]) -> str:
    if shapes:
        return f"no tensor has the shape that the model expects: {mismatches([], [], shapes)}"
    first = f"first: {names[0]}; " if names else ""
    return f"none of its {len(names)} keys match ({first}expected e.g. {expected})"


def mismatches(missing: List[str], unexpected: List[str], shapes: List[Any]) -> str:
    """Describes what does not fit, or returns ``""`` if everything does.

    Args:
        missing: names that are not in the file; those in ``shapes`` are not counted again.
        unexpected: names that are not in the model.
        shapes: (name, shape in the file, shape in the model) of tensors with different shapes.
    """
    differ = {name: f"{name} {in_file} in the file, {in_model} in the model" for name, in_file, in_model in shapes}
    kinds = {
        "missing in the file": [name for name in missing if name not in differ],
        "unknown to the model": unexpected,
        "with a different shape": list(differ.values()),
    }
    return "; ".join(f"{len(found)} {kind} ({some(found)})" for kind, found in kinds.items() if found)


def _legacy_format(data: Dict[str, Any]) -> Dict[str, Any]:
    """Converts a file of the zoo, Caffe2 or pycls to a checkpoint whose names detectron2 can match."""
    if "model" in data and "__author__" in data:
        return data
    author, dropped = ("pycls", "num_batches_tracked") if "model_state" in data else ("Caffe2", "_momentum")
    state = data.get(
        "model_state", data.get("blobs", data)
    )  # in Caffe2, classifiers are blobs and detectors contain them
    if isinstance(state, dict):
        state = {name: value for name, value in state.items() if not str(name).endswith(dropped)}
    return {"model": state, "__author__": author, "matching_heuristics": True}
