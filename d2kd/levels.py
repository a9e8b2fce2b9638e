"""Which levels of the pyramids of student and teacher are compared, and where they lie on each other."""

import logging
import math
from typing import List, NamedTuple, Sequence, Tuple

from .contract import Pyramid, is_dense, level_channels, level_names, level_strides
from .dense import DenseOutputs
from .errors import D2kdError, check_choice
from .keys import key
from .pairing import module_pairs


class LevelPair(NamedTuple):
    """A level of the student and the level of the teacher that feature methods compare it with.

    Attributes:
        own: index of the student's level.
        theirs: index of the teacher's level.
        ratio: stride of the student's level over that of the teacher's, both in the student's pixels.
    """

    own: int
    theirs: int
    ratio: float


def pair_levels(
    student: Pyramid, teacher: Pyramid, entries: Sequence[str] = (), scale: float = 1.0, resizes: bool = False
) -> List[LevelPair]:
    """Pairs the levels of student and teacher that feature methods compare.

    A dense student and a dense teacher that sees the same image must have the same levels. Any other teacher's levels
    are paired by their stride, and a level without a partner is left out.

    Args:
        student: the student.
        teacher: the teacher's detector.
        entries: pairs of names, "<student's>:<teacher's>", or one name for both; empty for the rule above.
        scale: how large the teacher sees the images, relative to the student.
        resizes: whether the maps of a pair may differ in size.

    Returns:
        The pairs; none if no strides agree.

    Raises:
        D2kdError: there is no level of a name, or the strides of a pair differ although no method may resize.
    """
    own, theirs = level_strides(student), [stride / scale for stride in level_strides(teacher)]
    if entries:
        indices = [_named_levels(student, teacher, *pair) for pair in module_pairs(entries)]
    elif is_dense(teacher) and scale == 1:
        check_levels(student, teacher, resizes)
        indices = [(i, i) for i in range(len(own))]
    else:
        indices = [(i, j) for i, x in enumerate(own) for j, y in enumerate(theirs) if math.isclose(x, y)]
    pairs = [LevelPair(i, j, own[i] / theirs[j]) for i, j in indices]
    if not resizes and not all(math.isclose(pair.ratio, 1) for pair in pairs):
        raise D2kdError(
            f"{key('MODEL.DISTILL.LEVELS')} pairs levels of strides {[own[i] for i, _ in indices]} with levels of "
            f"strides {[theirs[j] for _, j in indices]}; pair equal strides, or use methods that resize, such as PKD"
        )
    return pairs


def _named_levels(student: Pyramid, teacher: Pyramid, own: str, theirs: str) -> Tuple[int, int]:
    names = level_names(student), level_names(teacher)
    for who, name, known in zip(("student", "teacher"), (own, theirs), names):
        check_choice(f"{key('MODEL.DISTILL.LEVELS')}, a level of the {who},", name, known)
    return names[0].index(own), names[1].index(theirs)


def check_pairs(student: Pyramid, teacher: Pyramid, pairs: Sequence[LevelPair], scale: float) -> None:
    """Raises D2kdError if no levels are paired; logs those of the student that are left out."""
    names, strides = level_names(student), [stride / scale for stride in level_strides(teacher)]
    if not pairs:
        raise D2kdError(
            f"the student's levels have strides {level_strides(student)} and the teacher's {strides} pixels of the "
            f"student's image, so none is paired; name pairs in {key('MODEL.DISTILL.LEVELS')} and use methods that "
            "resize maps, such as PKD"
        )
    left_out = [name for i, name in enumerate(names) if i not in {pair.own for pair in pairs}]
    if left_out:
        logging.getLogger(__name__).info("Levels that feature methods leave out: %s", ", ".join(left_out))


def select_levels(student: DenseOutputs, teacher: DenseOutputs, pairs: Sequence[LevelPair]) -> None:
    """Selects the paired levels of both, and crops the teacher's to what the student's show.

    The teacher's batch may be padded further than the student's. Where its head ran, both must show the same.
    """
    student.levels, teacher.levels = [pair.own for pair in pairs], [pair.theirs for pair in pairs]
    if teacher.predictions:
        return
    for pair in pairs:
        sides = student.features[pair.own].shape[-2:]
        height, width = (math.ceil(side * pair.ratio - 1e-6) for side in sides)
        teacher.features[pair.theirs] = teacher.features[pair.theirs][..., :height, :width]


def paired_channels(student: Pyramid, teacher: Pyramid, pairs: Sequence[LevelPair]) -> List[Tuple[int, int]]:
    """Channels of the student's and the teacher's level of each pair."""
    own, theirs = level_channels(student), level_channels(teacher)
    return [(own[pair.own], theirs[pair.theirs]) for pair in pairs]


def check_levels(student: Pyramid, teacher: Pyramid, resizes: bool = False) -> None:
    """Raises D2kdError unless both heads read levels of the same strides, or just as many levels if ``resizes``."""
    own, theirs = level_strides(student), level_strides(teacher)
    if len(own) != len(theirs) if resizes else own != theirs:
        raise D2kdError(
            f"the student's head reads levels of strides {own} and the teacher's {theirs}; distillation compares "
            "level by level, so choose the same (IN_FEATURES), or for methods that read features name pairs in "
            f"{key('MODEL.DISTILL.LEVELS')}"
        )


def check_sizes(student: DenseOutputs, teacher: DenseOutputs) -> None:
    """Raises D2kdError unless the maps of both that are compared have the same sizes."""
    own, theirs = (
        [tuple(f.shape[-2:]) for f in [*outputs.compared(outputs.features), *outputs.tapped_maps]]
        for outputs in (student, teacher)
    )
    if own != theirs:
        raise D2kdError(
            f"the student's levels have the sizes {own} and the teacher's {theirs}, because they pad images to "
            "different multiples (backbone.size_divisibility); choose backbones of the same strides"
        )
