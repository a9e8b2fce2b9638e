"""The heart of d2kd: a frozen teacher beside any dense detector, and distillation losses added to its own.

``class DistillRetinaNet(DistillMetaArch, RetinaNet)`` is a RetinaNet in every respect (parameter names, inference,
losses). While it trains with methods, it also runs a teacher and adds the losses that the methods compute from both.
"""

import inspect
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage, has_event_storage
from torch import Tensor, nn

from .contract import AnchorGenerator, BoxCoder, channel_order, check_contract
from .dense import DenseOutputs, Targets, evaluation_mode, make_targets, run_dense
from .diagnose.gradients import GRADIENT, gradient_ratios
from .errors import D2kdError, nearest
from .heads import Cut
from .keys import key
from .methods import (
    Method,
    Schedule,
    build_method,
    check_method_names,
    check_unique,
    check_weights,
    method_defaults,
)
from .modeling import ATSS, FCOS, GFL
from .pairing import (
    ClassMap,
    check_classes,
    check_heads,
    check_levels,
    check_sizes,
    class_names,
    empty_batch,
    inherit_parts,
    match_classes,
    module_pairs,
    probe_channels,
)
from .teacher import Teacher, load_teacher
from .wiring import check_wiring
from .workers import at_least_one, mean_over_workers


@dataclass
class Observation:
    """One batch as a training step sees it.

    Attributes:
        images: the student's preprocessed batch.
        student: the student's outputs.
        teacher: the teacher's outputs; None if no method is active.
        targets: ground truth and target assignment.
    """

    images: ImageList
    student: DenseOutputs
    teacher: Optional[DenseOutputs]
    targets: Targets


if TYPE_CHECKING:

    class _Student(DenseDetector):
        """What all dense detectors of detectron2 have, though their base class does not declare it."""

        pixel_mean: Tensor
        pixel_std: Tensor
        num_classes: int
        anchor_generator: AnchorGenerator
        box2box_transform: BoxCoder

        @classmethod
        def from_config(cls, cfg: CfgNode) -> Dict[str, Any]: ...

        def label_anchors(
            self, anchors: List[Boxes], gt_instances: List[Instances]
        ) -> Tuple[List[Tensor], List[Tensor]]: ...

        def losses(
            self, anchors: List[Boxes], pred_logits: List[Tensor], gt_labels: List[Tensor], *rest: List[Tensor]
        ) -> Dict[str, Tensor]: ...
else:
    _Student = DenseDetector


