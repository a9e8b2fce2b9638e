"""Models of timm (https://github.com/huggingface/pytorch-image-models), an optional dependency: ``d2kd[timm]``."""

import logging
from typing import Any, List, Mapping, Sequence, Tuple

from detectron2.config import CfgNode, get_cfg
from torch import nn

from ..checkpoint import files
from ..checkpoint.names import plain_state, some
from ..checkpoint.safe import mismatches
from ..errors import D2kdError, nearest
from ..keys import key, setting

BACKBONE = "build_timm_fpn_backbone"
PIXELS = ("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "INPUT.FORMAT")
# In units of pixel values from 0 to 255: published statistics are rounded.
PIXEL_TOLERANCE = 0.5

_LOG = logging.getLogger(__name__)


def import_timm() -> Any:
    """The package timm.

    Raises:
        D2kdError: it is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise D2kdError(
            f"this needs the package timm ({error}); install it with: pip install 'd2kd[timm]', or in d2kd's folder: "
            "make setup"
        ) from error
    return timm


def check_name(name: str) -> None:
    """Raises D2kdError if timm has no such model."""
    timm = import_timm()
    if not name:
        raise D2kdError(f"{key('MODEL.TIMM.NAME')} is empty; set it to a model of timm, such as mobilenetv3_large_100")
    if not timm.is_model(name):
        raise D2kdError(
            f"{key('MODEL.TIMM.NAME')} is {name!r}; timm has no such model{nearest(name, timm.list_models())}"
        )


def create(name: str, **options: Any) -> nn.Module:
    """Makes a model that returns its stages."""
    timm = import_timm()
    try:
        try:  # windowed transformers take images of any size only if told to; the others do not know this option
            return timm.create_model(name, features_only=True, strict_img_size=False, **options)
        except TypeError:
            return timm.create_model(name, features_only=True, **options)
    except RuntimeError as error:
        raise D2kdError(f"{key('MODEL.TIMM.NAME')} is {name!r}, which cannot be a backbone: {error}") from error


def download(name: str, options: Mapping[str, Any]) -> nn.Module:
    """Makes a model with timm's weights."""
    try:
        return create(name, pretrained=True, **options)
    except Exception as error:  # the client of the hub raises its own, of more than one library
        text = " ".join(str(error.__cause__ or error).split())
        raise D2kdError(
            f"timm's weights of {name} could not be loaded ({text}); download model.safetensors of "
            f"huggingface.co/timm/{name} manually and set {key('MODEL.TIMM.PRETRAINED')} to its path"
        ) from error


def load_classifier(net: nn.Module, path: str) -> None:
    """Loads a ``features_only`` model of timm from a file with the weights of the whole classifier.

    Args:
        net: the model.
        path: see :class:`TimmBackbone`; it is read without running code from it.

    Raises:
        D2kdError: the file cannot be read, or lacks tensors of the model, or has others of another shape.
    """
    state = {_canonical(name): (name, value) for name, value in plain_state(files.read(path)).items()}
    wanted = {name: value for name, value in net.state_dict().items() if not name.endswith("num_batches_tracked")}
    found = {name: state.pop(_canonical(name))[1] for name in wanted if _canonical(name) in state}
    missing = [name for name in wanted if name not in found]
    shapes = [(k, tuple(v.shape), tuple(wanted[k].shape)) for k, v in found.items() if v.shape != wanted[k].shape]
    if missing or shapes:
        raise D2kdError(
            f"{path} does not hold the weights of {key('MODEL.TIMM.NAME')}: {mismatches(missing, [], shapes)}; give "
            "the file of this model, with timm's names"
        )
    net.load_state_dict(found, strict=False)  # only num_batches_tracked is missing
    extra = [name for name, _ in state.values()]
    _LOG.info("Backbone: %d tensors from %s; not needed: %s.", len(found), path, some(extra) or "none")


def _canonical(name: str) -> str:
    """Makes names equal that only timm's wrappers for features change: ``stages.0`` to ``stages_0``."""
    return name.removeprefix("model.").replace(".", "_")


def pixel_statistics(name: str) -> Tuple[List[float], List[float]]:
    """Mean and standard deviation, from 0 to 255 and in RGB, of the images that the weights of a model expect.

    Args:
        name: a model of timm.
    """
    timm = import_timm()
    return tuple([255 * x for x in timm.get_pretrained_cfg_value(name, what)] for what in ("mean", "std"))  # type: ignore[return-value]


def take_over_pixels(cfg: CfgNode) -> None:
    """Sets the pixel statistics that pretrained weights of timm expect, in place, if a config leaves detectron2's own.

    Where a config sets any of them, :func:`check_pixels` has the last word.
    """
    if cfg.MODEL.BACKBONE.NAME != BACKBONE or not cfg.MODEL.TIMM.PRETRAINED:
        return
    own, default = ([*c.MODEL.PIXEL_MEAN, *c.MODEL.PIXEL_STD, c.INPUT.FORMAT] for c in (cfg, get_cfg()))
    if own != default:
        return
    check_name(cfg.MODEL.TIMM.NAME)
    values: List[Any] = [*pixel_statistics(cfg.MODEL.TIMM.NAME), "RGB"]
    cfg.merge_from_list([x for pair in zip(PIXELS, values) for x in pair])
    _LOG.info("Taken over from timm: %s.", ", ".join(f"{k} {v}" for k, v in zip(PIXELS, values)))


def check_pixels(
    backbone: nn.Module, mean: Sequence[float], std: Sequence[float], channels: str, prefix: str = ""
) -> None:
    """Checks that a detector normalizes images as the pretrained weights of its timm backbone expect.

    Args:
        backbone: any; only timm's with pretrained weights are checked.
        mean: of the detector, in the order of its channels, from 0 to 255.
        std: likewise.
        channels: "RGB" or "BGR".
        prefix: what to say before the message, such as whose it is.

    Raises:
        D2kdError: it does not; names what to set.
    """
    expected = getattr(getattr(backbone, "bottom_up", backbone), "pixel_statistics", None)
    if expected is None or (channels == "RGB" and _close(mean, expected[0]) and _close(std, expected[1])):
        return
    mean_and_std = ([round(x, 3) for x in values] for values in expected)
    fixes = zip(PIXELS, (*mean_and_std, "RGB"))
    raise D2kdError(
        f"{prefix}the pretrained weights of the timm backbone expect other pixels than {channels} with mean "
        f"{[round(float(x), 3) for x in mean]} and std {[round(float(x), 3) for x in std]}: set "
        + ", ".join(setting(name, value) for name, value in fixes)
    )


def _close(values: Sequence[float], expected: Sequence[float]) -> bool:
    return len(values) == len(expected) and all(abs(a - b) <= PIXEL_TOLERANCE for a, b in zip(values, expected))
