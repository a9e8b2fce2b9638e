"""What is checked and prepared when student and teacher meet: levels, anchors, classes, module pairs, inheritance."""

import logging
from typing import Any, Dict, List, Sequence, Tuple, Union

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, ImageList
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from .contract import level_channels, level_strides
from .data.coco import read_classes
from .dense import DenseOutputs, run_dense
from .errors import D2kdError, check_choice, nearest

INHERITABLE = ("neck", "head")
ALL_NAMES = "*"
Label = Union[str, int]
ClassMap = Sequence[Union[str, Sequence[Label]]]
PROBE_SIZE = 256  # pixels; P7 is 2x2 then, as group norms need


def check_levels(student: DenseDetector, teacher: DenseDetector, resizes: bool = False) -> None:
    """Raises D2kdError unless both heads read levels of the same strides; if ``resizes``, as many levels."""
    own, theirs = level_strides(student), level_strides(teacher)
    if len(own) != len(theirs) if resizes else own != theirs:
        raise D2kdError(
            f"the student's head reads levels of strides {own} and the teacher's {theirs}; distillation compares "
            "level by level, so choose the same (IN_FEATURES)"
        )


def check_classes(student: DenseDetector, teacher: DenseDetector) -> None:
    """Raises D2kdError unless both have the same number of classes, as comparing class predictions needs."""
    if student.num_classes != teacher.num_classes:
        raise D2kdError(
            f"the student has {student.num_classes} classes and the teacher {teacher.num_classes}; train the teacher "
            "on the student's classes (NUM_CLASSES), say which of them are the same (MODEL.DISTILL.CLASS_MAP), or use "
            "methods that read features only"
        )


def check_heads(student: DenseDetector, teacher: DenseDetector) -> None:
    """Raises D2kdError unless both heads have the same anchors, as comparing predictions needs.

    Anchors of detectors with one per place (GFL, ATSS, FCOS) may differ: each detector decodes its own.
    """
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


def module_pairs(features: Sequence[str]) -> List[Tuple[str, str]]:
    """Paths in student and teacher of each entry, "<path>" or "<student's>:<teacher's>"."""
    pairs = []
    for entry in features:
        own, _, theirs = entry.partition(":")
        pairs.append((own.strip(), theirs.strip() or own.strip()))
    return pairs


def probe_channels(
    student: DenseDetector, teacher: DenseDetector, paths: Sequence[Tuple[str, str]], resizes: bool
) -> List[Tuple[int, int]]:
    """Channels of student and teacher for each map that feature methods compare.

    Args:
        student: the student.
        teacher: the teacher's detector.
        paths: modules by :func:`module_pairs`; they are run once on an empty image. Empty: the FPN levels.
        resizes: maps may differ in size.

    Raises:
        D2kdError: a module is not there, gives no feature map, or another number or size of them in both.
    """
    if not paths:
        return list(zip(level_channels(student), level_channels(teacher)))
    own, theirs = (probe(detector, [pair[i] for pair in paths]) for i, detector in enumerate((student, teacher)))
    sizes = [[tuple(x.shape[-2:]) for x in maps] for maps in (own, theirs)]
    if len(own) != len(theirs) or (sizes[0] != sizes[1] and not resizes):
        raise D2kdError(
            f"MODEL.DISTILL.FEATURES: for an image of {PROBE_SIZE}x{PROBE_SIZE} the student's modules give maps of "
            f"sizes {sizes[0]}, the teacher's {sizes[1]}; name modules of the same strides, in the same order"
        )
    return [(x.shape[1], y.shape[1]) for x, y in zip(own, theirs)]