class DistillMetaArch(_Student):
    """A dense detector that learns from a teacher: a mixin to put in front of the student's class.

    Without methods it is the plain detector, bit for bit. Evaluation never uses the teacher.

    Attributes:
        iteration: number of the next training forward, for schedules and for what is logged; it counts where no
            ``EventStorage`` does.

    Args:
        teacher: from :func:`load_teacher`; required if there are methods.
        methods: methods whose losses are added to the student's own.
        features: modules whose outputs feature methods compare instead of the FPN levels: a path in both detectors,
            such as "backbone.bottom_up.res4", or two, "<student's>:<teacher's>".
        class_map: the classes that both have, if their classes differ: pairs (student's, teacher's) of names or
            indices, a single name for both, or "*" for all names that both have. Class losses compare only these.
            Empty: the classes are the same.
        class_names: names of the student's classes, for ``class_map``.
        schedules: how the weight of a method changes during training, by method name.
        inherit: parts that start from the teacher's weights, "neck" and "head" (FGD, MGD). Checkpoints that are loaded
            later, as when resuming, replace them.
        gradient_period: log the gradient of each loss at the FPN every this many iterations, see
            :func:`gradient_ratios`; 0 for never. Such a step takes about twice as long.
        sync_normalizer: make the student's own losses independent of the number of workers. RetinaNet and FCOS divide
            them by a running mean of each worker's own number of positive anchors (detectron2); True averages it over
            all workers. GFL, ATSS and FCOS "batch" divide by averages over workers that are clamped to at least 1, as
            published; True clamps their sum instead.
        detector: an existing detector to become a student, see :func:`distill`.
        **student: without ``detector``, arguments of the student's class.

    Raises:
        D2kdError: there are methods without a teacher, the teacher does not fit, or an option is wrong.
    """

    iteration: int = 0

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
        detector: Optional[DenseDetector] = None,
        **student: Any,
    ) -> None:
        if detector is None:
            super().__init__(**student)
        else:
            self._become(detector, student)
        self.gradient_period = gradient_period
        self.sync_normalizer = sync_normalizer
        self.teacher = teacher
        check_unique([type(method).__name__ for method in methods])
        self.distill = nn.ModuleDict({type(method).__name__.lower(): method for method in methods})
        self.schedules = {name.lower(): schedule for name, schedule in (schedules or {}).items()}
        self.paths = module_pairs(features)
        #: Indices of the shared classes in student and teacher; None if their classes are the same.
        self.shared_classes: Optional[Tuple[List[int], List[int]]] = None
        self._loss_names: Dict[str, List[str]] = {}  # of methods that end
        self._not_inherited: Optional[D2kdError] = None
        if methods or inherit:
            self._meet_teacher(class_map, class_names, inherit)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Dict[str, Any]:
        distill = cfg.MODEL.DISTILL
        check_method_names(distill.METHODS)
        methods = [build_method(name, **_options(distill, name)) for name in distill.METHODS]
        student = super().from_config(cfg)
        teacher = distill.TEACHER
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
            "teacher": load_teacher(
                teacher.CONFIG_FILE,
                teacher.WEIGHTS,
                teacher.OPTS,
                when_needed=True,
                dtype=teacher.DTYPE,
                fold_norms=teacher.FOLD_NORMS,
            )
            if methods or distill.INHERIT
            else None,
        }

    def _become(self, detector: DenseDetector, unknown: Mapping[str, Any]) -> None:
        """Takes over all of a detector, but with a dict of modules of its own, to which ``distill`` is added."""
        if unknown:
            known = inspect.signature(DistillMetaArch).parameters
            name = next(iter(unknown))
            raise D2kdError(f"distill has no option {name!r}{nearest(name, known)}")
        vars(self).update(vars(detector))
        self._modules = dict(detector._modules)

    @property
    def methods(self) -> List[Method]:
        """The distillation methods of the model."""
        return list(self.distill.values())  # type: ignore[arg-type]

    def active_methods(self) -> Dict[str, Method]:
        """The methods whose schedule has not ended, by name in lower case."""
        return {name: method for name, method in zip(self.distill, self.methods) if not self._has_ended(name)}

    def _has_ended(self, name: str) -> bool:
        end = self.schedules[name].end if name in self.schedules else 0
        return bool(end) and get_event_storage().iter >= end

    def _meet_teacher(self, class_map: ClassMap, class_names: Sequence[str], inherit: Sequence[str]) -> None:
        """Checks that the teacher fits, and prepares what depends on both."""
        if self.teacher is None:
            raise D2kdError(f"methods and INHERIT need a teacher: set {key('MODEL.DISTILL.TEACHER')}")
        teacher = self.teacher.architecture
        reads_head, resizes = _reads_head(self.methods), _resizes(self.methods)
        check_contract(self, reads_head)
        check_contract(self.teacher.network, reads_head, with_losses=False)
        check_wiring(self)
        check_levels(self, teacher, resizes)
        if class_map:
            self.shared_classes = match_classes(
                class_map, (class_names, self.num_classes), (self.teacher.class_names, teacher.num_classes)
            )
        if reads_head:
            if not class_map:
                check_classes(self, teacher)
            check_heads(self, teacher)
        channels = probe_channels(self, teacher, self.paths, resizes)
        for method in self.methods:
            check_weights(method)
            method.setup(self, teacher, channels)
        self._loss_names = {
            name: self._names_of_losses(method)
            for name, method in zip(self.distill, self.methods)
            if name in self.schedules and self.schedules[name].end
        }
        if inherit:
            self._inherit(self.teacher, inherit)

    def _names_of_losses(self, method: Method) -> List[str]:
        """Keys of a method's losses, found with an empty image; they stay in the loss dict after its schedule ends."""
        assert self.teacher is not None
        self.teacher.apply_to_tensors(lambda tensor: tensor.to(self.device))
        detectors = (self, self.teacher.architecture)
        images = empty_batch(*detectors)
        nothing = Instances(images.image_sizes[0], gt_boxes=Boxes(images.tensor.new_zeros(0, 4)))
        nothing.gt_classes = torch.zeros(0, dtype=torch.long, device=self.device)
        with EventStorage(), torch.no_grad(), torch.random.fork_rng(devices=[]), evaluation_mode(self):
            student, teacher = (
                run_dense(detector, images, cuts, paths=[pair[i] for pair in self.paths])
                for i, (detector, cuts) in enumerate(zip(detectors, (method.cuts, method.teacher_cuts)))
            )
            self._share_classes(student, teacher)
            assigned = self.label_anchors(student.anchors_per_level, [nothing])
            return list(method(student, teacher, make_targets(student, images, [nothing], *assigned)))

    def _inherit(self, teacher: Teacher, parts: Sequence[str]) -> None:
        """Copies parts of the teacher; if its weights are missing, the model can be evaluated but not trained."""
        try:
            teacher.prepare()
        except D2kdError as error:
            self._not_inherited = error
        else:
            inherit_parts(self, teacher.network, parts)

    def plain_state_dict(self) -> Dict[str, Tensor]:
        """The state dict of the student alone, without the methods' adapters: the plain detector loads it strictly."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("distill.")}

    def prepare_teacher(self) -> None:
        """Loads the teacher's weights if they are not loaded yet. Call it before training, so that mistakes show early.

        Raises:
            D2kdError: the weights are missing or do not fit.
        """
        if self._not_inherited is not None:
            raise self._not_inherited
        if self.teacher is not None and self.distill:
            self.teacher.prepare()

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> "DistillMetaArch":
        if self.teacher is not None:
            self.teacher.apply_to_tensors(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)

    def forward(self, batched_inputs: List[Dict[str, Any]]) -> Any:
        """Like :meth:`DenseDetector.forward`; in training with methods, the loss dict has the methods' losses too."""
        if self.training and self._not_inherited is not None:
            raise self._not_inherited
        if not self.training:
            return super().forward(batched_inputs)
        with self._event_storage():
            return self.losses_of(self.observe(batched_inputs)) if self.distill else super().forward(batched_inputs)

    @contextmanager
    def _event_storage(self) -> Iterator[None]:
        """The ``EventStorage`` that detectron2's losses log to, where the training loop has opened none."""
        if has_event_storage():
            yield
            return
        with EventStorage(self.iteration):
            yield
        self.iteration += 1

    def observe(self, batched_inputs: List[Dict[str, Any]]) -> Observation:
        """Runs teacher and student on a batch and assigns targets, once: everything that the losses are made of.

        Args:
            batched_inputs: images with annotations, as :class:`DatasetMapper` returns them.

        Raises:
            D2kdError: there are no annotations, the teacher's weights are missing, or the maps differ in size.
        """
        if "instances" not in batched_inputs[0]:
            raise D2kdError("the training images carry no annotations ('instances')")
        methods = list(self.active_methods().values())
        teacher = self.run_teacher(batched_inputs)
        images = self.preprocess_image(batched_inputs)
        cuts = _all(method.cuts for method in methods)
        student = run_dense(self, images, cuts, paths=[own for own, _ in self.paths] if methods else ())
        if teacher is not None:
            self._share_classes(student, teacher)
            if not _resizes(methods):
                check_sizes(student, teacher)
        instances = [x["instances"].to(self.device) for x in batched_inputs]
        assigned = self.label_anchors(student.anchors_per_level, instances)
        return Observation(images, student, teacher, make_targets(student, images, instances, *assigned))

    def run_teacher(self, batched_inputs: List[Dict[str, Any]]) -> Optional[DenseOutputs]:
        """Runs as much of the teacher as the active methods read; returns None if no method is active."""
        methods = list(self.active_methods().values())
        if self.teacher is None or not methods:
            return None
        paths = [theirs for _, theirs in self.paths]
        with_head = _reads_head(methods) or any(path.startswith("head") for path in paths)
        cuts = _all(method.teacher_cuts for method in methods)
        return self.teacher(batched_inputs, channel_order(self), cuts, with_head, paths)

    def _share_classes(self, *both: DenseOutputs) -> None:
        if self.shared_classes is not None:
            for outputs, classes in zip(both, self.shared_classes):
                outputs.classes = torch.tensor(classes, dtype=torch.long, device=self.device)

    def losses_of(self, observation: Observation) -> Dict[str, Tensor]:
        """The student's own losses and those of the methods, scalars.

        The running normalizer of RetinaNet and FCOS moves with every call.
        """
        student, targets = observation.student, observation.targets
        logits, deltas, *rest = student.dense_predictions
        labels, boxes = list(targets.labels), list(targets.boxes)
        losses = self.losses(student.anchors_per_level, logits, labels, deltas, boxes, *rest)
        for name, method in zip(self.distill, self.methods):
            losses.update(self._method_losses(name, method, observation))
        if self.gradient_period and get_event_storage().iter % self.gradient_period == 0:
            ratios = gradient_ratios(losses, list(self.distill), student.features)
            get_event_storage().put_scalars(smoothing_hint=False, **{GRADIENT + k: v for k, v in ratios.items()})
        return losses

    def _method_losses(self, name: str, method: Method, observation: Observation) -> Dict[str, Tensor]:
        if observation.teacher is None or self._has_ended(name):
            return dict.fromkeys(self._loss_names[name], self._connected_zero(method))
        weight = self.schedules[name].weight(get_event_storage().iter) if name in self.schedules else 1.0
        losses = method(observation.student, observation.teacher, observation.targets)
        return {key: weight * value for key, value in losses.items()}

    def _connected_zero(self, method: Method) -> Tensor:
        """A zero that depends on all parameters of a method, as DistributedDataParallel expects in every step."""
        zero = torch.zeros((), device=self.device)
        for parameter in method.parameters():
            if parameter.requires_grad:
                zero = zero + 0.0 * parameter.flatten()[0].float()
        return zero

    def losses(
        self, anchors: List[Boxes], pred_logits: List[Tensor], gt_labels: List[Tensor], *rest: List[Tensor]
    ) -> Dict[str, Tensor]:
        """The student's own losses.

        Args:
            anchors: anchors of each level.
            pred_logits: per level (N, Hi*Wi*A, K).
            gt_labels: labels of each image (R,).
            *rest: box predictions, matched boxes and any other arguments of the student's class.
        """
        labels = torch.stack(gt_labels)
        self._num_pos = ((labels >= 0) & (labels < self.num_classes)).sum().float()
        return super().losses(anchors, pred_logits, gt_labels, *rest)

    def _ema_update(self, name: str, value: float, initial_value: float, momentum: float = 0.9) -> float:
        if self.sync_normalizer:  # average the counts, not the values: these are 1 for a worker without positives too
            value = at_least_one(mean_over_workers(self._num_pos)).item()
            initial_value /= comm.get_world_size()
        return super()._ema_update(name, value, initial_value, momentum)


def _options(distill: CfgNode, name: str) -> Dict[str, Any]:
    """A method's options from the node MODEL.DISTILL."""
    if name.upper() not in distill:
        raise D2kdError(f"the config has no MODEL.DISTILL.{name.upper()}: import {name} before add_distill_config(cfg)")
    return {key: distill[name.upper()][key.upper()] for key in method_defaults(name)}


def _all(cuts: Iterable[Sequence[Cut]]) -> List[Cut]:
    """The cuts of several methods, each once."""
    return list(dict.fromkeys(chain.from_iterable(cuts)))


def _reads_head(methods: Sequence[Method]) -> bool:
    return any(method.reads_head for method in methods)


def _resizes(methods: Sequence[Method]) -> bool:
    return all(method.resizes for method in methods)


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
