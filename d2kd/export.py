"""A trained detector as one file, TorchScript or ONNX, with decoding and NMS inside, compared with PyTorch's results.

The file takes one image of any size, as :func:`random_image` describes it, and a score threshold, and gives the
detections of :class:`Exportable`. What happens before stays outside: reading, resizing and the order of channels.
"""

import copy
import importlib.util
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, List, Sequence, Tuple

import torch
import torch.nn.functional as F
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from .checkpoint import load_strict
from .config import drop_teacher, find_config, load_config
from .errors import D2kdError

Detections = Tuple[Tensor, Tensor, Tensor]
#: An exported file that can be run, or the detector itself: see :class:`Exportable`.
Run = Callable[[Tensor, Tensor], Detections]

INPUTS = ("image", "score_threshold")
OUTPUTS = ("boxes", "scores", "classes")
OPSET = 17

# Two detections are the same within these: pixels, and a part of the score's range from 0 to 1.
BOX_TOLERANCE = 0.1
SCORE_TOLERANCE = 1e-3
# Part of the detections that may lack a counterpart: in NMS, and at the limit of detections, last bits can decide.
# And a traced NMS shifts classes apart in float32, which PyTorch's own does for few boxes only.
MAX_UNMATCHED = 0.05


class Exportable(nn.Module):
    """A detector as a function of tensors, for a single image.

    Args:
        detector: a dense detector with ``test_score_thresh``; a copy of it is kept.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = copy.deepcopy(detector)
        self.requires_grad_(False).eval()

    def forward(self, image: Tensor, score_threshold: Tensor) -> Detections:
        """Detects.

        Args:
            image: (3, H, W) float32, 0 to 255, channels in the order of the detector's ``input_format``.
            score_threshold: least score of a detection, () float32; as in the detector, what ranks detections may be
                another score.

        Returns:
            Boxes (M, 4) XYXY in pixels of the image, scores (M,) and classes (M,) int64, best first.
        """
        self.detector.test_score_thresh = score_threshold  # in place of the config's number, so that tracing sees it
        found = self.detector([{"image": image}])[0]["instances"]
        return found.pred_boxes.tensor, found.scores, found.pred_classes


def load_detector(config_file: str, weights: str, opts: Sequence[str] = (), device: str = "cpu") -> DenseDetector:
    """Builds the detector of a config, distilled or not, without teacher, and loads all of its weights.

    Args:
        config_file: a ``.yaml``, the ``.py`` of a LazyConfig with a ``model``, or a name of detectron2's model zoo.
        weights: any checkpoint, also of the middle of a run.
        opts: overrides of the config, in its own style.
        device: where it is built.

    Raises:
        D2kdError: there is no config or file, the detector is none that this package knows how to export, or the
            weights do not fill it.
    """
    path = find_config(config_file)
    if path.endswith(".py"):
        model = LazyConfig.apply_overrides(LazyConfig.load(path), list(opts)).model
        if "teacher" in model:
            model.methods, model.teacher, model.inherit = [], None, []
        detector = instantiate(model).to(device)
    else:
        cfg = load_config(path, opts)
        drop_teacher(cfg)
        cfg.MODEL.DEVICE = device
        detector = build_model(cfg)
    if not (isinstance(detector, DenseDetector) and hasattr(detector, "test_score_thresh")):
        raise D2kdError(f"{config_file} makes a {type(detector).__name__}, not a dense detector that can be exported")
    load_strict(detector, weights)
    return detector.requires_grad_(False).eval()


def export_torchscript(detector: DenseDetector, path: Path, size: Tuple[int, int]) -> Run:
    """Writes a TorchScript file, for the device that the detector is on, and returns it loaded again.

    Args:
        detector: from :func:`load_detector`.
        path: the file.
        size: height and width in pixels of the image that is traced; the file takes others as well.
    """
    with _quiet():
        traced = torch.jit.trace(Exportable(detector), _example(size, detector.device), check_trace=False)
        traced.save(str(path))
        return torch.jit.load(str(path), map_location=detector.device)


def export_onnx(detector: DenseDetector, path: Path, size: Tuple[int, int]) -> Run:
    """Writes an ONNX file, and returns it as onnxruntime runs it on the CPU.

    Arguments are those of :func:`export_torchscript`.

    Raises:
        D2kdError: onnx or onnxruntime is missing.
    """
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise D2kdError(f"ONNX needs {' and '.join(missing)}: pip install {' '.join(missing)}, or --format torchscript")
    exportable = Exportable(detector).cpu()
    sides = {1: "height", 2: "width"}
    torch.onnx.register_custom_op_symbolic("aten::sort", _stable_sort, OPSET)
    try:
        with _quiet():
            torch.onnx.export(
                exportable,
                _example(size),
                str(path),
                # torch's other exporter stumbles over sizes that depend on the image, as those of detections do.
                dynamo=False,
                opset_version=OPSET,
                input_names=list(INPUTS),
                output_names=list(OUTPUTS),
                dynamic_axes={"image": sides, **{name: {0: "detections"} for name in OUTPUTS}},
            )
    finally:
        torch.onnx.unregister_custom_op_symbolic("aten::sort", OPSET)
    return _onnx_session(path)


def _stable_sort(graph: Any, values: Any, stable: Any, dim: Any, descending: Any) -> Any:
    """A stable descending sort of a vector, as OneAnchorDetector has it; torch's exporter knows the unstable one only.

    ONNX's TopK is stable by definition.
    """
    return graph.op("TopK", values, graph.op("Shape", values), axis_i=0, largest_i=1, outputs=2)


def _onnx_session(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> Detections:
        found = session.run(list(OUTPUTS), {name: x.cpu().numpy() for name, x in zip(INPUTS, inputs)})
        return tuple(torch.from_numpy(x) for x in found)  # type: ignore[return-value]

    return run


def _example(size: Tuple[int, int], device: Any = "cpu") -> Tuple[Tensor, Tensor]:
    """What is traced. Nothing is below the threshold, so that no branch for an empty result is taken for good."""
    return random_image(size).to(device), torch.tensor(0.0, device=device)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences what tracing says of every branch, and that torch has a newer exporter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def random_image(size: Tuple[int, int]) -> Tensor:
    """An image of coloured blobs, always the same: (3, H, W) float32, 0 to 255.

    Args:
        size: H and W in pixels.
    """
    coarse = [max(side // 16, 2) for side in size]
    blobs = 255 * torch.rand(1, 3, *coarse, generator=torch.Generator().manual_seed(0))
    return F.interpolate(blobs, size=size, mode="bilinear")[0]


@dataclass
class Agreement:
    """How far the detections of a file are from PyTorch's, for one image.

    Attributes:
        size: the image's height and width.
        threshold: the score threshold.
        detections: number that PyTorch gives.
        unmatched: number, of both together, that have no counterpart within the tolerances.
        box: largest difference of a coordinate between counterparts, pixels.
        score: of a score.
    """

    size: Tuple[int, int]
    threshold: float
    detections: int
    unmatched: int
    box: float
    score: float


def check_agreement(name: str, run: Run, detector: DenseDetector, sizes: Sequence[Tuple[int, int]]) -> List[Agreement]:
    """Compares an exported file with PyTorch, on images of several sizes, for all detections and for none.

    Args:
        name: what the message calls the file.
        run: the file.
        detector: what it was made of.
        sizes: heights and widths in pixels.

    Raises:
        D2kdError: they differ by more than last bits explain.
    """
    exportable = Exportable(detector)
    agreements = []
    for size in sizes:
        for threshold in (0.0, 1.0):
            inputs = random_image(size).to(detector.device), torch.tensor(threshold, device=detector.device)
            found, expected = run(*inputs), exportable(*inputs)
            agreement = Agreement(size, threshold, len(expected[0]), *_differences(found, expected))
            if agreement.unmatched > MAX_UNMATCHED * (len(found[0]) + len(expected[0])):
                raise D2kdError(
                    f"{name} does not do what the detector does: of {len(found[0])} and {len(expected[0])} detections "
                    f"in an image of {size[0]} x {size[1]} pixels, {agreement.unmatched} have no counterpart"
                )
            agreements.append(agreement)
    return agreements


def _differences(found: Detections, expected: Detections) -> Tuple[int, float, float]:
    """Number of detections without counterpart, and the largest differences of box and score between counterparts.

    The order does not matter: equal scores may come in any.
    """
    boxes, scores, classes = (x.cpu()[:, None] for x in found)
    box = (boxes - expected[0].cpu()).abs().amax(-1)
    score = (scores - expected[1].cpu()).abs()
    same = (classes == expected[2].cpu()) & (box <= BOX_TOLERANCE) & (score <= SCORE_TOLERANCE)
    matched = same.any(0)
    unmatched = int((~matched).sum() + (~same.any(1)).sum())
    if not matched.any():
        return unmatched, 0.0, 0.0
    nearest = box.where(same, torch.inf)[:, matched].argmin(0)
    pairs = nearest, matched.nonzero()[:, 0]
    return unmatched, box[pairs].max().item(), score[pairs].max().item()


def median_ms(run: Run, device: Any, size: Tuple[int, int], seconds: float = 3.0) -> float:
    """Median latency of a detector or file in milliseconds, one image at a time.

    Args:
        run: what to time; its threshold is 0.05.
        device: where the image lies.
        size: height and width of the image.
        seconds: how long to measure at least.
    """
    inputs = random_image(size).to(device), torch.tensor(0.05, device=device)
    timer = Timer("run(*inputs)", globals={"run": run, "inputs": inputs}, num_threads=torch.get_num_threads())
    timer.timeit(2)  # TorchScript optimises in its first two calls
    return 1000 * timer.blocked_autorange(min_run_time=seconds).median