@torch.no_grad()
def probe(detector: DenseDetector, paths: Sequence[str]) -> List[Tensor]:
    """What modules give for an empty image; norms' statistics stay as they are."""
    training = {module: module.training for module in detector.modules()}
    divisor = max(detector.backbone.size_divisibility, 1)
    side = -(-PROBE_SIZE // divisor) * divisor
    images = ImageList(torch.zeros(1, 3, side, side, device=detector.device), [(side, side)])
    try:
        with EventStorage():
            maps = run_dense(detector.eval(), images, paths=paths).tapped_maps
    finally:
        for module, mode in training.items():
            module.training = mode
    if not maps:
        raise D2kdError(f"MODEL.DISTILL.FEATURES: {', '.join(paths)} give no feature maps (N, C, H, W)")
    return maps


def class_names(cfg: CfgNode) -> List[str]:
    """Names of the classes of a config's first training set, by index; empty where the set or its names are unknown."""
    if not cfg.DATASETS.TRAIN:
        return []
    metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
    names = metadata.get("thing_classes", None)
    if names is None and metadata.get("json_file", None):
        try:
            names = read_classes(metadata.json_file).values()
        except D2kdError:
            return []  # the teacher's data set need not be here
    return list(names or [])


def match_classes(
    class_map: ClassMap, student: Tuple[Sequence[str], int], teacher: Tuple[Sequence[str], int]
) -> Tuple[List[int], List[int]]:
    """Finds the classes that student and teacher share.

    Args:
        class_map: see :class:`DistillMetaArch`.
        student: names, empty where unknown, and number of the student's classes.
        teacher: likewise of the teacher.

    Returns:
        Indices of the shared classes in student and teacher, in the same order; may be empty with "*".

    Raises:
        D2kdError: a class is unknown, or mapped twice.
    """
    pairs: List[Tuple[int, int]] = []
    for entry in class_map:
        if entry == ALL_NAMES:
            common = [name for name in student[0] if name in teacher[0]]
            if not (student[0] and teacher[0]):
                raise D2kdError('MODEL.DISTILL.CLASS_MAP "*" needs class names of both; write pairs of indices instead')
            pairs += [(student[0].index(name), teacher[0].index(name)) for name in common]
            continue
        both = (entry, entry) if isinstance(entry, str) else tuple(entry)
        if len(both) != 2:
            raise D2kdError(f"MODEL.DISTILL.CLASS_MAP: {entry!r} is neither a name nor a pair (student's, teacher's)")
        pairs.append((class_index(both[0], "student", *student), class_index(both[1], "teacher", *teacher)))
    own, theirs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    if len(set(own)) < len(own) or len(set(theirs)) < len(theirs):
        raise D2kdError(f"MODEL.DISTILL.CLASS_MAP maps a class twice: {pairs}; each may stand once on either side")
    logging.getLogger(__name__).info("Classes that student and teacher share: %s", pairs or "none")
    return own, theirs


def class_index(label: Label, who: str, names: Sequence[str], number: int) -> int:
    """Index of a class given by name or index; raises D2kdError if there is none."""
    if isinstance(label, str) and not label.isdigit():
        if label not in names:
            known = f"it has {', '.join(names)}" if names else "its names are unknown; use indices"
            raise D2kdError(
                f"MODEL.DISTILL.CLASS_MAP: the {who} has no class {label!r}; {known}{nearest(label, names)}"
            )
        return list(names).index(label)
    if not 0 <= int(label) < number:
        raise D2kdError(f"MODEL.DISTILL.CLASS_MAP: the {who} has classes 0 to {number - 1}, not {label}")
    return int(label)


@torch.no_grad()
def inherit_parts(student: DenseDetector, teacher: DenseDetector, parts: Sequence[str]) -> None:
    """Copies whole parts of the teacher's weights into the student.

    Args:
        student: the student.
        teacher: the teacher's detector.
        parts: "neck" (the backbone without its bottom-up network) and "head".

    Raises:
        D2kdError: a part is unknown, or has not the same tensors in both; nothing is copied then.
    """
    copied: Dict[str, Tensor] = {}
    for part in parts:
        check_choice("MODEL.DISTILL.INHERIT", part, INHERITABLE)
        own, theirs = (part_state(detector, part) for detector in (student, teacher))
        differ = [
            f"{key} {shape_of(own, key)} and {shape_of(theirs, key)}"
            for key in sorted(own.keys() | theirs.keys())
            if shape_of(own, key) != shape_of(theirs, key)
        ]
        if differ or not own:
            raise D2kdError(
                f"MODEL.DISTILL.INHERIT {part!r}: the {part}s of student and teacher differ in {len(differ)} tensors, "
                f"first {'; '.join(differ[:3])}; give both the same, or leave it out"
            )
        copied.update(theirs)
    if copied:
        own = student.state_dict()  # load_state_dict would reset frozen norms that are not among them
        for key, value in copied.items():
            own[key].copy_(value)
        logging.getLogger(__name__).info("Inherited from the teacher: %s", ", ".join(copied))


def part_state(detector: nn.Module, part: str) -> Dict[str, Tensor]:
    """The tensors of a part by name."""
    state: Dict[str, Any] = detector.state_dict()
    if part == "head":
        return {key: value for key, value in state.items() if key.startswith("head.")}
    return {k: v for k, v in state.items() if k.startswith("backbone.") and not k.startswith("backbone.bottom_up.")}


def shape_of(state: Dict[str, Tensor], key: str) -> Any:
    """Shape of a tensor, None if it is not there."""
    return tuple(state[key].shape) if key in state else None
