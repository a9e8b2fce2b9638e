"""Checks and preparation for a pair of student and teacher: heads, anchors, classes, module pairs, inheritance."""

import logging
import math
from typing import Any, Dict, List, Sequence, Tuple, Union

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, ImageList
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from .contract import Dense, Pyramid, is_dense, level_strides
from .data.coco import read_classes
from .dense import evaluation_mode, run_dense
from .errors import D2kdError, check_choice, nearest
from .keys import key

INHERITABLE = ("neck", "head")
CLASS_MAP, INHERIT = "MODEL.DISTILL.CLASS_MAP", "MODEL.DISTILL.INHERIT"
ALL_NAMES = "*"
Label = Union[str, int]
ClassMap = Sequence[Union[str, Sequence[Label]]]
PROBE_SIZE = 256  # pixels; P7 is then 2x2, large enough for group norms


def check_teacher_of_heads(teacher: Pyramid, scale: float, methods: Sequence[str]) -> None:
    """Raises D2kdError if methods that read its head are to learn from a teacher that is not dense, or scaled.

    Args:
        teacher: the teacher's detector.
        scale: how large it sees the images, relative to the student.
        methods: names of the methods that read predictions or towers.
    """
    if methods and not is_dense(teacher):
        raise D2kdError(
            f"{', '.join(methods)} needs the head of a dense detector (RetinaNet, GFL, ATSS, FCOS), but the teacher is "
            f"a {type(teacher).__name__}; use such a teacher, or methods that read features only, such as PKD"
        )
    if methods and scale != 1:
        raise D2kdError(
            f"{', '.join(methods)} compares predictions of equal levels, but at "
            f"{key('MODEL.DISTILL.TEACHER.SCALE')} {scale:g} the teacher's levels are other ones; set it to 1, or use "
            "methods that read features only, such as PKD"
        )


def check_classes(student: Dense, teacher: Dense) -> None:
    """Raises D2kdError unless both have the same number of classes, which comparing class predictions requires."""
    if student.num_classes != teacher.num_classes:
        raise D2kdError(
            f"the student has {student.num_classes} classes and the teacher {teacher.num_classes}; train the teacher "
            f"on the student's classes (NUM_CLASSES), say which of them are the same ({key(CLASS_MAP)}), or use "
            "methods that read features only"
        )


def check_heads(student: Dense, teacher: Dense) -> None:
    """Raises D2kdError unless both heads have the same anchors, which comparing predictions requires.

    Anchors of detectors with one per place (GFL, ATSS, FCOS) may differ, since each detector decodes its own.
    """
    if {*student.anchor_generator.num_anchors, *teacher.anchor_generator.num_anchors} == {1}:
        return
    own, theirs = _sample_anchors(student), _sample_anchors(teacher)
    if own.shape != theirs.shape or not torch.allclose(own, theirs, atol=1e-2):
        raise D2kdError(
            "the anchors of student and teacher differ; set MODEL.ANCHOR_GENERATOR (SIZES, ASPECT_RATIOS, OFFSET) "
            f"to the same values for both: the first that differs is {_first_anchor(own, theirs)} in the student and "
            f"{_first_anchor(theirs, own)} in the teacher"
        )


