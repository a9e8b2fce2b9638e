"""The heart of d2kd: a frozen teacher beside any dense detector, and distillation losses added to its own.

``class DistillRetinaNet(DistillMetaArch, RetinaNet)`` is a RetinaNet in every respect (parameter names, inference,
losses). While it trains with methods, it also runs a teacher and adds the losses that the methods compute from both.
"""

import copy
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
from detectron2.utils.events import EventStorage, get_event_storage, has_event_storage
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .contract import AnchorGenerator, BoxCoder, channel_order, check_contract, num_classes
from .dense import DenseOutputs, Targets, evaluation_mode, make_targets, run_dense, upload
from .diagnose.gradients import GRADIENT, gradient_ratios
from .errors import D2kdError, nearest
from .heads import Cut
from .keys import key
from .level_losses import background_focal_sum
from .levels import (
    LevelPair,
    check_levels,
    check_pairs,
    check_sizes,
    pair_levels,
    paired_channels,
    select_levels,
)
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
    check_teacher_of_heads,
    class_names,
    empty_batch,
    inherit_parts,
    match_classes,
    module_pairs,
    probe_channels,
)
from .teacher import Teacher, load_teacher
from .wiring import check_wiring
from .workers import at_least_one, mean_over_workers, num_workers


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
        focal_loss_alpha: float
        focal_loss_gamma: float
        loss_normalizer: Any
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
        levels: pairs of levels that feature methods compare, "<student's>:<teacher's>" such as "p3:p2", or one name for
            both. Empty: levels of equal strides, see :func:`pair_levels`.
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
        fast_losses: compute the student's own losses with less time and memory, equal to rounding; for RetinaNet, also
            without methods.
        recompute: do not keep what the methods compute until the backward pass, but compute it again there: less memory
            for more time, with the same gradients.
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
        levels: Sequence[str] = (),
        features: Sequence[str] = (),
        class_map: ClassMap = (),
        class_names: Sequence[str] = (),
        schedules: Optional[Mapping[str, Schedule]] = None,
        inherit: Sequence[str] = (),
        gradient_period: int = 0,
        sync_normalizer: bool = False,
        fast_losses: bool = False,
        recompute: bool = False,
        detector: Optional[DenseDetector] = None,
        **student: Any,
    ) -> None:
        if detector is None:
            super().__init__(**student)
        else:
            self._become(detector, student)
        self.gradient_period = gradient_period
        self.sync_normalizer = sync_normalizer
        self.fast_losses = fast_losses
        self._check_fast_losses()
        self.recompute = recompute
        self.teacher = teacher
        check_unique([type(method).__name__ for method in methods])
        self.distill = nn.ModuleDict({type(method).__name__.lower(): method for method in methods})
        self.schedules = {name.lower(): schedule for name, schedule in (schedules or {}).items()}
        self.paths = module_pairs(features)
        #: The levels that feature methods compare.
        self.level_pairs: List[LevelPair] = []
        #: Indices of the shared classes in student and teacher; None if their classes are the same.
        self.shared_classes: Optional[Tuple[List[int], List[int]]] = None
        self._class_tensors: Optional[List[Tensor]] = None
        self._loss_names: Dict[str, List[str]] = {}  # of methods that end
        self._not_inherited: Optional[D2kdError] = None
        if methods or inherit:
            self._meet_teacher(levels, class_map, class_names, inherit)

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
            "levels": distill.LEVELS,
            "features": distill.FEATURES,
            "class_map": distill.CLASS_MAP,
            "class_names": class_names(cfg) if distill.CLASS_MAP else (),
            "schedules": {name: Schedule.from_node(distill.SCHEDULE[name.upper()]) for name in distill.METHODS},
            "inherit": distill.INHERIT,
            "gradient_period": distill.GRADIENT_PERIOD,
            "sync_normalizer": distill.SYNC_NORMALIZER,
            "fast_losses": distill.FAST_LOSSES,
            "recompute": distill.RECOMPUTE,
            "teacher": load_teacher(
                teacher.CONFIG_FILE,
                teacher.WEIGHTS,
                teacher.OPTS,
                when_needed=True,
                dtype=teacher.DTYPE,
                fold_norms=teacher.FOLD_NORMS,
                scale=teacher.SCALE,
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

    def _check_fast_losses(self) -> None:
        if self.fast_losses and getattr(super().losses, "__func__", None) is not RetinaNet.losses:
            raise D2kdError(
                f"{key('MODEL.DISTILL.FAST_LOSSES')} speeds up the losses of detectron2's RetinaNet, which "
                f"{type(self).__name__} does not have; set it to False"
            )

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

    def _meet_teacher(
        self, levels: Sequence[str], class_map: ClassMap, class_names: Sequence[str], inherit: Sequence[str]
    ) -> None:
        """Checks that the teacher fits, and prepares what depends on both."""
        if self.teacher is None:
            raise D2kdError(f"methods and INHERIT need a teacher: set {key('MODEL.DISTILL.TEACHER')}")
        teacher, scale = self.teacher.architecture, self.teacher.scale
        reads_head, resizes = _reads_head(self.methods), _resizes(self.methods)
        check_contract(self, reads_head)
        check_teacher_of_heads(teacher, scale, [type(method).__name__ for method in self.methods if method.reads_head])
        check_contract(self.teacher.network, reads_head, with_losses=False)
        check_wiring(self)
        self.level_pairs = pair_levels(self, teacher, levels, scale, resizes)
        if levels and self.paths:
            raise D2kdError(f"{key('MODEL.DISTILL.FEATURES')} replaces {key('MODEL.DISTILL.LEVELS')}; set either to ()")
        if self.methods and not self.paths:
            check_pairs(self, teacher, self.level_pairs, scale)
        if class_map:
            theirs = self.teacher.class_names, num_classes(teacher) or 0
            self.shared_classes = match_classes(class_map, (class_names, self.num_classes), theirs)
        if reads_head:
            check_levels(self, teacher)
            if not class_map:
                check_classes(self, teacher)
            check_heads(self, teacher)
        channels = (
            probe_channels(self, teacher, self.paths, resizes, scale)
            if self.paths
            else paired_channels(self, teacher, self.level_pairs)
        )
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
        scaled = empty_batch(*detectors, scale=self.teacher.scale)
        nothing = Instances(images.image_sizes[0], gt_boxes=Boxes(images.tensor.new_zeros(0, 4)))
        nothing.gt_classes = torch.zeros(0, dtype=torch.long, device=self.device)
        with EventStorage(), torch.no_grad(), torch.random.fork_rng(devices=[]), evaluation_mode(self):
            student = run_dense(self, images, method.cuts, paths=[own for own, _ in self.paths])
            paths = [theirs for _, theirs in self.paths]
            teacher = run_dense(detectors[1], scaled, method.teacher_cuts, self.teacher.is_dense, paths)
            self._match(student, teacher)
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
            if not self.distill:
                return super().forward(batched_inputs)
            observation = self.observe(batched_inputs)
            self._free_maps(observation.teacher)
            return self.losses_of(observation)

    def _free_maps(self, teacher: Optional[DenseOutputs]) -> None:
        """Frees the teacher's maps before the losses are computed, which need most memory, if no method reads them."""
        methods = list(self.active_methods().values())
        if teacher is not None and not any(method.reads_maps for method in methods):
            for method in methods:
                method.note(teacher)
            teacher.free_maps()

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
        batched_inputs = upload(batched_inputs, self.device)  # once for both detectors
        methods = list(self.active_methods().values())
        images = self.preprocess_image(batched_inputs)
        teacher = self.run_teacher(batched_inputs, tuple(images.tensor.shape[-2:]))
        cuts = _all(method.cuts for method in methods)
        student = run_dense(self, images, cuts, paths=[own for own, _ in self.paths] if methods else ())
        if teacher is not None:
            self._match(student, teacher)
            if not _resizes(methods):
                check_sizes(student, teacher)
        instances = [x["instances"] for x in batched_inputs]
        assigned = self.label_anchors(student.anchors_per_level, instances)
        return Observation(images, student, teacher, make_targets(student, images, instances, *assigned))

    def run_teacher(
        self, batched_inputs: List[Dict[str, Any]], padded_size: Tuple[int, int] = (0, 0)
    ) -> Optional[DenseOutputs]:
        """Runs as much of the teacher as the active methods read; returns None if no method is active.

        Args:
            batched_inputs: raw images.
            padded_size: height and width in pixels of the student's batch.
        """
        methods = list(self.active_methods().values())
        if self.teacher is None or not methods:
            return None
        paths = [theirs for _, theirs in self.paths]
        with_head = _reads_head(methods) or any(path.startswith("head") for path in paths)
        cuts = _all(method.teacher_cuts for method in methods)
        return self.teacher(batched_inputs, channel_order(self), cuts, with_head, paths, padded_size)

    def _match(self, student: DenseOutputs, teacher: DenseOutputs) -> None:
        """Says in both outputs which levels and classes are compared."""
        select_levels(student, teacher, self.level_pairs)
        if self.shared_classes is not None:
            if self._class_tensors is None or self._class_tensors[0].device != self.device:
                self._class_tensors = [torch.tensor(x, device=self.device).long() for x in self.shared_classes]
            for outputs, classes in zip((student, teacher), self._class_tensors):
                outputs.classes = classes

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
        if self.gradient_period and torch.is_grad_enabled() and get_event_storage().iter % self.gradient_period == 0:
            ratios = gradient_ratios(losses, list(self.distill), student.features)
            get_event_storage().put_scalars(smoothing_hint=False, **{GRADIENT + k: v for k, v in ratios.items()})
        return losses

    def _method_losses(self, name: str, method: Method, observation: Observation) -> Dict[str, Tensor]:
        if observation.teacher is None or self._has_ended(name):
            return dict.fromkeys(self._loss_names[name], self._connected_zero(method))
        weight = self.schedules[name].weight(get_event_storage().iter) if name in self.schedules else 1.0
        losses = self._run_method(method, observation.student, observation.teacher, observation.targets)
        return {key: weight * value for key, value in losses.items()}

    def _run_method(
        self, method: Method, student: DenseOutputs, teacher: DenseOutputs, targets: Targets
    ) -> Dict[str, Tensor]:
        if not (self.recompute and torch.is_grad_enabled()):
            return method(student, teacher, targets)

        def run(_: Tensor) -> Dict[str, Tensor]:
            # Copies, so that what they cache does not stay, and is computed again.
            return method(copy.copy(student), copy.copy(teacher), targets)

        # The tensor tells which device's random state is to be restored.
        return checkpoint(run, targets.labels, use_reentrant=False)

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
        if not self.fast_losses:
            return super().losses(anchors, pred_logits, gt_labels, *rest)
        # detectron2 makes int64 targets of all classes and several copies of all logits. Here it sees the positive
        # anchors only, while those of the background, which are almost all, need no targets.
        background = labels == self.num_classes
        losses = super().losses(anchors, pred_logits, list(labels.masked_fill(background, -1)), *rest)
        parts = zip(pred_logits, background.split([len(level) for level in anchors], dim=1))
        alpha, gamma = self.focal_loss_alpha, self.focal_loss_gamma
        total = torch.stack([background_focal_sum(*part, alpha, gamma) for part in parts]).sum()
        losses["loss_cls"] = losses["loss_cls"] + total / self.loss_normalizer
        return losses

    def _ema_update(self, name: str, value: Any, initial_value: float, momentum: float = 0.9) -> Any:
        if self.sync_normalizer:  # average the counts, not the values: these are 1 for a worker without positives too
            value = at_least_one(mean_over_workers(self._num_pos)).double()  # not .item(), which waits
            initial_value /= num_workers()
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
