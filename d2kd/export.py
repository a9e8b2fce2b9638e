"""Export of a trained detector as one file, TorchScript or ONNX, with decoding and NMS inside, checked against PyTorch.

The file takes one image of any size, like those of :func:`random_image`, and a score threshold, and returns the
detections of :class:`Exportable`. Reading, resizing and the order of channels are left to the caller.
"""

import copy
import importlib.util
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Callable, Iterator, List, Mapping, Sequence, Tuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, instantiate
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from .checkpoint import load_strict
from .config import drop_teacher, find_config, load_config, read_lazy
from .errors import D2kdError
from .overrides import apply_override

Detections = Tuple[Tensor, Tensor, Tensor]
#: Runs an exported file, or the detector itself: see :class:`Exportable`.
Run = Callable[[Tensor, Tensor], Detections]

INPUTS = ("image", "score_threshold")
OUTPUTS = ("boxes", "scores", "classes")
OPSET = 17
DEFAULT_SIZE = (800, 1333)
TEST_AUGMENTATIONS = "dataloader.test.mapper.augmentations"

# Detections match within these tolerances: in pixels, and of scores from 0 to 1.
BOX_TOLERANCE = 0.1
SCORE_TOLERANCE = 1e-3
# Fraction of detections that may have no counterpart: NMS and the limit on detections can depend on last bits. Besides,
# a traced NMS separates classes by an offset in float32, which PyTorch's own does for few boxes only.
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
        """Detects the objects in an image.

        Args:
            image: (3, H, W) float32, 0 to 255, channels in the order of the detector's ``input_format``.
            score_threshold: lowest class score of a detection, () float32. Some detectors rank detections by another
                score.

        Returns:
            Boxes (M, 4) XYXY in pixels of the image, scores (M,) and classes (M,) int64, best first.
        """
        self.detector.test_score_thresh = score_threshold  # instead of a number, so that tracing sees it
        found = self.detector([{"image": image}])[0]["instances"]
        return found.pred_boxes.tensor, found.scores, found.pred_classes


def load_detector(config_file: str, weights: str, opts: Sequence[str] = (), device: str = "cpu") -> DenseDetector:
    """Builds the detector of a config, distilled or not, without a teacher, and loads all of its weights.

    Args:
        config_file: a ``.yaml`` file, the ``.py`` file of a LazyConfig with a ``model``, or a name of detectron2's
            model zoo.
        weights: any checkpoint of a run.
        opts: overrides of the config, in its own style.
        device: where to build it.

    Raises:
        D2kdError: there is no such config or file, the detector cannot be exported, or the weights do not fill it.
    """
    cfg = _load(config_file, opts)
    if isinstance(cfg, CfgNode):
        cfg.MODEL.DEVICE = device
        detector = build_model(cfg)
    else:
        detector = instantiate(cfg.model).to(device)
    if not (isinstance(detector, DenseDetector) and hasattr(detector, "test_score_thresh")):
        raise D2kdError(f"{config_file} makes a {type(detector).__name__}, not a dense detector that can be exported")
    load_strict(detector, weights)
    return detector.requires_grad_(False).eval()


def _load(config_file: str, opts: Sequence[str]) -> Any:
    """Loads a config of either style, without a teacher."""
    path = find_config(config_file)
    if not path.endswith(".py"):
        return load_config(path, opts, with_teacher=False)
    cfg = reduce(apply_override, opts, read_lazy(path))
    drop_teacher(cfg)
    return cfg


def split_label(text: str) -> Tuple[str, str, str]:
    """Splits ``label=config:weights``, or ``label=weights`` without a config.

    Raises:
        D2kdError: it is neither.
    """
    label, equals, files = text.partition("=")
    config, colon, weights = files.partition(":") if ":" in files else ("", "", files)
    if not (label and equals and weights) or (colon and not config):
        raise D2kdError(f"--compare {text}: write label=config:weights, as in teacher=retinanet_R50.yaml:r50.pth")
    return label, config, weights


