"""INT8: an exported ONNX file, quantized by onnxruntime (static quantization, QDQ format).

Weights are rounded per output channel. The range of each activation is the smallest and largest value that occurs in
the calibration images.
"""

import importlib.util
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional

import torch
from torch import Tensor

from .errors import D2kdError
from .export import INPUTS, Run, load_onnx, need

# A name of these in a node's path: what is quantized.
BACKBONE, TOWERS = "/backbone/", "subnet"


def check_quantization() -> None:
    """Checks that files can be quantized here.

    Raises:
        D2kdError: onnx, onnxruntime or its quantization is missing.
    """
    need("onnx", "onnxruntime")
    if importlib.util.find_spec("onnxruntime.quantization") is None:
        raise D2kdError(
            "--int8 needs onnxruntime.quantization, which the installed onnxruntime does not have: install another "
            "build (pip install onnxruntime), or leave --int8 out"
        )


def quantize_onnx(source: Path, target: Path, images: Iterable[Tensor], score_threshold: float) -> Run:
    """Writes an INT8 file of an ONNX file, and loads it.

    The convolutions of backbone, FPN and towers are quantized. The last ones, which predict scores, boxes and
    centerness, stay in float32, as do decoding and NMS.

    Args:
        source: from :func:`~d2kd.export.export_onnx`.
        target: the file to write.
        images: for calibration, each as :class:`~d2kd.export.Exportable` takes it; of any sizes.
        score_threshold: lowest score of a detection in calibration.

    Raises:
        D2kdError: onnxruntime's quantization is missing.
    """
    check_quantization()
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory(prefix="d2kd_int8_") as folder:
        prepared = Path(folder) / "prepared.onnx"
        # This only marks the file as prepared: torch has folded the statistics of BatchNorm already.
        quant_pre_process(str(source), str(prepared), skip_optimization=True, skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(target),
            _Reader(images, score_threshold),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=_convolutions(onnx.load(str(prepared)).graph),
        )
    quantized = onnx.load(str(target))
    # Without the sizes that quantization inferred: by them, onnxruntime makes reshapes that fail where a level has no
    # candidate.
    del quantized.graph.value_info[:]
    onnx.save(quantized, str(target))
    return load_onnx(target)


def _convolutions(graph: Any) -> List[str]:
    """Names of the convolutions of backbone, FPN and towers."""
    names = [node.name for node in graph.node if node.op_type == "Conv"]
    return [name for name in names if BACKBONE in name or TOWERS in name]


class _Reader:
    """Gives onnxruntime the inputs of one image after the other."""

    def __init__(self, images: Iterable[Tensor], score_threshold: float) -> None:
        self._images = iter(images)
        self._threshold = torch.tensor(score_threshold).numpy()

    def get_next(self) -> Optional[Dict[str, Any]]:
        image = next(self._images, None)
        return None if image is None else dict(zip(INPUTS, (image.numpy(), self._threshold)))
