"""What a detector costs to run: multiply-accumulates, parameters, and measured latency."""

import copy
import time
from typing import Any, List, NamedTuple, Optional, Tuple

import torch
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from fvcore.nn import parameter_count
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

#: Height and width at which papers count the MACs of detectors on COCO: 800 x 1333, padded to multiples of 32.
COCO_SIZE = (800, 1344)


class Complexity(NamedTuple):
    """What a detector costs to run on one image.

    Attributes:
        macs: multiply-accumulates of backbone and head.
        parameters: number of parameters, without a student's adapters.
        latency_ms: median latency of a whole detection, decoding and NMS included; None if it was not measured.
    """

    macs: int
    parameters: int
    latency_ms: Optional[float] = None


def measure(detector: nn.Module, size: Tuple[int, int] = COCO_SIZE, seconds: float = 0.0) -> Complexity:
    """Counts MACs and parameters of a detector and, if asked to, measures its latency in PyTorch, on its device.

    The detector may be a distilled student: its teacher and adapters do not count. It is not changed.

    Args:
        detector: any detector with a ``backbone``; without a dense ``head``, only the backbone's MACs are counted.
        size: height and width of the image in pixels.
        seconds: how long to measure the latency, at least; 0 does not measure it.
    """
    latency = None
    if seconds:
        from .export import Exportable, median_ms

        run = Exportable(detector) if isinstance(detector, DenseDetector) else _Whole(detector)
        latency = median_ms(run, detector.device, size, seconds)
    return Complexity(count_macs(detector, size), num_parameters(detector), latency)


def count_macs(detector: nn.Module, size: Tuple[int, int] = COCO_SIZE) -> int:
    """Counts the multiply-accumulates of convolutions and matrix products, in backbone and head.

    fvcore's ``FlopCountAnalysis`` gives the same, but has to run the network, and adds normalization and upsampling:
    0.1 % of a RetinaNet R50. Here nothing is computed, so large images take no longer.

    Args:
        detector: see :func:`measure`.
        size: height and width of the image in pixels; they are padded as the detector pads.
    """
    divisor = max(getattr(detector.backbone, "size_divisibility", 0), 1)
    height, width = (-(-side // divisor) * divisor for side in size)
    network = _Network(detector)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(1, 3, height, width, device="meta"))
    return counter.get_total_flops() // 2  # a multiply-accumulate is two operations


def cpu_milliseconds(detector: DenseDetector, size: Tuple[int, int] = COCO_SIZE, repeats: int = 3) -> float:
    """Least CPU time of a whole detection on one thread, in milliseconds; what else the machine does hardly matters.

    Args:
        detector: a dense detector on the CPU.
        size: height and width of the image in pixels.
        repeats: number of measurements.
    """
    from .export import Exportable, random_image

    run, inputs = Exportable(detector), (random_image(size), torch.tensor(0.05))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = []
        for _ in range(repeats):
            start = time.process_time()
            run(*inputs)
            times.append(1000 * (time.process_time() - start))
        return min(times)
    finally:
        torch.set_num_threads(threads)


def num_parameters(network: nn.Module) -> int:
    """Number of a detector's parameters, without the adapters of methods."""
    counts = parameter_count(network)
    return counts[""] - counts.get("distill", 0)


class _Whole:
    """Any detector as a function like :class:`Exportable`, with its own score threshold."""

    def __init__(self, detector: nn.Module) -> None:
        self.detector = copy.deepcopy(detector).eval()

    @torch.no_grad()
    def __call__(self, image: Tensor, score_threshold: Tensor) -> Any:
        return self.detector([{"image": image}])


class _Network(nn.Module):
    """The part of a detector between preprocessing and decoding, as a function of an image, without storage."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.names: List[str] = list(getattr(detector, "head_in_features", []))
        self.backbone = _on_meta(detector.backbone)
        self.head = _on_meta(detector.head) if self.names else None

    def forward(self, image: Tensor) -> Tuple[Tensor, ...]:
        features = self.backbone(image)
        if self.head is None:
            return tuple(features.values())
        outputs = self.head([features[name] for name in self.names])
        return tuple(level for output in outputs for level in output)


def _on_meta(module: Any) -> nn.Module:
    return copy.deepcopy(module).to("meta").eval()