def evaluation_size(config_file: str, opts: Sequence[str] = ()) -> Tuple[int, int]:
    """Height and width of a wide image after the resizing of a config's evaluation: its shortest and longest side.

    They are INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST, or those of ``ResizeShortestEdge`` in a LazyConfig's
    ``dataloader.test.mapper``; 800 and 1333 if the config does not resize.
    """
    return evaluation_size_of(_load(config_file, opts))


def evaluation_size_of(cfg: Any) -> Tuple[int, int]:
    """:func:`evaluation_size` of a config that is loaded, of either style."""
    shortest, longest = evaluation_edges(cfg)
    shortest, longest = shortest or DEFAULT_SIZE[0], longest or DEFAULT_SIZE[1]
    return min(shortest, longest), longest


def evaluation_edges(cfg: Any) -> Tuple[int, int]:
    """Shortest and longest side of images after a config's resizing for evaluation; 0 where it sets none.

    Args:
        cfg: a config of either style.
    """
    if isinstance(cfg, CfgNode):
        shortest, longest = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    else:
        augmentations = OmegaConf.select(cfg, TEST_AUGMENTATIONS) or []
        sizes = [x for x in augmentations if isinstance(x, Mapping) and "short_edge_length" in x]
        shortest, longest = (sizes[0]["short_edge_length"], sizes[0].get("max_size", 0)) if sizes else (0, 0)
    return shortest if isinstance(shortest, int) else max(shortest), longest  # a LazyConfig may give several


def export_torchscript(detector: DenseDetector, path: Path, size: Tuple[int, int]) -> Run:
    """Writes a TorchScript file for the detector's device, and loads it again.

    Args:
        detector: from :func:`load_detector`.
        path: the file to write.
        size: height and width in pixels of the image used for tracing; the file takes others as well.
    """
    with _quiet():
        traced = torch.jit.trace(Exportable(detector), _example(size, detector.device), check_trace=False)
        traced.save(str(path))
        return load_torchscript(path, detector.device)


def load_torchscript(path: Path, device: Any = "cpu") -> Run:
    """Loads a TorchScript file onto a device."""
    return torch.jit.load(str(path), map_location=device)


def export_onnx(detector: DenseDetector, path: Path, size: Tuple[int, int]) -> Run:
    """Writes an ONNX file, and loads it with onnxruntime on the CPU.

    Args:
        detector: from :func:`load_detector`.
        path: the file to write.
        size: height and width in pixels of the image used for tracing; the file takes others as well.

    Raises:
        D2kdError: onnx or onnxruntime is missing.
    """
    need("onnx", "onnxruntime")
    exportable = Exportable(detector).cpu()
    sides = {1: "height", 2: "width"}
    torch.onnx.register_custom_op_symbolic("aten::sort", _stable_sort, OPSET)
    try:
        with _quiet():
            torch.onnx.export(
                exportable,
                _example(size),
                str(path),
                # torch's other exporter fails on sizes that depend on the image, like the number of detections.
                dynamo=False,
                opset_version=OPSET,
                input_names=list(INPUTS),
                output_names=list(OUTPUTS),
                dynamic_axes={"image": sides, **{name: {0: "detections"} for name in OUTPUTS}},
            )
    finally:
        torch.onnx.unregister_custom_op_symbolic("aten::sort", OPSET)
    return load_onnx(path)


def _stable_sort(graph: Any, values: Any, stable: Any, dim: Any, descending: Any) -> Any:
    """Stable descending sort of a vector, as in OneAnchorDetector; torch's exporter supports only an unstable one.

    ONNX's TopK is stable by definition.
    """
    return graph.op("TopK", values, graph.op("Shape", values), axis_i=0, largest_i=1, outputs=2)


