"""The teacher: a frozen detector in eval mode, kept out of the student's module tree."""

import logging
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.dense_detector import DenseDetector

from .checkpoint import load_strict
from .config import drop_teacher, find_config, load_config
from .dense import DenseOutputs, preprocess, run_dense
from .errors import D2kdError
from .heads import Cut
from .pairing import (
    class_names,
)


class Teacher:
    """A frozen detector in eval mode, kept out of the student's module tree.

    It is no ``nn.Module``, so it appears in none of the student's parameters, modules, state dict, DDP buckets or
    optimizer groups, and ``student.train()`` does not reach it. Copies of a student share it.

    Args:
        detector: a dense detector that holds its weights already.
        input_format: channel order it was trained with, "BGR" or "RGB".
        class_names: of its classes, where known; for MODEL.DISTILL.CLASS_MAP.
        weights: the file that all of them come from, if they do; for reports.
    """

    def __init__(
        self, detector: DenseDetector, input_format: str, class_names: Sequence[str] = (), weights: str = ""
    ) -> None:
        self.detector = detector.eval().requires_grad_(False)
        self.input_format = input_format
        self.class_names = list(class_names)
        self.weights = weights

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
    ) -> DenseOutputs:
        """Runs the teacher on raw images, with its own preprocessing.

        Args:
            batched_inputs: as :class:`DatasetMapper` gives them.
            input_format: channel order of these images.
            cuts: tower features to keep.
            with_head: False runs the backbone only.
            paths: modules whose outputs to keep.

        Raises:
            D2kdError: someone put the teacher into training mode.
        """
        if any(module.training for module in self.detector.modules()):
            raise D2kdError("the teacher was put into training mode; call .eval() on it, or leave it alone")
        images = preprocess(self.detector, batched_inputs, flip_channels=input_format != self.input_format)
        return run_dense(self.detector, images, cuts, with_head, paths)


def load_teacher(
    config_file: str,
    weights: str,
    opts: Sequence[str] = (),
    device: str = "cpu",
    input_format: Optional[str] = None,
) -> Teacher:
    """Builds a teacher from a config and loads its weights, completely or not at all.

    Args:
        config_file: a ``.yaml``, the ``.py`` of a LazyConfig with a ``model``, or a name of detectron2's model zoo.
        weights: anything :class:`DetectionCheckpointer` reads, or an mmdetection checkpoint.
        opts: overrides of the config, in its own style.
        device: where it is built; a student moves it to its own device.
        input_format: "BGR" or "RGB"; by default what the config says.

    Raises:
        D2kdError: there is no config or file, or the weights do not fill the whole model.
    """
    if not weights:
        raise D2kdError("the teacher has no weights: set MODEL.DISTILL.TEACHER.WEIGHTS (LazyConfig: teacher.weights)")
    path = find_config(config_file)
    if path.endswith(".py"):
        lazy = LazyConfig.apply_overrides(LazyConfig.load(path), list(opts))
        detector = instantiate(lazy.model).to(device)
        config_format, names = getattr(detector, "input_format", "BGR"), []
    else:
        cfg = load_config(path, opts)
        cfg.MODEL.DEVICE = device
        drop_teacher(cfg)  # a teacher that was itself distilled needs no teacher of its own
        detector = build_model(cfg)
        config_format, names = cfg.INPUT.FORMAT, class_names(cfg)
    if not isinstance(detector, DenseDetector):
        raise D2kdError(f"the teacher of {config_file} is a {type(detector).__name__}, not a dense detector")
    load_strict(detector, weights)
    teacher = Teacher(detector, input_format or config_format, names, weights)
    logging.getLogger(__name__).info("Teacher %s (%s) from %s", Path(path).name, teacher.input_format, weights)
    return teacher
