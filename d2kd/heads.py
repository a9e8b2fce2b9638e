"""Dense heads: cutting and tapping their towers, and the cross head that enters a head behind the cut."""

import copy
from contextlib import ExitStack, contextmanager
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Tuple

from torch import Tensor, nn

from .contract import TOWERS, Features, Network
from .errors import D2kdError, nearest


class Cut(NamedTuple):
    """A place at which both towers of a head are cut.

    Attributes:
        convs: number of convolutions before the cut; 0 is the FPN feature itself.
        pre_activation: whether the tapped value is taken before the activation that follows the last of them.
    """

    convs: int
    pre_activation: bool = False


def split_tower(tower: nn.Sequential, cut: Cut) -> Tuple[int, int]:
    """Finds a cut in a tower.

    Args:
        tower: convolutions, each followed by its norm and activation, if any.
        cut: where to cut.

    Returns:
        ``(end, rest)``: ``tower[:end]`` computes the tapped value, ``tower[rest:]`` is what follows the cut. The
        activations between the two are those that ``cut.pre_activation`` skips.

    Raises:
        D2kdError: the tower has fewer convolutions.
    """
    convs = _conv_indices(tower)
    if not 0 <= cut.convs <= len(convs):
        raise D2kdError(f"cut {cut.convs} lies outside a tower of {len(convs)} convolutions; use 0 to {len(convs)}")
    rest = [0, *convs[1:], len(tower)][cut.convs]
    end = rest
    while cut.pre_activation and end and isinstance(tower[end - 1], nn.ReLU):
        end -= 1
    return end, rest


def num_convs(tower: nn.Sequential) -> int:
    """Number of a tower's convolutions, at each of which it can be cut."""
    return len(_conv_indices(tower))


def _conv_indices(tower: nn.Sequential) -> List[int]:
    return [i for i, layer in enumerate(tower) if isinstance(layer, nn.Conv2d)]


@contextmanager
def tap_towers(head: nn.Module, cuts: Sequence[Cut]) -> Iterator[Dict[Cut, Tuple[Features, Features]]]:
    """Collects tower features while the head runs.

    Args:
        head: a dense head; it runs each tower once per level, and each run appends one entry.
        cuts: where to tap. Cut 0 needs no hook and is not allowed here.

    Yields:
        For each cut the features of the class and the box tower, filled when the head runs. Leaving the ``with`` block
        removes the hooks.
    """
    taps: Dict[Cut, Tuple[Features, Features]] = {cut: ([], []) for cut in cuts}
    with ExitStack() as hooks:
        for cut, per_tower in taps.items():
            for name, found in zip(TOWERS, per_tower):
                tower = getattr(head, name)
                layer = tower[split_tower(tower, cut)[0] - 1]
                hooks.enter_context(
                    layer.register_forward_hook(lambda _module, _inputs, output, found=found: found.append(output))
                )
        yield taps


@contextmanager
def tap_modules(detector: Network, paths: Sequence[str]) -> Iterator[List[Features]]:
    """Collects the outputs of modules while a detector runs.

    Args:
        detector: student or teacher.
        paths: paths of modules, such as "backbone.bottom_up.res4".

    Yields:
        For each path the feature maps (N, C, H, W) that its module returned, in order: one per call, or several if it
        returns a list or dict of them.

    Raises:
        D2kdError: there is no such module; suggests the nearest.
    """
    taps: List[Features] = [[] for _ in paths]
    with ExitStack() as hooks:
        for path, found in zip(paths, taps):
            module = find_module(detector, path)
            hooks.enter_context(
                module.register_forward_hook(lambda _module, _inputs, output, found=found: found.extend(_maps(output)))
            )
        yield taps


def find_module(detector: Network, path: str) -> nn.Module:
    """Returns the module at a path; raises D2kdError with the nearest path if there is none."""
    modules = dict(detector.named_modules())
    if not path or path not in modules:
        names = [name for name in modules if name]
        raise D2kdError(f"{type(detector).__name__} has no module {path!r}{nearest(path, names)}")
    return modules[path]


def _maps(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.dim() == 4:
            yield output
    elif isinstance(output, (list, tuple, dict)):
        for part in output.values() if isinstance(output, dict) else output:
            yield from _maps(part)


class _Replay(nn.Module):
    """Replaces the front of a cut tower: ignores its input and returns the next level's stored feature."""

    def __init__(self, features: Features) -> None:
        super().__init__()
        self._features = iter(features)

    def forward(self, _: Tensor) -> Tensor:
        return next(self._features)


def cross_head(head: nn.Module, cut: Cut, cls_features: Features, box_features: Features) -> Tuple[Features, ...]:
    """Runs the part of a head behind a cut on another detector's tower features.

    This calls the head's own ``forward`` on a shallow copy whose towers start behind the cut, so whatever else the head
    has (centerness, per-level scales, norms) works as usual. Both inputs are expected *after* the activation, even if
    ``cut.pre_activation`` is set. All levels run in order, which norms that count calls (``CycleBatchNormList``) need.

    Args:
        head: must read the features only through ``cls_subnet`` and ``bbox_subnet``.
        cut: where to enter the towers.
        cls_features: input of the class tower, per level (N, C, Hi, Wi).
        box_features: input of the box tower, per level (N, C, Hi, Wi).

    Returns:
        What ``head.forward`` returns. Gradients flow to the features, and to parameters of the head that require them.
    """
    crossed = copy.copy(head)
    crossed._modules = dict(head._modules)  # do not cut the original head
    for name, features in zip(TOWERS, (cls_features, box_features)):
        tower = getattr(head, name)
        setattr(crossed, name, nn.Sequential(_Replay(features), *tower[split_tower(tower, cut)[1] :]))
    return tuple(crossed(cls_features))
