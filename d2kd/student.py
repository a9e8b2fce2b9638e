"""Students made in Python, from detectors that are already built."""

import logging
from typing import Any, Optional, Sequence, Tuple, Type

from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from torch import nn

from .errors import D2kdError
from .meta_arch import DistillMetaArch
from .methods import Method
from .teacher import Teacher

_LOG = logging.getLogger(__name__)


def distill(model: nn.Module, teacher: Optional[Teacher], methods: Sequence[Method], **options: Any) -> DistillMetaArch:
    """Makes a student out of a detector.

    ::

        student = d2kd.distill(build_model(cfg), d2kd.load_teacher("teacher.yaml", "teacher.pth"), [CrossKD()])
        losses = student(batched_inputs)  # the detector's own losses and those of the methods
        torch.save(student.plain_state_dict(), "student.pth")

    The student shares parameters and buffers with ``model``, as a ``DistributedDataParallel`` does: training one trains
    the other. ``model`` stays the plain detector that it was.

    Args:
        model: any dense detector that has ``label_anchors`` and ``losses`` as detectron2's RetinaNet. Its own losses
            come from these two; a ``forward_training`` of its own is not called, which a warning says.
        teacher: from :func:`load_teacher`, or a :class:`Teacher` around a detector that is already built. It moves to
            the model's device. May be None if there are no methods.
        methods: methods with their options, such as ``[CrossKD(), PKD(weight=2)]``.
        **options: arguments of :class:`DistillMetaArch`, such as ``schedules`` and ``class_map``.

    Returns:
        The student, on the model's device and in its mode. It can be copied and pickled, teacher included.

    Raises:
        D2kdError: the detector, the teacher or a method is of the wrong kind, they do not fit, or there is no such
            option.
    """
    _check(model, teacher, methods)
    plain: Type[Any] = type(model)
    student = student_class(plain)(detector=model, teacher=teacher, methods=methods, **options)
    student.train(model.training)
    own_training = plain.forward_training
    if own_training.__module__.split(".")[0] not in ("detectron2", "d2kd"):
        _LOG.warning(
            "%s is not called: the student's own losses come from label_anchors and losses", own_training.__qualname__
        )
    return student.to(model.device)


def student_class(plain: Type[Any]) -> Type[DistillMetaArch]:
    """The class of students of a class of detectors: one that is defined, such as DistillRetinaNet, or a new one."""
    if issubclass(plain, DistillMetaArch):
        return plain
    for defined in DistillMetaArch.__subclasses__():
        if defined.__bases__ == (DistillMetaArch, plain):
            return defined
    members = {"__doc__": f"{plain.__name__} as a student.", "__module__": __name__, "__reduce_ex__": _reduce}
    made: Any = type(f"Distill{plain.__name__}", (DistillMetaArch, plain), members)
    return made


def _reduce(student: nn.Module, protocol: Any) -> Tuple[Any, ...]:
    """For copying and pickling: a class that was made here has no name to be found by."""
    return (_blank, (type(student).__bases__[1],), *object.__reduce_ex__(student, protocol)[2:])


def _blank(plain: Type[Any]) -> DistillMetaArch:
    made = student_class(plain)
    return made.__new__(made)


def _check(model: nn.Module, teacher: Optional[Teacher], methods: Sequence[Method]) -> None:
    """Raises D2kdError if something is not of the kind that :func:`distill` expects."""
    if not isinstance(model, DenseDetector):
        raise D2kdError(f"a student is a dense detector such as RetinaNet, not a {type(model).__name__}")
    if getattr(model, "methods", ()):
        raise D2kdError("this model is a student already; pass the detector that it was made of")
    if not isinstance(teacher, (Teacher, type(None))):
        raise D2kdError(
            f"the teacher is a {type(teacher).__name__}; use d2kd.load_teacher(config, weights), or wrap a detector "
            'that holds its weights: d2kd.Teacher(detector, "BGR")'
        )
    if not isinstance(methods, (list, tuple)):
        raise D2kdError(f"methods is a {type(methods).__name__}; pass a list, such as [CrossKD(), PKD(weight=2)]")
    for method in methods:
        if not isinstance(method, Method):
            raise D2kdError(f"{method!r} is not a method; pass instances, such as [CrossKD(), PKD(weight=2)]")
    if teacher and {*map(id, teacher.network.parameters())} & {*map(id, model.parameters())}:
        raise D2kdError("teacher and student share parameters; make the teacher of a copy: copy.deepcopy(model)")
