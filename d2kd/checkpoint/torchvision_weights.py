"""``torchvision://resnet18``: torchvision's ImageNet ResNets with detectron2's names, wherever a path is expected.

``torchvision:///path/to/resnet18-f37072fd.pth`` converts a local copy. Use the settings that these weights expect:
``INPUT.FORMAT RGB``, ``MODEL.PIXEL_MEAN [123.675, 116.28, 103.53]``, ``MODEL.PIXEL_STD [58.395, 57.12, 57.375]``,
``MODEL.RESNETS.STRIDE_IN_1X1 False``.
"""

import os
from http.client import HTTPException
from typing import IO, Any, Dict, List, Mapping

import torch
import torchvision
from detectron2.utils.file_io import PathHandler, PathManager
from iopath.common.file_io import file_lock
from torch import Tensor

from ..errors import D2kdError, nearest
from . import files
from .names import plain_state, resnet_name, some

PREFIX = "torchvision://"
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")


def register_torchvision() -> None:
    """Registers ``torchvision://`` with detectron2's PathManager. Calling it again is harmless."""
    PathManager.register_handler(TorchvisionHandler(), allow_override=True)


def convert_torchvision(state: Mapping[str, Any]) -> Dict[str, Tensor]:
    """Renames the tensors of a torchvision ResNet to detectron2's ``backbone.bottom_up.*`` and drops its classifier.

    Args:
        state: torchvision's state dict.

    Returns:
        detectron2 name -> tensor.

    Raises:
        D2kdError: there are keys that do not belong to a ResNet, or the last stage is missing.
    """
    plain = plain_state(state)
    return {new: plain[name] for name, new in torchvision_names(plain).items()}


def torchvision_names(state: Mapping[str, Tensor]) -> Dict[str, str]:
    """Returns detectron2's name of each tensor of a ResNet, except those of its classifier.

    Args:
        state: a plain state dict, from :func:`plain_state`.

    Raises:
        D2kdError: see :func:`convert_torchvision`.
    """
    names = {name: resnet_name(name) for name in state if not name.startswith("fc.")}
    if unknown := [name for name, new in names.items() if new is None]:
        raise D2kdError(f"these keys do not belong to a ResNet: {some(unknown)}; pass a torchvision ResNet")
    if "layer4.0.conv1.weight" not in names:
        raise D2kdError("layer4.0.conv1.weight is missing, so this is not a ResNet; pass a torchvision ResNet")
    return {name: new for name, new in names.items() if new is not None}


class TorchvisionHandler(PathHandler):
    """Resolves ``torchvision://NAME`` and ``torchvision:///path/to/FILE`` to a converted local file."""

    def _get_supported_prefixes(self) -> List[str]:
        # DetectionCheckpointer passes paths through urlparse, which turns torchvision:///a into torchvision:/a.
        return [PREFIX, "torchvision:/"]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        self._check_kwargs(kwargs)
        name = path[len("torchvision:") :]
        is_file = not name.startswith("//") or name.startswith("///")
        return _converted("/" + name.lstrip("/") if is_file else _downloaded(name[2:]))

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        return PathManager.open(self._get_local_path(path), mode, buffering=buffering, **kwargs)


def _cache() -> str:
    return os.path.join(torch.hub.get_dir(), "checkpoints")


def _downloaded(name: str) -> str:
    """Returns the path of torchvision's file in torch.hub's folder, after downloading it if it is missing."""
    if name not in RESNETS:
        raise D2kdError(f"{PREFIX}{name} is unknown; use one of {', '.join(RESNETS)}{nearest(name, RESNETS)}")
    url = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"].url
    target = os.path.join(_cache(), os.path.basename(url))
    if not os.path.isfile(target):
        _download(url, target)
    return target


def _download(url: str, target: str) -> None:
    sha256 = os.path.splitext(target)[0].rsplit("-", 1)[1]
    try:
        with file_lock(target):  # all workers of a machine ask at once
            if not os.path.isfile(target):
                torch.hub.download_url_to_file(url, target, hash_prefix=sha256, progress=False)
    except (OSError, RuntimeError, HTTPException) as error:  # RuntimeError: the hash does not match
        raise D2kdError(
            f"{url} could not be downloaded ({error}); download it manually into {os.path.dirname(target)}"
        ) from error


def _converted(source: str) -> str:
    """Returns a file with the converted weights: next to the source, or in torch.hub's folder if that is read-only."""
    if not os.path.isfile(source):
        raise D2kdError(f"{PREFIX}{source}: no such file; check the path")
    stamp = _stamp(source)
    name = os.path.splitext(os.path.basename(source))[0] + ".detectron2.pth"
    targets = [os.path.join(folder, name) for folder in (os.path.dirname(source), _cache())]
    for target in targets:
        if _is_fresh(target, stamp):
            return target
    return _write_first({"model": _convert_file(source), "source": stamp}, targets)


def _convert_file(source: str) -> Dict[str, Tensor]:
    loaded = files.read(source)
    try:
        return convert_torchvision(loaded)
    except D2kdError as error:
        raise D2kdError(f"{source}: {error}") from error


def _write_first(content: Dict[str, Any], targets: List[str]) -> str:
    """Writes to the first target whose folder is writable."""
    for target in targets:
        try:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            files.write(target, content)
        except OSError:
            continue
        return target
    raise D2kdError(f"{' and '.join(targets)} cannot be written; set TORCH_HOME to a writable folder")


def _stamp(source: str) -> List[int]:
    stat = os.stat(source)
    return [stat.st_size, stat.st_mtime_ns]


def _is_fresh(target: str, stamp: List[int]) -> bool:
    try:
        return files.read(target, mmap=True).get("source") == stamp
    except D2kdError:  # missing or damaged
        return False
