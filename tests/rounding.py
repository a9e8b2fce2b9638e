"""Compares gradients with golden ones where float32 rounding decides what they are.

Two correct programs may differ by more than any sensible tolerance in two places, which depend on CPU, threads and
version of torch:

- A ReLU's gradient is 0 or 1 by the sign of its input. Where the exact input lies within the rounding error of zero,
  the contribution of that element comes or goes as a whole. Such inputs are found by running the model in float64, and
  the golden gradient may have been computed with either mask of each of them.
- CrossKD divides features by their deviation. Of two values, or of several of which one is not zero, the result does
  not depend on their size: their gradient is the difference of two equal numbers, and what is left is rounding, which
  the reference's tiny normalizer on a batch without ground truth multiplies by 1e6. What rounding does to each element
  is measured by runs whose every operation is off by one rounding; an element may differ by a few times that.

Both are looked for only if a gradient is off, and neither changes what is asked of any other element.
"""

from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# How many times the rounding errors that were seen another program's may be.
MARGIN = 4.0
ROUNDED_RUNS = 6
# Elements that rounding may decide, in parts of all.
MOST_LEFT_OUT = 0.05
# The smallest output of a ReLU that lets the gradient through.
OPEN = 1e-30
RELUS = (torch.ops.aten.relu.default, torch.ops.aten.relu_.default)

Gradients = Dict[str, Tensor]
Run = Callable[[bool], Gradients]


class Relus(TorchDispatchMode):
    """Records the inputs of all ReLUs of a run in the order of their calls, and forces their masks if they are given.

    Autograd derives a ReLU's mask from its output, so a mask is forced by an output of 0 or of next to nothing.
    """

    def __init__(self, masks: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.masks = masks
        self.inputs: List[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in RELUS:
            return func(*args, **(kwargs or {}))
        self.inputs.append(args[0].detach().clone())
        out = func(*args)
        if self.masks:
            out.copy_(torch.where(self.masks[len(self.inputs) - 1], out.clamp(min=OPEN), 0))
        return out


class Rounding(TorchDispatchMode):
    """Each result of the forward pass that has a gradient is off by up to one rounding of float32."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        differentiable = any(isinstance(x, Tensor) and x.requires_grad for x in tree_leaves((args, kwargs)))
        aliases = any(x.alias_info is not None for x in func._schema.returns)
        return tree_map(self.shake, out) if differentiable and not aliases else out

    @staticmethod
    def shake(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        return value * (1 + torch.finfo(torch.float32).eps * (2 * torch.rand_like(value) - 1))


class InDouble(TorchFunctionMode):
    """Turns the code's own casts to float32 into casts to float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*args, **(kwargs or {}))


@contextmanager
def in_double() -> Iterator[None]:
    """New tensors and casts are float64 in the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with InDouble():
            yield
    finally:
        torch.set_default_dtype(before)


def check_gradients(run: Run, golden: Gradients, tolerance: float) -> None:
    """Asserts that gradients are the golden ones, but for what rounding alone decides.

    Args:
        run: returns the gradients by name, computed in float64 if its argument is true.
        golden: what some of them should be.
        tolerance: largest error in parts of the gradient's largest element.
    """
    with Relus() as relus:
        ours = run(False)
    if not too_large(ours, golden, tolerance):
        return
    masks = [x > 0 for x in relus.inputs]
    flips = choose_masks(run, masks, ours, golden)
    with Relus(masks):
        ours = run(False)
    wrong = too_large(ours, golden, tolerance)
    if wrong:
        wrong = too_large(ours, golden, tolerance, rounding_errors(run, masks, ours))
    assert not wrong, f"gradients are off by more than {tolerance}, with {flips} ReLU masks flipped: {wrong}"


def choose_masks(run: Run, masks: List[Tensor], ours: Gradients, golden: Gradients) -> int:
    """Flips, in place, those ambiguous masks that bring the gradients nearer to the golden ones; returns how many."""
    flips, best = 0, sum(errors(ours, golden).values())
    for call, index in ambiguous_inputs(run):
        masks[call][index] = ~masks[call][index]
        with Relus(masks):
            error = sum(errors(run(False), golden).values())
        if error < best:
            flips, best = flips + 1, error
        else:
            masks[call][index] = ~masks[call][index]
    return flips


def ambiguous_inputs(run: Run) -> List[Tuple[int, Tuple[int, ...]]]:
    """Inputs of ReLUs that are zero but for rounding, as numbers of calls and indices.

    The exact inputs are not zero, and not larger than a few times the largest error of that call's inputs.
    """
    with Relus() as single:
        run(False)
    with in_double(), Relus() as double:
        run(True)
    assert len(single.inputs) == len(double.inputs)
    found = []
    for call, (rounded, exact) in enumerate(zip(single.inputs, double.inputs)):
        assert exact.dtype == torch.float64, "a ReLU ran in float32"
        if exact.numel():
            error = (rounded.double() - exact).abs().max()
            close_to_zero = (exact.abs() <= MARGIN * error) & (exact != 0)
            found += [(call, tuple(index)) for index in close_to_zero.nonzero().tolist()]
    return found


def rounding_errors(run: Run, masks: Sequence[Tensor], ours: Gradients) -> Gradients:
    """Largest change of each element of the gradients by one rounding more in every operation."""
    largest = {name: torch.zeros_like(x) for name, x in ours.items()}
    for _ in range(ROUNDED_RUNS):
        with Relus(masks), Rounding():
            rounded = run(False)
        largest = {name: torch.maximum(x, (rounded[name] - ours[name]).abs()) for name, x in largest.items()}
    return largest


def errors(ours: Gradients, golden: Gradients) -> Dict[str, float]:
    """Largest error of each gradient in parts of its largest element."""
    found = {}
    for name, theirs in golden.items():
        assert ours[name].shape == theirs.shape, f"{name}: {tuple(ours[name].shape)} is not {tuple(theirs.shape)}"
        assert ours[name].isfinite().all(), f"{name} is not finite"
        found[name] = float((ours[name] - theirs).abs().max() / scale_of(theirs))
    return found


def too_large(
    ours: Gradients, golden: Gradients, tolerance: float, rounding: Optional[Gradients] = None
) -> Dict[str, str]:
    """The errors above the tolerance, or above a few times those of rounding where these are larger."""
    found, left_out = {}, 0
    for name, error in errors(ours, golden).items():
        allowed = (tolerance * scale_of(golden[name])).expand_as(golden[name])
        if rounding:
            left_out += int((MARGIN * rounding[name] > allowed).sum())
            allowed = torch.maximum(allowed, MARGIN * rounding[name])
        if ((ours[name] - golden[name]).abs() > allowed).any():
            found[name] = f"{error:.2g}"
    total = sum(x.numel() for x in golden.values())
    assert left_out <= MOST_LEFT_OUT * total, f"rounding decides {left_out} of {total} elements"
    return found


def scale_of(gradient: Tensor) -> Tensor:
    return gradient.abs().max().clamp(min=1e-12)
