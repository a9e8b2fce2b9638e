"""The heart of d2kd: a frozen teacher beside any dense detector, and distillation losses added to its own.

``class DistillRetinaNet(DistillMetaArch, RetinaNet)`` is a RetinaNet in every respect (parameter names, inference,
losses) which, while it trains with methods, also asks a teacher and adds what the methods make of both.
"""

import logging
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch
from detectron2.config import CfgNode, LazyConfig, configurable, instantiate
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet, build_model
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils import comm
from torch import Tensor, nn

from .checkpoint import load_strict
from .config import find_config, load_config
from .dense import Cut, DenseOutputs, Features, level_strides, make_targets, mean_over_workers, preprocess, run_dense
from .errors import D2kdError
from .methods import Method, build_method, method_defaults
from .modeling import ATSS, FCOS, GFL


class Teacher:
    """A frozen detector in eval mode, kept out of the student's module tree.

    It is no ``nn.Module``, so it appears in none of the student's parameters, modules, state dict, DDP buckets or
    optimizer groups, and ``student.train()`` does not reach it. Copies of a student share it.

    Args:
        detector: a dense detector that holds its weights already.
        input_format: channel order it was trained with, "BGR" or "RGB".
    """

    def __init__(self, detector: DenseDetector, input_format: str) -> None:
        self.detector = detector.eval().requires_grad_(False)
        self.input_format = input_format

    def __deepcopy__(self, memo: Dict[int, Any]) -> "Teacher":
        return self

    @torch.no_grad()  # not inference_mode: the student's backward needs these outputs
    def __call__(
        self, batched_inputs: List[Dict[str, Any]], input_format: str, cuts: Sequence[Cut] = (), with_head: bool = True
    ) -> DenseOutputs:
        """Runs the teacher on raw images, with its own preprocessing.

        Args:
            batched_inputs: as :class:`DatasetMapper` gives them.
            input_format: channel order of these images.
            cuts: tower features to keep.
            with_head: False runs the backbone only.

        Raises:
            D2kdError: someone put the teacher into training mode.
        """
        if any(module.training for module in self.detector.modules()):
            raise D2kdError("the teacher was put into training mode; call .eval() on it, or leave it alone")
        images = preprocess(self.detector, batched_inputs, flip_channels=input_format != self.input_format)
        return run_dense(self.detector, images, cuts, with_head)


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
        config_format = getattr(detector, "input_format", "BGR")
    else:
        cfg = load_config(path, opts)
        cfg.MODEL.DEVICE = device
        cfg.MODEL.DISTILL.METHODS = ()  # a teacher that was itself distilled needs no teacher of its own
        detector = build_model(cfg)
        config_format = cfg.INPUT.FORMAT
    if not isinstance(detector, DenseDetector):
        raise D2kdError(f"the teacher of {config_file} is a {type(detector).__name__}, not a dense detector")
    load_strict(detector, weights)
    teacher = Teacher(detector, input_format or config_format)
    logging.getLogger(__name__).info("Teacher %s (%s) from %s", Path(path).name, teacher.input_format, weights)
    return teacher


class DistillMetaArch(DenseDetector):
    """A dense detector that learns from a teacher. A mixin: put it in front of the student's class.

    Without methods it is the plain detector, bit for bit. Evaluation never touches the teacher.

    Args:
        teacher: from :func:`load_teacher`; needed if there are methods.
        methods: what to add to the student's own losses.
        sync_normalizer: RetinaNet and FCOS divide their losses by a running mean of each worker's own number of
            positive anchors. True takes it over all workers, so that a run does not depend on their number (a worker
            without any positive anchor counts one); False is detectron2's way.
        **student: arguments of the student's class.

    Raises:
        D2kdError: methods without a teacher, or a teacher that does not fit.
    """

    @configurable
    def __init__(
        self,
        *,
        teacher: Optional[Teacher] = None,
        methods: Sequence[Method] = (),
        sync_normalizer: bool = False,
        **student: Any,
    ) -> None:
        super().__init__(**student)
        self.sync_normalizer = sync_normalizer
        self.teacher = teacher
        self.distill = nn.ModuleDict({type(method).__name__.lower(): method for method in methods})
        if methods:
            self._check_teacher()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Dict[str, Any]:
        distill = cfg.MODEL.DISTILL
        methods = [
            build_method(name, **{key: distill[name.upper()][key.upper()] for key in method_defaults(name)})
            for name in distill.METHODS
        ]
        student = super().from_config(cfg)
        teacher = distill.TEACHER
        return {
            **student,
            "methods": methods,
            "sync_normalizer": distill.SYNC_NORMALIZER,
            "teacher": load_teacher(teacher.CONFIG_FILE, teacher.WEIGHTS, teacher.OPTS, cfg.MODEL.DEVICE)
            if methods
            else None,
        }

    @property
    def methods(self) -> List[Method]:
        """The distillation methods in use."""
        return list(self.distill.values())  # type: ignore[arg-type]

    @property
    def _reads_head(self) -> bool:
        return any(method.reads_head for method in self.methods)

    def _check_teacher(self) -> None:
        if self.teacher is None:
            raise D2kdError("methods need a teacher: set MODEL.DISTILL.TEACHER (LazyConfig: model.teacher)")
        check_levels(self, self.teacher.detector)
        if self._reads_head:
            check_heads(self, self.teacher.detector)
        for method in self.methods:
            method.setup(self, self.teacher.detector)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> "DistillMetaArch":
        if self.teacher is not None:
            self.teacher.detector._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)

    def forward(self, batched_inputs: List[Dict[str, Any]]) -> Any:
        """As :meth:`DenseDetector.forward`; in training with methods the loss dict has the methods' losses too."""
        if not (self.training and self.distill):
            return super().forward(batched_inputs)
        assert self.teacher is not None
        if "instances" not in batched_inputs[0]:
            raise D2kdError("the training images carry no annotations ('instances')")
        cuts = list(dict.fromkeys(cut for method in self.methods for cut in method.cuts))
        teacher = self.teacher(batched_inputs, getattr(self, "input_format", "BGR"), cuts, self._reads_head)
        images = self.preprocess_image(batched_inputs)
        student = run_dense(self, images, cuts)
        instances = [x["instances"].to(self.device) for x in batched_inputs]
        return self.forward_training(images, student.features, student.predictions, instances, student, teacher)

    def forward_training(
        self,
        images: ImageList,
        features: Features,
        predictions: Sequence[Features],
        gt_instances: List[Instances],
        student: Optional[DenseOutputs] = None,
        teacher: Optional[DenseOutputs] = None,
    ) -> Dict[str, Tensor]:
        """The student's own losses, unchanged, and those of the methods.

        Args:
            images: the student's preprocessed batch.
            features: FPN features, per level (N, C, Hi, Wi).
            predictions: raw head outputs, each per level.
            gt_instances: ground truth of each image.
            student: what the methods see of the student; None leaves its own losses alone.
            teacher: what they see of the teacher, likewise.
        """
        if student is None or teacher is None:
            return super().forward_training(images, features, predictions, gt_instances)
        check_sizes(student, teacher)
        anchors = student.anchors_per_level
        labels, boxes = self.label_anchors(anchors, gt_instances)
        logits, deltas, *rest = student.dense_predictions
        losses = self.losses(anchors, logits, labels, deltas, boxes, *rest)
        targets = make_targets(student, images, gt_instances, labels, boxes)
        for method in self.methods:
            losses.update(method(student, teacher, targets))
        return losses

    def _ema_update(self, name: str, value: float, initial_value: float, momentum: float = 0.9) -> float:
        if self.sync_normalizer:
            value = mean_over_workers(torch.tensor(float(value), device=self.device)).item()
            initial_value /= comm.get_world_size()
        return super()._ema_update(name, value, initial_value, momentum)


