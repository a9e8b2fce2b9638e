#!/usr/bin/env python3
"""Exports a trained detector, distilled or plain, to TorchScript and ONNX, with decoding and NMS inside.

Each file is compared with PyTorch on images of several sizes before it is kept. A table says how large and how fast it
is; --compare adds others to it, such as teacher and plain student. All numbers go to export.json beside the files.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, List, Tuple

import d2kd  # noqa: F401  # isort: skip  # first: it filters warnings that importing detectron2 gives
import torch
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from tabulate import tabulate

from d2kd.errors import D2kdError, exit_status
from d2kd.export import Exportable, check_agreement, export_onnx, export_torchscript, load_detector, median_ms

# Of d2kd.export.Agreement.
HEADINGS = {
    "file": "file",
    "size": "height, width",
    "threshold": "score threshold",
    "detections": "detections",
    "unmatched": "without counterpart",
    "box": "largest box difference (px)",
    "score": "largest score difference",
}
FORMATS = {"torchscript": ("model.ts", export_torchscript), "onnx": ("model.onnx", export_onnx)}


def export(kind: str, detector: DenseDetector, args: argparse.Namespace) -> Tuple[List[dict], Dict[str, Any]]:
    """Writes and checks one file; returns how it agrees and its row of the table. A wrong file is not kept."""
    name, write = FORMATS[kind]
    path = args.output / name
    unchecked = args.output / f"{name}.unchecked"
    height, width = args.size
    sizes = dict.fromkeys([(height, width), (width, height), (height * 3 // 4, width * 2 // 3)])
    try:
        run = write(detector, unchecked, (height, width))
        agreements = check_agreement(name, run, detector, list(sizes))
        unchecked.replace(path)
    finally:
        unchecked.unlink(missing_ok=True)
    row = {
        "model": f"{name}{'' if kind == 'torchscript' else ' (onnxruntime, CPU)'}",
        "parameters (M)": sum(p.numel() for p in detector.parameters()) / 1e6,
        "size (MB)": path.stat().st_size / 1e6,
        "ms (median)": median_ms(run, detector.device, args.size, args.seconds),
    }
    return [{"file": name, **asdict(agreement)} for agreement in agreements], row


def in_pytorch(label: str, detector: DenseDetector, args: argparse.Namespace) -> Dict[str, Any]:
    """The row of a detector that PyTorch runs; its size is that of the weights alone."""
    weights = detector.state_dict().values()
    return {
        "model": label,
        "parameters (M)": sum(p.numel() for p in detector.parameters()) / 1e6,
        "size (MB)": sum(x.numel() * x.element_size() for x in weights) / 1e6,
        "ms (median)": median_ms(Exportable(detector), detector.device, args.size, args.seconds),
    }


def others(args: argparse.Namespace) -> List[Tuple[str, DenseDetector]]:
    """The detectors of --compare."""
    loaded = []
    for text in args.compare:
        label, equals, files = text.partition("=")
        config, colon, weights = files.partition(":")
        if not (equals and colon):
            raise D2kdError(f"--compare {text}: write label=config:weights, as in teacher=retinanet_R50.yaml:r50.pth")
        loaded.append((label, load_detector(config, weights, device=args.device)))
    return loaded


def run(args: argparse.Namespace) -> None:
    """Exports, checks, times and writes down."""
    args.size = tuple(args.size)
    detector = load_detector(args.config_file, args.weights, args.opts, args.device)
    compared = others(args)  # all mistakes show before anything is written
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise D2kdError(f"--output {args.output}: {error.strerror}; name a folder that can be written") from error
    rows = [in_pytorch(label, other, args) for label, other in [*compared, (args.label, detector)]]
    checks: List[dict] = []
    for kind in FORMATS if args.format == "both" else [args.format]:
        agreements, row = export(kind, detector, args)
        checks += agreements
        rows.append(row)
    channels = getattr(detector, "input_format", "BGR")
    settings = {key: str(value) for key, value in vars(args).items()}
    result = {"settings": settings, "input_format": channels, "checks": checks, "models": rows}
    (args.output / "export.json").write_text(json.dumps(result, indent=1) + "\n")
    print(tabulate(checks, headers=HEADINGS, tablefmt="github", floatfmt=".2g"), end="\n\n")
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".1f"), end="\n\n")
    print(f"wrote {args.output}: image (3, height, width) float32, 0 to 255, {channels}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, help="the run's config; a distilling one needs no teacher here")
    parser.add_argument("--weights", required=True, help="a checkpoint of it")
    parser.add_argument("--output", required=True, type=Path, help="folder of the files")
    parser.add_argument("--format", default="both", choices=[*FORMATS, "both"], help="default: both")
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        default=(800, 1333),
        metavar=("HEIGHT", "WIDTH"),
        help="of the image that is traced and timed (default 800 1333); the files take others as well",
    )
    parser.add_argument("--label", default="student", help="of the detector in the table (default student)")
    parser.add_argument(
        "--compare", nargs="*", default=[], metavar="LABEL=CONFIG:WEIGHTS", help="others to stand in the table"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seconds", type=float, default=3.0, help="to time each model for, at least (default 3)")
    parser.add_argument("opts", nargs="*", default=[], help="overrides of the config in its own style, after --")
    args = parser.parse_args()
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
