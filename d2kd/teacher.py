"""The teacher: a frozen detector in eval mode, kept out of the student's module tree."""

import dataclasses
import logging
import math
import os
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union, cast

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, instantiate
from detectron2.modeling import build_model
from detectron2.structures import ImageList
from omegaconf import DictConfig, OmegaConf
from torch import nn

from .checkpoint import load_strict
from .config import detector_node, drop_teacher, find_config, load_config, read_lazy
from .contract import Dense, channel_order, check_contract, is_dense
from .dense import DenseOutputs, preprocess, resized, run_dense
from .errors import D2kdError
from .heads import Cut
from .inference_copy import Engine
from .keys import key
from .nodes import check_nodes, resolved
from .overrides import apply_override
from .pairing import class_names
from .relations import check_config
from .wiring import check_wiring

# Begins messages about the teacher's config.
THEIRS = "the teacher's config: "
_LOG = logging.getLogger(__name__)


class Teacher:
    """A frozen detector in eval mode, kept out of the student's module tree.

    It is not an ``nn.Module``, so it is not among the student's parameters, modules, state dict, DDP buckets or
    optimizer groups, and ``student.train()`` does not reach it. Copies of a student share it.

    Args:
        detector: a dense detector, or for methods that read features any detector with a pyramid, such as an R-CNN.
        input_format: channel order it was trained with, "BGR" or "RGB".
        class_names: names of its classes, if known; for MODEL.DISTILL.CLASS_MAP.
        weights: the file that all its weights come from, if there is one.
        loaded: whether the detector holds its weights already; otherwise :meth:`prepare` loads them from ``weights``.
        engine: how it runs; by default as it is, in float32.
        scale: how large it sees the images, relative to the student; see :func:`load_teacher`.

    Raises:
        D2kdError: the scale is not above 0.
    """

    def __init__(
        self,
        detector: nn.Module,
        input_format: str,
        class_names: Sequence[str] = (),
        weights: str = "",
        loaded: bool = True,
        engine: Optional[Engine] = None,
        scale: float = 1.0,
    ) -> None:
        if not scale > 0:
            raise D2kdError(f"{key('MODEL.DISTILL.TEACHER.SCALE')} is {scale}; it must be above 0")
        self.network = detector.eval().requires_grad_(False)
        self.input_format = input_format
        self.class_names = list(class_names)
        self.weights = weights
        self.loaded = loaded
        self.engine = engine or Engine()
        self.scale = scale

    @property
    def is_dense(self) -> bool:
        """Whether it can teach predictions; otherwise it has no more than a :class:`~d2kd.contract.Pyramid`."""
        return is_dense(self.network)

    @property
    def architecture(self) -> Dense:
        """The detector, whether its weights are loaded or not: for its structure only. See :attr:`is_dense`."""
        return cast(Dense, self.network)

    @property
    def detector(self) -> Dense:
        """The detector with its weights; raises D2kdError if they cannot be loaded."""
        self.prepare()
        return self.architecture

    def prepare(self) -> None:
        """Loads the weights, completely or not at all, unless that is done.

        Raises:
            D2kdError: there are none, or they do not fill the whole detector.
        """
        if self.loaded:
            return
        if not self.weights:
            setting = key("MODEL.DISTILL.TEACHER.WEIGHTS")
            raise D2kdError(f"the teacher has no weights: set {setting} to the file of a trained detector")
        load_strict(self.network, self.weights)
        self.loaded = True
        name = type(self.network).__name__
        _LOG.info("Teacher %s (%s) with weights from %s", name, self.input_format, self.weights)

    def apply_to_tensors(self, function: Any, *args: Any, **kwargs: Any) -> None:
        """Moves or casts the detector as ``nn.Module._apply`` does, which has no public name."""
        self.engine.drop()
        self.network._apply(function, *args, **kwargs)

    def __deepcopy__(self, memo: Dict[int, Any]) -> "Teacher":
        return self

    @torch.no_grad()  # not inference_mode: the student's backward needs these outputs
    def __call__(
        self,
        batched_inputs: List[Dict[str, Any]],
        input_format: str,
        cuts: Sequence[Cut] = (),
        with_head: bool = True,
        paths: Sequence[str] = (),
        padded_size: Tuple[int, int] = (0, 0),
    ) -> DenseOutputs:
        """Runs the teacher on raw images, at its scale and with its own preprocessing.

        Args:
            batched_inputs: as :class:`DatasetMapper` returns them.
            input_format: channel order of these images.
            cuts: which tower features to keep.
            with_head: whether to run the head after the backbone, if it is dense.
            paths: modules whose outputs to keep.
            padded_size: height and width in pixels of the student's batch. Without its head, the teacher's own batch is
                padded to show at least this.

        Raises:
            D2kdError: the teacher is in training mode, its weights cannot be loaded, or an image is too large for it.
        """
        if any(module.training for module in self.detector.modules()):
            raise D2kdError("the teacher was put into training mode; call .eval() on it, or leave it alone")
        if self.scale != 1:
            device = self.detector.device
            batched_inputs = [{**x, "image": resized(x["image"].to(device), self.scale)} for x in batched_inputs]
        self._check_square(batched_inputs)
        images = preprocess(self.detector, batched_inputs, flip_channels=input_format != self.input_format)
        with_head = with_head and self.is_dense
        if not with_head:
            images = self._covering(images, padded_size)
        with self.engine.running(self.network, images, paths) as (running, images):
            outputs = run_dense(running, images, cuts, with_head, paths)
        return dataclasses.replace(outputs, detector=self.detector)

    def _check_square(self, batched_inputs: List[Dict[str, Any]]) -> None:
        """Raises D2kdError for images that are larger than the square they are padded to, which would cut them off."""
        square = getattr(self.detector.backbone, "padding_constraints", {}).get("square_size", 0)
        largest = max(max(x["image"].shape[-2:]) for x in batched_inputs)
        if 0 < square < largest:
            raise D2kdError(
                f"the teacher's backbone pads images to {square}x{square} pixels (square_pad) and would cut off an "
                f"image of {largest}; lower INPUT.MAX_SIZE_TRAIN, or set the teacher's square_pad to 0"
            )

    def _covering(self, images: ImageList, padded_size: Tuple[int, int]) -> ImageList:
        """Pads a batch further, if necessary, until it shows all that the student's batch shows."""
        divisor = max(self.architecture.backbone.size_divisibility, 1)
        wanted = [math.ceil(side * self.scale / divisor - 1e-6) * divisor for side in padded_size]
        height, width = (max(want - side, 0) for want, side in zip(wanted, images.tensor.shape[-2:]))
        return ImageList(F.pad(images.tensor, (0, width, 0, height)), images.image_sizes)


