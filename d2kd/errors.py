"""Mistakes of users and bugs: how each ends a command, and what messages are made of."""

import re
import sys
import traceback
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Callable, Iterable, Iterator, NamedTuple, Optional, Type

import torch

from .keys import key, setting

#: Exit statuses of commands: after a bug, a mistake of the user, and Ctrl-C.
EXIT_BUG, EXIT_MISTAKE, EXIT_INTERRUPTED = 1, 2, 130

PLEASE_REPORT = "this is a bug in d2kd or in code it runs: please report it with the traceback above"

# How texts begin that torch's DataLoader and torch.multiprocessing pass on from another process.
_FROM_ANOTHER_PROCESS = re.compile(r"\s*(Caught \w+ in |-- Process \d+ )")


# Characters of a message, and of a name in it: more tells nobody more.
MESSAGE_LENGTH, NAME_LENGTH = 2000, 200


def printable(text: object, length: int = NAME_LENGTH) -> str:
    """A text from a file for messages: characters that terminals obey are escaped, the middle of long ones left out.

    Args:
        text: a name, or a whole message.
        length: the most characters that are kept.
    """
    shown, half = escaped(str(text)), length // 2 - 3
    return shown if len(shown) <= length else f"{shown[:half]} ... {shown[-half:]}"


def escaped(text: str) -> str:
    """A text in which newlines, and all else that is no visible character, is written as Python does."""
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in text)


class D2kdError(ValueError):
    """A mistake in a config, file or argument.

    The message is one sentence that names the file, key or value and how to fix it. Commands print it without a
    traceback and exit with status 2. It is one line, whatever the names in it hold; see :func:`printable`.
    """

    def __init__(self, message: object) -> None:
        text = str(message)
        super().__init__(printable(mistake_in_traceback(text) or text, MESSAGE_LENGTH))


def mistake_in_traceback(text: str) -> Optional[str]:
    """The message of the D2kdError with which a process ended whose traceback torch passes on; None if it is another's.

    Args:
        text: of the exception that torch raises in the process that waited.
    """
    if not _FROM_ANOTHER_PROCESS.match(text):
        return None
    _, found, message = text.strip().splitlines()[-1].rpartition("D2kdError: ")
    return message if found else None


class KnownMistake(NamedTuple):
    """What another library raises for a mistake of the user, and what to say instead.

    Attributes:
        kind: of exception.
        pattern: of its message, searched for.
        sentence: makes the message from the match.
    """

    kind: Type[BaseException]
    pattern: str
    sentence: Callable[["re.Match[str]"], str]


#: What numpy and PIL raise for images without pixels.
NO_PIXELS = r"At least one stride in the given numpy array is negative|height and width must be > 0"
#: YAML keys that name what a registry of detectron2 holds.
REGISTRIES = {
    "META_ARCH": "MODEL.META_ARCHITECTURE",
    "BACKBONE": "MODEL.BACKBONE.NAME",
    "ANCHOR_GENERATOR": "MODEL.ANCHOR_GENERATOR.NAME",
}

