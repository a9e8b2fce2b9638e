"""The CPU of a training step never waits for the GPU in code of d2kd."""

import pytest
import torch
from small import batch, build, distill_config, save_teacher
from waiting import Waits

from d2kd.methods import method_names

#: What detectron2's own losses and assignment of RetinaNet and FCOS do, which are used as they are.
DETECTRON2 = (
    "detectron2/modeling/meta_arch/retinanet.py",
    "detectron2/modeling/meta_arch/fcos.py",
    "detectron2/modeling/matcher.py",
    "detectron2/modeling/box_regression.py",
    "fvcore/nn/giou_loss.py",
    "",  # their backward passes
)
FCOS = ("MODEL.FCOS.BOX_REG_LOSS_TYPE", "iou_log", "MODEL.FCOS.LOSS_NORMALIZER")
# Options of each detector, and where waiting is known.
DETECTORS = {
    "RetinaNet": ((), DETECTRON2),
    "GFL": (("MODEL.DISTILL.LD.VLR_WEIGHT", 0.25, "MODEL.DISTILL.LD.CLS_WEIGHT", 10.0), ()),
    "ATSS": ((), ()),
    "FCOS": ((), DETECTRON2),
    "FCOS batch": ((*FCOS, "batch"), ()),
    "FCOS ema": ((*FCOS, "ema"), ()),
}
# Regions "finegrained" and "boxes" of FitNet are masks; "gibox" has a non-maximum suppression, which waits.
OPTIONS = ("MODEL.DISTILL.FITNET.REGION", "finegrained", "MODEL.DISTILL.SYNC_NORMALIZER", True)
CLASS_MAP = ("MODEL.DISTILL.CLASS_MAP", "[[0, 1], [1, 0]]")


@pytest.fixture
def student(request, tmp_path):
    """A student of the detector in ``request.param``, with all methods that fit it."""
    name = request.param.split()[0]
    names = ("MODEL.META_ARCHITECTURE", name)
    teacher = save_teacher(tmp_path / "teacher.pth", *names)
    methods = [method for method in method_names() if method != "LD" or name == "GFL"]
    opts = (names[0], f"Distill{name}", *OPTIONS, *CLASS_MAP, *DETECTORS[request.param][0])
    return build(distill_config(teacher, *opts, methods=methods, teacher_opts=names))


@pytest.mark.parametrize(
    ("student", "known"), [(name, known) for name, (_, known) in DETECTORS.items()], ids=DETECTORS, indirect=["student"]
)
def test_a_step_reads_no_value(student, known):
    inputs = batch()
    student(inputs)  # what is made once may wait
    with Waits() as waits:
        sum(student(inputs).values()).backward()
    assert [where for where in waits.found if where.split(" in ")[1] not in known] == []


def test_waiting_is_noticed():
    values = torch.arange(4.0)
    with Waits() as waits:
        values[values > 1].sum().item()
        values[values > 1] = 0  # no value is read for this
        torch.where(values > 1, values, 0)
    assert waits.found == ["index in ", "_local_scalar_dense in "]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("student", ["GFL", "ATSS"], indirect=True)
def test_a_step_waits_for_no_gpu(student):
    student.cuda()
    inputs = batch()
    sum(student(inputs).values()).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sum(student(inputs).values()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