def load_teacher(
    config_file: str,
    weights: str,
    opts: Sequence[str] = (),
    device: str = "cpu",
    input_format: Optional[str] = None,
    when_needed: bool = False,
    dtype: str = "float32",
    fold_norms: bool = False,
    scale: float = 1.0,
) -> Teacher:
    """Builds a teacher from a config and loads its weights, completely or not at all.

    Args:
        config_file: a ``.yaml`` file, the ``.py`` file of a LazyConfig with a ``model``, or a name of detectron2's
            model zoo. Any detector with a pyramid can teach features; predictions only a dense one.
        weights: anything :class:`DetectionCheckpointer` reads, or an mmdetection checkpoint.
        opts: overrides of the config, in its own style.
        device: where to build it; a student moves it to its own device.
        input_format: "BGR" or "RGB"; by default what the config says.
        when_needed: load weights that are not on this machine (a URL, or a path without a file) when the teacher is
            first used. A student that is only evaluated never uses it.
        dtype: in which type it runs for a student; see :class:`Engine`.
        fold_norms: see :class:`Engine`.
        scale: how large it sees the images, relative to the student, > 0. With 2, its P4 lies where the student's P3
            lies, as in Multi-Scale Aligned Distillation (CVPR 2021). For methods that read features.

    Raises:
        D2kdError: there is no such config, its model has no pyramid, or the weights do not fill all of it.
    """
    engine = Engine(dtype, fold_norms)
    path = find_config(config_file)
    detector, config_format, names = _build(path, opts, device)
    check_contract(detector, with_head=False, with_losses=False)
    options: Dict[str, Any] = {"loaded": False, "engine": engine, "scale": scale}
    teacher = Teacher(detector, input_format or config_format, names, weights, **options)
    if os.path.isfile(weights) or not when_needed:
        teacher.prepare()
    return teacher


def teacher_opts(config_file: str, opts: Sequence[str], num_classes: int) -> List[str]:
    """Overrides of a teacher's config that set its number of classes.

    Args:
        config_file: as for :func:`load_teacher`.
        opts: its overrides so far, which come after and so prevail.
        num_classes: the number.

    Raises:
        D2kdError: there is no such config.
    """
    path = find_config(config_file)
    if path.endswith(".py"):
        known = OmegaConf.select(read_lazy(path), "model.num_classes") is not None
        return [f"model.num_classes={num_classes}", *opts] if known else list(opts)
    node = detector_node(load_config(path, opts, with_teacher=False))
    return [f"MODEL.{node}.NUM_CLASSES", str(num_classes), *opts] if node else list(opts)


def read_config(path: str, opts: Sequence[str]) -> Union[CfgNode, DictConfig]:
    """Reads the config of a teacher, of either style, with overrides and without a teacher of its own.

    Raises:
        D2kdError: it is not valid, or a LazyConfig without a model.
    """
    if not path.endswith(".py"):
        return load_config(path, opts, with_teacher=False)
    lazy = read_lazy(path)
    if "model" not in lazy:
        raise D2kdError(f"{path} defines no model; a teacher's LazyConfig must")
    for override in opts:
        lazy = apply_override(lazy, override)
    drop_teacher(lazy)
    return lazy


def _build(path: str, opts: Sequence[str], device: str) -> Tuple[nn.Module, str, List[str]]:
    """Builds the detector of a config, without a teacher of its own; returns it, its channel order and class names."""
    config = read_config(path, opts)
    if isinstance(config, CfgNode):
        config.MODEL.DEVICE = device
        check_config(config, prefix=THEIRS)
        return build_model(config), config.INPUT.FORMAT, class_names(config)
    check_nodes(config, prefix=THEIRS)
    check_config(resolved(config), is_lazy=True, prefix=THEIRS)
    detector = instantiate(config.model).to(device)
    check_wiring(detector, THEIRS)
    return detector, channel_order(detector), []
