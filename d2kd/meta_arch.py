"""The heart of d2kd: a frozen teacher beside any dense detector, and distillation losses added to its own.

``class DistillRetinaNet(DistillMetaArch, RetinaNet)`` is a RetinaNet in every respect (parameter names, inference,
losses) which, while it trains with methods, also asks a teacher and adds what the methods make of both.
"""

from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from .contract import check_contract
from .dense import DenseOutputs, make_targets, run_dense
from .diagnose.gradients import GRADIENT, gradient_ratios
from .errors import D2kdError
from .heads import Features
from .methods import Method, Schedule, build_method, method_defaults
from .modeling import ATSS, FCOS, GFL
from .pairing import (
    ClassMap,
    check_classes,
    check_heads,
    check_levels,
    check_sizes,
    class_names,
    inherit_parts,
    match_classes,
    module_pairs,
    probe_channels,
)
from .teacher import Teacher, load_teacher
from .workers import at_least_one, mean_over_workers


class DistillMetaArch(DenseDetector):
    """A dense detector that learns from a teacher. A mixin: put it in front of the student's class.

    Without methods it is the plain detector, bit for bit. Evaluation never touches the teacher.

    Args:
        teacher: from :func:`load_teacher`; needed if there are methods.
        methods: what to add to the student's own losses.
        features: modules whose outputs feature methods compare instead of the FPN levels: a path in both detectors,
            such as "backbone.bottom_up.res4", or two, "<student's>:<teacher's>".
        class_map: which classes both know, where their classes differ: pairs (student's, teacher's) of names or
            indices, a single name for both, or "*" for all names that both have. Class losses compare these alone.
            Empty: the classes are the same.
        class_names: names of the student's classes, for ``class_map``.
        schedules: how a method's weight changes in the course of training, by method.
        inherit: parts that start from the teacher's weights, "neck" and "head" (FGD, MGD). Checkpoints that are loaded
            later, as on resume, replace them.
        gradient_period: every so many iterations, log how strongly each loss pulls at the FPN, see
            :func:`gradient_ratios`; 0 for never. Such a step takes about twice as long.
        sync_normalizer: make the student's own losses independent of the number of workers. RetinaNet and FCOS divide
            them by a running mean of each worker's own number of positive anchors (detectron2); True takes it over all
            workers. GFL, ATSS and FCOS "batch" divide by averages over workers that are at least 1, as published; True
            asks that of their sum.
        **student: arguments of the student's class.

    Raises:
        D2kdError: methods without a teacher, a teacher that does not fit, or an option that does not.
    """

    @configurable
    def __init__(
        self,
        *,
        teacher: Optional[Teacher] = None,
        methods: Sequence[Method] = (),
        features: Sequence[str] = (),
        class_map: ClassMap = (),
        class_names: Sequence[str] = (),
        schedules: Optional[Mapping[str, Schedule]] = None,
        inherit: Sequence[str] = (),
        gradient_period: int = 0,
        sync_normalizer: bool = False,
        **student: Any,
    ) -> None:
        super().__init__(**student)
        self.gradient_period = gradient_period
        self.sync_normalizer = sync_normalizer
        self.teacher = teacher
        self.distill = nn.ModuleDict({type(method).__name__.lower(): method for method in methods})
        self.schedules = {name.lower(): schedule for name, schedule in (schedules or {}).items()}
        self.paths = module_pairs(features)
        self._classes: Optional[Tuple[List[int], List[int]]] = None
        if methods or inherit:
            self._meet_teacher(class_map, class_names, inherit)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Dict[str, Any]:
        distill = cfg.MODEL.DISTILL
        methods = [
            build_method(name, **{key: distill[name.upper()][key.upper()] for key in method_defaults(name)})
            for name in distill.METHODS
        ]
        student = super().from_config(cfg)
        teacher = distill.TEACHER
        wanted = bool(methods or distill.INHERIT)
        return {
            **student,
            "methods": methods,
            "features": distill.FEATURES,
            "class_map": distill.CLASS_MAP,
            "class_names": class_names(cfg) if distill.CLASS_MAP else (),
            "schedules": {name: Schedule.from_node(distill.SCHEDULE[name.upper()]) for name in distill.METHODS},
            "inherit": distill.INHERIT,
            "gradient_period": distill.GRADIENT_PERIOD,
            "sync_normalizer": distill.SYNC_NORMALIZER,
            "teacher": load_teacher(teacher.CONFIG_FILE, teacher.WEIGHTS, teacher.OPTS, cfg.MODEL.DEVICE)
            if wanted
            else None,
        }

    @property
    def methods(self) -> List[Method]:
        """The distillation methods in use."""
        return list(self.distill.values())  # type: ignore[arg-type]

    @property
    def _reads_head(self) -> bool:
        return any(method.reads_head for method in self.methods)

    @property
    def _resizes(self) -> bool:
        return all(method.resizes for method in self.methods)

    def _meet_teacher(self, class_map: ClassMap, class_names: Sequence[str], inherit: Sequence[str]) -> None:
        """Checks that the teacher fits, and prepares what depends on both."""
        if self.teacher is None:
            raise D2kdError("methods and INHERIT need a teacher: set MODEL.DISTILL.TEACHER (LazyConfig: model.teacher)")
        teacher = self.teacher.detector
        check_contract(self, self._reads_head)
        check_contract(teacher, self._reads_head, with_losses=False)
        check_levels(self, teacher, self._resizes)
        if class_map:
            self._classes = match_classes(
                class_map, (class_names, self.num_classes), (self.teacher.class_names, teacher.num_classes)
            )
        if self._reads_head:
            if not class_map:
                check_classes(self, teacher)
            check_heads(self, teacher)
        channels = probe_channels(self, teacher, self.paths, self._resizes)
        for method in self.methods:
            method.setup(self, teacher, channels)
        inherit_parts(self, teacher, inherit)

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
        own_paths, paths = ([pair[i] for pair in self.paths] for i in (0, 1))
        with_head = self._reads_head or any(path.startswith("head") for path in paths)
        teacher = self.teacher(batched_inputs, getattr(self, "input_format", "BGR"), cuts, with_head, paths)
        images = self.preprocess_image(batched_inputs)
        student = run_dense(self, images, cuts, paths=own_paths)
        if self._classes is not None:
            student.classes, teacher.classes = (
                torch.tensor(c, dtype=torch.long, device=self.device) for c in self._classes
            )
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
        if not self._resizes:
            check_sizes(student, teacher)
        anchors = student.anchors_per_level
        labels, boxes = self.label_anchors(anchors, gt_instances)
        logits, deltas, *rest = student.dense_predictions
        losses = self.losses(anchors, logits, labels, deltas, boxes, *rest)
        targets = make_targets(student, images, gt_instances, labels, boxes)
        for name, method in self.distill.items():
            weight = self.schedules[name].weight(get_event_storage().iter) if name in self.schedules else 1.0
            losses.update({key: weight * value for key, value in method(student, teacher, targets).items()})
        if self.gradient_period and get_event_storage().iter % self.gradient_period == 0:
            ratios = gradient_ratios(losses, list(self.distill), student.features)
            get_event_storage().put_scalars(smoothing_hint=False, **{GRADIENT + k: v for k, v in ratios.items()})
        return losses

    def losses(
        self, anchors: List[Boxes], pred_logits: List[Tensor], gt_labels: List[Tensor], *rest: List[Tensor]
    ) -> Dict[str, Tensor]:
        """The student's own losses.

        Args:
            anchors: of each level.
            pred_logits: per level (N, Hi*Wi*A, K).
            gt_labels: of each image (R,).
            *rest: box predictions, matched boxes and what else the student's class takes.
        """
        labels = torch.stack(gt_labels)
        self._num_pos = ((labels >= 0) & (labels < self.num_classes)).sum().float()
        return super().losses(anchors, pred_logits, gt_labels, *rest)

    def _ema_update(self, name: str, value: float, initial_value: float, momentum: float = 0.9) -> float:
        if self.sync_normalizer:  # not of the values, which are 1 for a worker without positive anchors too
            value = at_least_one(mean_over_workers(self._num_pos)).item()
            initial_value /= comm.get_world_size()
        return super()._ema_update(name, value, initial_value, momentum)


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
