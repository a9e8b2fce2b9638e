"""How far a teacher in reduced precision moves the gradient that the methods give the student."""

import logging
from typing import Any, Dict, List

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor

from ..dense import evaluation_mode
from ..errors import D2kdError
from ..keys import setting
from ..meta_arch import DistillMetaArch

# Far above what bfloat16 does to a trained teacher (docs/performance.md), far below the noise of a batch of images.
LARGEST_DIFFERENCE = 0.05
_LOG = logging.getLogger(__name__)


def check_precision(model: DistillMetaArch, images: List[Dict[str, Any]], amp_dtype: str = "") -> None:
    """Compares the methods' gradient at the student's features with the one that the exact teacher gives, and logs it.

    Weights, statistics, normalizers and random numbers of training stay as they are. All workers must call it with the
    same images, since methods average over workers.

    Args:
        model: the student with its teacher.
        images: with annotations, as :class:`DatasetMapper` returns them.
        amp_dtype: type of mixed precision in training, "" for none.

    Raises:
        D2kdError: the teacher's outputs are not finite in its type.
    """
    assert model.teacher is not None
    engine, device = model.teacher.engine, model.device.type
    kind = torch.bfloat16 if device == "cpu" or amp_dtype != "float16" else torch.float16
    found, exact = [], []
    with torch.autocast(device, kind, enabled=bool(amp_dtype)):
        dtype = engine.type_on(model.device)
        for image in images:
            found.append(method_gradient(model, image))
            with engine.exact():
                exact.append(method_gradient(model, image))
    compare(torch.cat(found), torch.cat(exact), str(dtype).partition(".")[2])


def compare(found: Tensor, exact: Tensor, dtype: str) -> None:
    """Logs how two gradients differ, as a warning if by more than ``LARGEST_DIFFERENCE``."""
    other = setting("MODEL.DISTILL.TEACHER.DTYPE", "bfloat16" if dtype == "float16" else "float32")
    if exact.isfinite().all() and not found.isfinite().all():
        raise D2kdError(f"the teacher's outputs are not finite in {dtype}; set {other}")
    difference = float((found - exact).norm() / exact.norm().clamp(min=1e-12))
    cosine = float(torch.nn.functional.cosine_similarity(found, exact, dim=0))
    text = f"in {dtype} the teacher moves the methods' gradient by {100 * difference:.2f} % (cosine {cosine:.6f})"
    if difference > LARGEST_DIFFERENCE:
        _LOG.warning("I%s, more than %g %%: %s is safer.", text[1:], 100 * LARGEST_DIFFERENCE, other)
    else:
        _LOG.info("I%s.", text[1:])


def method_gradient(model: DistillMetaArch, image: Dict[str, Any]) -> Tensor:
    """Gradient of the sum of the methods' losses for one image at all features of the student, flat."""
    devices = [model.device] if model.device.type == "cuda" else []
    with EventStorage(), evaluation_mode(model), torch.random.fork_rng(devices):
        torch.manual_seed(0)  # for the same random masks
        seen = model.observe([image])
        assert seen.teacher is not None
        losses = [method(seen.student, seen.teacher, seen.targets) for method in model.methods]
        total = torch.stack([loss for found in losses for loss in found.values()]).sum()
        features = [*seen.student.features, *seen.student.tapped_maps]
        gradients = torch.autograd.grad(total, features, allow_unused=True)
    return torch.cat([gradient.float().flatten() for gradient in gradients if gradient is not None])
