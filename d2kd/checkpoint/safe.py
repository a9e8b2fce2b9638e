"""Loading weights into a model as detectron2 does, also in part, but without running code from the file."""

import os
from typing import Any, Dict, List
from urllib.parse import urlparse

from detectron2.checkpoint import DetectionCheckpointer
from fvcore.common.checkpoint import Checkpointer

from ..errors import D2kdError
from . import files
from .mmdet import is_mmdet
from .names import some

CONFIG_HINT = "check that the model's config is the one the file was trained with"
_CONVERT_HINT = "convert it with python -m d2kd.checkpoint.convert"


class _SafeFiles(Checkpointer):
    """Stands between DetectionCheckpointer and fvcore, whose ``torch.load`` is not :func:`files.read`."""

    def _load_file(self, f: str) -> Dict[str, Any]:
        return files.read(f)


class SafeCheckpointer(DetectionCheckpointer, _SafeFiles):
    """A DetectionCheckpointer for files from anywhere.

    Reads what its parent reads (``.pth``, the zoo's and Caffe2's ``.pkl``, pycls's ``.pyth``) and ``.safetensors``, all
    through :func:`files.read`. As in the parent, a backbone may be loaded alone: what is missing, left over or of
    another shape is one warning. Raises D2kdError where no weight at all fits, and for a file that cannot be read.
    """

    _filename = ""

    def load(self, path: str, *args: Any, **kwargs: Any) -> Dict[str, Any]:
        """Loads a file; see the parent's ``load``. An empty path loads nothing.

        Raises:
            D2kdError: the file is missing, cannot be read, holds no weights, or none that fits the model.
        """
        if path:
            self._check_path(path)
        try:
            return super().load(path, *args, **kwargs)
        finally:
            self._parsed_url_during_load = None  # the parent forgets to after an error and refuses the next load

    def _check_path(self, path: str) -> None:
        try:
            local = self.path_manager.get_local_path(urlparse(path)._replace(query="").geturl())
        except (OSError, RuntimeError, KeyError) as error:  # the latter two: detectron2's catalog does not know it
            raise D2kdError(f"{path} could not be fetched ({error}); download it by hand and give its path") from error
        if not os.path.isfile(local):
            raise D2kdError(f"{path}: no such file; check the path of the weights")

    @property
    def is_legacy(self) -> bool:
        """Whether the file is of a kind (zoo, Caffe2, pycls) whose names and statistics the parents fill in."""
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
            except ValueError as error:  # a query it does not know
                raise D2kdError(f"{filename}: {error}; only ?matching_heuristics=True is known") from error
        if not isinstance(loaded["model"], dict):
            raise D2kdError(f"{filename} holds no state dict under its key model; save a state dict there")
        return loaded

    def _load_model(self, checkpoint: Dict[str, Any]) -> Any:
        names = [str(name) for name in checkpoint["model"]]
        from_mmdet = is_mmdet(checkpoint["model"])
        try:
            incompatible = super()._load_model(checkpoint)
        except (ValueError, TypeError, AttributeError, RuntimeError) as error:
            # A value that is no tensor, a name that is no string.
            text = " ".join(str(error).split())
            raise D2kdError(f"{self._filename} holds other things than weights ({text}); save a state dict") from error
        wanted = [name for name, _ in self.model.named_parameters()]  # FrozenBN fills in buffers, none is ever missing
        if set(wanted) <= set(incompatible.missing_keys):
            fix = _CONVERT_HINT if from_mmdet else CONFIG_HINT
            raise D2kdError(
                f"{self._filename}: {_nothing_fits(names, wanted[0], incompatible.incorrect_shapes)}; {fix}"
            )
        return incompatible

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        found = mismatches(incompatible.missing_keys, incompatible.unexpected_keys, incompatible.incorrect_shapes)
        if found:
            self.logger.warning("%s fits the model in part only, the rest stays as it is: %s", self._filename, found)


def _nothing_fits(names: List[str], expected: str, shapes: List[Any]) -> str:
    if shapes:
        return f"no tensor is of the model's shape: {mismatches([], [], shapes)}"
    first = f"first: {names[0]}; " if names else ""
    return f"none of its {len(names)} keys match ({first}expected e.g. {expected})"


def mismatches(missing: List[str], unexpected: List[str], shapes: List[Any]) -> str:
    """Says what does not fit, ``""`` if everything does.

    Args:
        missing: names that the file lacks; those in ``shapes`` are not counted again.
        unexpected: names that the model lacks.
        shapes: (name, shape in the file, shape in the model) of tensors that differ in shape.
    """
    differ = {name: f"{name} {in_file} in the file, {in_model} in the model" for name, in_file, in_model in shapes}
    kinds = {
        "missing in the file": [name for name in missing if name not in differ],
        "unknown to the model": unexpected,
        "of another shape": list(differ.values()),
    }
    return "; ".join(f"{len(found)} {kind} ({some(found)})" for kind, found in kinds.items() if found)


def _legacy_format(data: Dict[str, Any]) -> Dict[str, Any]:
    """Returns a zoo's, Caffe2's or pycls's file as a checkpoint whose names detectron2 knows how to match."""
    if "model" in data and "__author__" in data:
        return data
    author, dropped = ("pycls", "num_batches_tracked") if "model_state" in data else ("Caffe2", "_momentum")
    state = data.get("model_state", data.get("blobs", data))  # Caffe2's classifiers are blobs, its detectors have some
    if isinstance(state, dict):
        state = {name: value for name, value in state.items() if not str(name).endswith(dropped)}
    return {"model": state, "__author__": author, "matching_heuristics": True}