def _sample_anchors(detector: Dense, side: int = 512) -> Tensor:
    sizes = [-(-side // stride) for stride in level_strides(detector)]
    grids = [torch.zeros(1, 1, size, size, device=detector.device) for size in sizes]
    return Boxes.cat(detector.anchor_generator(grids)).tensor.cpu()


def _first_anchor(anchors: Tensor, others: Tensor) -> List[float]:
    """Returns the first anchor that differs from the other one at the same index."""
    count = min(len(anchors), len(others))
    differ = (anchors[:count] - others[:count]).abs().amax(1) > 1e-2
    return [round(x, 2) for x in anchors[int(differ.int().argmax())].tolist()]


def module_pairs(features: Sequence[str]) -> List[Tuple[str, str]]:
    """Splits entries "<path>" or "<student's>:<teacher's>" into pairs of paths."""
    pairs = []
    for entry in features:
        own, _, theirs = entry.partition(":")
        pairs.append((own.strip(), theirs.strip() or own.strip()))
    return pairs


def probe_channels(
    student: Pyramid,
    teacher: Pyramid,
    paths: Sequence[Tuple[str, str]],
    resizes: bool,
    scale: float = 1.0,
) -> List[Tuple[int, int]]:
    """Finds the channels of student and teacher for each map of the modules that feature methods compare.

    Args:
        student: the student.
        teacher: the teacher's detector.
        paths: modules, from :func:`module_pairs`, which run once on an empty image.
        resizes: whether the maps may differ in size.
        scale: how large the teacher sees the images, relative to the student.

    Raises:
        D2kdError: a module does not exist or returns no feature map, or the number or sizes of the maps differ.
    """
    own = probe(student, [path for path, _ in paths])
    theirs = probe(teacher, [path for _, path in paths], scale)
    sizes = [[tuple(x.shape[-2:]) for x in maps] for maps in (own, theirs)]
    if len(own) != len(theirs) or (sizes[0] != sizes[1] and not resizes):
        raise D2kdError(
            f"MODEL.DISTILL.FEATURES: for an image of {PROBE_SIZE}x{PROBE_SIZE} the student's modules give maps of "
            f"sizes {sizes[0]}, the teacher's {sizes[1]}; name modules of the same strides, in the same order"
        )
    return [(x.shape[1], y.shape[1]) for x, y in zip(own, theirs)]


@torch.no_grad()
def probe(detector: Pyramid, paths: Sequence[str], scale: float = 1.0) -> List[Tensor]:
    """Returns what modules give for an empty image; the statistics of norms do not change."""
    images = empty_batch(detector, scale=scale)
    with EventStorage(), evaluation_mode(detector):
        maps = run_dense(detector, images, with_head=is_dense(detector), paths=paths).tapped_maps
    if not maps:
        raise D2kdError(f"MODEL.DISTILL.FEATURES: {', '.join(paths)} give no feature maps (N, C, H, W)")
    return maps


def empty_batch(*detectors: Pyramid, scale: float = 1.0) -> ImageList:
    """A preprocessed batch of one empty image, padded as all of the detectors need it, on the device of the first."""
    divisor = math.lcm(*(max(detector.backbone.size_divisibility, 1) for detector in detectors))
    side = math.ceil(PROBE_SIZE * scale / divisor) * divisor
    return ImageList(torch.zeros(1, 3, side, side, device=detectors[0].device), [(side, side)])


def class_names(cfg: CfgNode) -> List[str]:
    """Names of the classes of a config's first training set; empty if the set or its names are not known."""
    if not cfg.DATASETS.TRAIN:
        return []
    metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
    names = metadata.get("thing_classes", None)
    if names is None and metadata.get("json_file", None):
        try:
            names = read_classes(metadata.json_file).values()
        except D2kdError:
            return []  # the teacher's data set may be missing here
    return list(names or [])


def match_classes(
    class_map: ClassMap, student: Tuple[Sequence[str], int], teacher: Tuple[Sequence[str], int]
) -> Tuple[List[int], List[int]]:
    """Finds the classes that student and teacher share.

    Args:
        class_map: see :class:`DistillMetaArch`.
        student: names (empty if unknown) and number of the student's classes.
        teacher: names (empty if unknown) and number of the teacher's classes.

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
                raise D2kdError(f'{key(CLASS_MAP)} "*" needs class names of both; write pairs of indices instead')
            pairs += [(student[0].index(name), teacher[0].index(name)) for name in common]
            continue
        both = (entry, entry) if isinstance(entry, str) else tuple(entry)
        if len(both) != 2:
            raise D2kdError(f"{key(CLASS_MAP)}: {entry!r} is neither a name nor a pair (student's, teacher's)")
        pairs.append((class_index(both[0], "student", *student), class_index(both[1], "teacher", *teacher)))
    own, theirs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    if len(set(own)) < len(own) or len(set(theirs)) < len(theirs):
        raise D2kdError(f"{key(CLASS_MAP)} maps a class twice: {pairs}; each may stand once on either side")
    logging.getLogger(__name__).info("Classes that student and teacher share: %s", pairs or "none")
    return own, theirs


def class_index(label: Label, who: str, names: Sequence[str], number: int) -> int:
    """Index of a class given by name or index; raises D2kdError if there is none."""
    if isinstance(label, str) and not label.isdigit():
        if label not in names:
            known = f"it has {', '.join(names)}" if names else "its names are unknown; use indices"
            raise D2kdError(f"{key(CLASS_MAP)}: the {who} has no class {label!r}; {known}{nearest(label, names)}")
        return list(names).index(label)
    if not 0 <= int(label) < number:
        raise D2kdError(f"{key(CLASS_MAP)}: the {who} has classes 0 to {number - 1}, not {label}")
    return int(label)


@torch.no_grad()
def inherit_parts(student: nn.Module, teacher: nn.Module, parts: Sequence[str]) -> None:
    """Copies whole parts of the teacher's weights into the student.

    Args:
        student: the student.
        teacher: the teacher's detector.
        parts: "neck" (the backbone without its bottom-up network) and "head".

    Raises:
        D2kdError: a part is unknown, or its tensors differ in name or shape; nothing is copied then.
    """
    copied: Dict[str, Tensor] = {}
    for part in parts:
        check_choice(key(INHERIT), part, INHERITABLE)
        own, theirs = (part_state(detector, part) for detector in (student, teacher))
        differ = [
            f"{name} {shape_of(own, name)} and {shape_of(theirs, name)}"
            for name in sorted(own.keys() | theirs.keys())
            if shape_of(own, name) != shape_of(theirs, name)
        ]
        if differ or not own:
            raise D2kdError(
                f"{key(INHERIT)} {part!r}: the {part}s of student and teacher differ in {len(differ)} tensors, "
                f"first {'; '.join(differ[:3])}; give both the same, or leave it out"
            )
        copied.update(theirs)
    if copied:
        own = student.state_dict()  # load_state_dict would reset frozen norms in other parts
        for name, value in copied.items():
            own[name].copy_(value)
        logging.getLogger(__name__).info("Inherited from the teacher: %s", ", ".join(copied))


def part_state(detector: nn.Module, part: str) -> Dict[str, Tensor]:
    """Tensors of a part, by name."""
    state: Dict[str, Any] = detector.state_dict()
    if part == "head":
        return {key: value for key, value in state.items() if key.startswith("head.")}
    return {k: v for k, v in state.items() if k.startswith("backbone.") and not k.startswith("backbone.bottom_up.")}


def shape_of(state: Dict[str, Tensor], key: str) -> Any:
    """Shape of a tensor; None if there is none of that name."""
    return tuple(state[key].shape) if key in state else None