def need(*packages: str) -> None:
    """Raises D2kdError if one of the packages for ONNX is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise D2kdError(f"ONNX needs {' and '.join(missing)}: pip install {' '.join(missing)}, or --format torchscript")


def load_onnx(path: Path, device: Any = "cpu") -> Run:
    """Loads an ONNX file with onnxruntime, on the CPU whatever the device.

    Raises:
        D2kdError: onnxruntime is missing.
    """
    need("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> Detections:
        found = session.run(list(OUTPUTS), {name: x.cpu().numpy() for name, x in zip(INPUTS, inputs)})
        return tuple(torch.from_numpy(x) for x in found)  # type: ignore[return-value]

    return run


def _example(size: Tuple[int, int], device: Any = "cpu") -> Tuple[Tensor, Tensor]:
    """Inputs for tracing. No score is below the threshold, so that tracing does not record a branch without results."""
    return random_image(size).to(device), torch.tensor(0.0, device=device)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences warnings about each branch during tracing, and about torch's newer exporter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def random_image(size: Tuple[int, int]) -> Tensor:
    """An image of colored blobs, always the same: (3, H, W) float32, 0 to 255.

    Args:
        size: H and W in pixels.
    """
    coarse = [max(side // 16, 2) for side in size]
    blobs = 255 * torch.rand(1, 3, *coarse, generator=torch.Generator().manual_seed(0))
    return F.interpolate(blobs, size=size, mode="bilinear")[0]


@dataclass
class Agreement:
    """Differences between the detections of a file and PyTorch's, for one image.

    Attributes:
        size: height and width of the image.
        threshold: the score threshold.
        detections: number of PyTorch's detections.
        unmatched: number of detections, of both, that have no counterpart within the tolerances.
        box: largest difference of a coordinate between counterparts, in pixels.
        score: largest difference of a score between counterparts.
    """

    size: Tuple[int, int]
    threshold: float
    detections: int
    unmatched: int
    box: float
    score: float


def check_agreement(name: str, run: Run, detector: DenseDetector, sizes: Sequence[Tuple[int, int]]) -> List[Agreement]:
    """Compares an exported file with PyTorch on images of several sizes, for all detections and for the better half.

    Args:
        name: name of the file in the message.
        run: the file.
        detector: the detector that was exported.
        sizes: heights and widths in pixels.

    Raises:
        D2kdError: they differ by more than last bits explain, or there are no detections to compare.
    """
    exportable = Exportable(detector)
    agreements = []
    for size in sizes:
        image = random_image(size).to(detector.device)
        scores = exportable(image, torch.tensor(0.0, device=detector.device))[1]
        if len(scores) == 0:
            raise D2kdError(f"{name} cannot be checked: the detector finds nothing in an image of {_text(size)} pixels")
        half = len(scores) // 2
        between = scores[max(half - 1, 0) : half + 1].mean().item()  # no score is close to it
        for threshold in (0.0, between):
            agreements.append(_agreement(name, run, exportable, image, threshold))
    return agreements


def _agreement(name: str, run: Run, exportable: Exportable, image: Tensor, threshold: float) -> Agreement:
    size = (image.shape[1], image.shape[2])
    inputs = image, torch.tensor(threshold, device=image.device)
    found, expected = run(*inputs), exportable(*inputs)
    agreement = Agreement(size, threshold, len(expected[0]), *_differences(found, expected))
    if agreement.unmatched > MAX_UNMATCHED * (len(found[0]) + len(expected[0])):
        raise D2kdError(
            f"{name} does not do what the detector does: of {len(found[0])} and {len(expected[0])} detections in an "
            f"image of {_text(size)} pixels, {agreement.unmatched} have no counterpart"
        )
    return agreement


def _text(size: Tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _differences(found: Detections, expected: Detections) -> Tuple[int, float, float]:
    """Number of detections without a counterpart, and the largest differences of box and score between counterparts.

    The order does not matter, since detections of equal scores may come in any.
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
        run: what to time; the score threshold is 0.05.
        device: device of the image.
        size: height and width of the image.
        seconds: how long to measure, at least.
    """
    inputs = random_image(size).to(device), torch.tensor(0.05, device=device)
    timer = Timer("run(*inputs)", globals={"run": run, "inputs": inputs}, num_threads=torch.get_num_threads())
    timer.timeit(2)  # TorchScript optimizes in its first two calls
    return 1000 * timer.blocked_autorange(min_run_time=seconds).median