def check_levels(student: DenseDetector, teacher: DenseDetector) -> None:
    """Raises D2kdError unless both heads read levels of the same strides."""
    own, theirs = level_strides(student), level_strides(teacher)
    if own != theirs:
        raise D2kdError(
            f"the student's head reads levels of strides {own} and the teacher's {theirs}; distillation compares "
            "level by level, so choose the same (IN_FEATURES)"
        )


def check_heads(student: DenseDetector, teacher: DenseDetector) -> None:
    """Raises D2kdError unless both heads have the same classes and anchors, as comparing predictions needs.

    Anchors of detectors with one per place (GFL, ATSS, FCOS) may differ: each detector decodes its own.
    """
    if student.num_classes != teacher.num_classes:
        raise D2kdError(
            f"the student has {student.num_classes} classes and the teacher {teacher.num_classes}; train the teacher "
            "on the student's classes (NUM_CLASSES), or use methods that read features only"
        )
    if {*student.anchor_generator.num_anchors, *teacher.anchor_generator.num_anchors} == {1}:
        return
    own, theirs = _sample_anchors(student), _sample_anchors(teacher)
    if own.shape != theirs.shape or not torch.allclose(own, theirs, atol=1e-2):
        raise D2kdError(
            "the anchors of student and teacher differ; set MODEL.ANCHOR_GENERATOR (SIZES, ASPECT_RATIOS, OFFSET) "
            f"alike: the first of the student is {_first_anchor(own, theirs)}, of the teacher "
            f"{_first_anchor(theirs, own)}"
        )


def _sample_anchors(detector: DenseDetector, side: int = 512) -> Tensor:
    sizes = [-(-side // stride) for stride in level_strides(detector)]
    grids = [torch.zeros(1, 1, size, size, device=detector.device) for size in sizes]
    return Boxes.cat(detector.anchor_generator(grids)).tensor.cpu()


def _first_anchor(anchors: Tensor, others: Tensor) -> List[float]:
    """The first anchor that the others do not have in the same place."""
    count = min(len(anchors), len(others))
    differ = (anchors[:count] - others[:count]).abs().amax(1) > 1e-2
    return [round(x, 2) for x in anchors[int(differ.int().argmax())].tolist()]


def check_sizes(student: DenseOutputs, teacher: DenseOutputs) -> None:
    """Raises D2kdError unless the feature maps of both have equal sizes on every level."""
    own, theirs = ([tuple(f.shape[-2:]) for f in outputs.features] for outputs in (student, teacher))
    if own != theirs:
        raise D2kdError(
            f"the levels of the student are of sizes {own}, those of the teacher {theirs}: they pad images to "
            "multiples of another size (backbone.size_divisibility), so choose backbones of the same strides"
        )


@META_ARCH_REGISTRY.register()
class DistillRetinaNet(DistillMetaArch, RetinaNet):
    """detectron2's RetinaNet as a student."""


@META_ARCH_REGISTRY.register()
class DistillGFL(DistillMetaArch, GFL):
    """GFL as a student."""


@META_ARCH_REGISTRY.register()
class DistillATSS(DistillMetaArch, ATSS):
    """ATSS as a student."""


@META_ARCH_REGISTRY.register()
class DistillFCOS(DistillMetaArch, FCOS):
    """FCOS as a student."""