KNOWN_MISTAKES = [
    KnownMistake(
        torch.OutOfMemoryError,
        "",
        lambda _: (
            f"the GPU's memory is full; lower {key('SOLVER.IMS_PER_BATCH')} (and {key('SOLVER.BASE_LR')} alike) or the "
            f"image size, or set {setting('SOLVER.AMP.ENABLED', True)}"
        ),
    ),
    KnownMistake(
        OSError,
        "No space left on device|Disk quota exceeded|File too large",
        lambda found: (
            f"the disk is full ({found[0]}); free some space, then --resume continues from the last checkpoint"
        ),
    ),
    KnownMistake(
        KeyError,
        r"No object named '(.*)' found in '(META_ARCH|BACKBONE|ANCHOR_GENERATOR)' registry",
        lambda found: (
            f"{key(REGISTRIES[found[2]])} is {found[1]!r}, which nothing is registered as; check its spelling"
        ),
    ),
    KnownMistake(
        ValueError,
        r"Unknown training sampler: (.*)",
        lambda found: f"DATALOADER.SAMPLER_TRAIN is {found[1]!r}; use TrainingSampler or RepeatFactorTrainingSampler",
    ),
    KnownMistake(
        ValueError,
        r"num_channels must be divisible by num_groups|num_channels \(\d+\) must be divisible by num_groups",
        lambda _: (
            "a NORM is GN, which has 32 groups and so needs numbers of channels in 32s; change the channels "
            "(MODEL.FPN.OUT_CHANNELS, MODEL.RESNETS.STEM_OUT_CHANNELS; LazyConfig: conv_dims, out_channels, width), or "
            "take another NORM"
        ),
    ),
    KnownMistake(
        ValueError,
        r"Expected more than 1 (?:spatial element|value per channel) when training, got input size (.*)",
        lambda found: (
            f"a NORM has a single value per channel or group to normalize (a map of size {found[1]}); use larger "
            f"images or batches ({key('INPUT.MIN_SIZE_TRAIN')}, {key('SOLVER.IMS_PER_BATCH')}), or another NORM"
        ),
    ),
    KnownMistake(
        ValueError,
        r"Milestones? must be smaller than total number of updates: num_updates=(\d+), milestone=(.*)",
        lambda found: f"{key('SOLVER.STEPS')} has {found[2]}, which must lie before the last iteration, {found[1]}",
    ),
    KnownMistake(
        ValueError,
        r"Total num_updates must be greater than length of param schedule",
        lambda _: f"{key('SOLVER.STEPS')} has more steps than the run has iterations ({key('SOLVER.MAX_ITER')})",
    ),
    KnownMistake(
        ValueError,
        r"Invalid dense box regression loss type '(.*)'",
        lambda found: (
            f"{key('MODEL.RETINANET.BBOX_REG_LOSS_TYPE')} is {found[1]!r}; use one of smooth_l1, giou, diou, ciou"
        ),
    ),
    KnownMistake(
        ValueError,
        r"MultiStep scheduler requires a list of (\d+) miletones",
        lambda found: f"lr_multiplier.scheduler.milestones must have as many entries as its values, {found[1]}",
    ),
    KnownMistake(
        AssertionError,
        r"No valid data found in (.*)\.",
        lambda found: (
            f"no image of {found[1]} is left to train on: annotate some, or filter less (MODEL.KEYPOINT_ON, "
            "DATALOADER.FILTER_EMPTY_ANNOTATIONS; LazyConfig: min_keypoints, filter_empty of the dataset)"
        ),
    ),
    KnownMistake(
        ValueError,
        NO_PIXELS,
        lambda _: (
            f"an image has a side of a pixel or less after resizing; use larger ones ({key('INPUT.MIN_SIZE_TRAIN')}, "
            "INPUT.MAX_SIZE_TRAIN; LazyConfig: short_edge_length, max_size)"
        ),
    ),
    KnownMistake(
        AssertionError,
        r"(MODEL\.RESNETS\.\S+(?: = \d+)?) (unsupported )?for R18/R34",
        lambda found: (
            f"ResNets of MODEL.RESNETS.DEPTH 18 and 34 need {found[1]}{' False' if found[2] else ''}; set it, or take "
            "the MODEL.BACKBONE.NAME build_extra_fpn_backbone, which has any width"
        ),
    ),
    KnownMistake(
        ValueError,
        r"(Cannot do both horiz and vert|At least one of horiz or vert has to be True)",
        lambda _: "an augmentation RandomFlip must flip in one direction: set either horizontal or vertical to True",
    ),
    KnownMistake(
        ValueError,
        r"SyncBatchNorm expected input tensor to be on",
        lambda _: "a NORM is SyncBN, which needs GPUs; use BN or GN on the CPU",
    ),
]


@contextmanager
def known_mistakes() -> Iterator[None]:
    """Turns what is listed in :data:`KNOWN_MISTAKES` into a D2kdError; everything else passes unchanged."""
    try:
        yield
    except D2kdError:
        raise
    except Exception as error:
        for known in KNOWN_MISTAKES:
            match = re.search(known.pattern, str(error)) if isinstance(error, known.kind) else None
            if match:
                raise D2kdError(known.sentence(match)) from error
        raise


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns ``"; did you mean X?"`` for the known name nearest to ``name``, or ``""`` if none is near."""
    matches = get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""


def check_choice(what: str, value: str, known: Iterable[str]) -> None:
    """Raises D2kdError unless a value is one of the known ones; the message says what it is the value of."""
    choices = list(known)
    if value not in choices:
        raise D2kdError(f"{what} is {value!r}; use one of {', '.join(choices)}{nearest(value, choices)}")


def exit_status(run: Callable[[], Optional[int]]) -> int:
    """Runs a command.

    Args:
        run: does what the command does; may return an exit status.

    Returns:
        The exit status: what ``run`` returns, 0 for None; 2 after a mistake, which is printed in one sentence; 1 after
        a bug, of which the traceback is printed.
    """
    try:
        return run() or 0
    except D2kdError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_MISTAKE
    except Exception as error:
        traceback.print_exc()
        print(f"bug: {type(error).__name__}: {PLEASE_REPORT}", file=sys.stderr)
        return EXIT_BUG
