#!/usr/bin/env python3
"""Exports a trained detector, distilled or plain, to TorchScript and ONNX, with decoding and NMS inside.

Each file is compared with PyTorch on images of several sizes before it is kept. A table shows its size and speed;
--compare adds other detectors to it, such as the teacher and a plain student. All numbers go to export.json as well.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

# The functions import d2kd, which takes seconds: --help does not need it.
if TYPE_CHECKING:
    from detectron2.modeling.meta_arch.dense_detector import DenseDetector

# Columns of d2kd.export.Agreement.
HEADINGS = {
    "file": "file",
    "size": "height, width",
    "threshold": "score threshold",
    "detections": "detections",
    "unmatched": "without counterpart",
    "box": "largest box difference (px)",
    "score": "largest score difference",
}
# Names of the files, and of the functions of d2kd.export that write them.
FORMATS = {"torchscript": ("model.ts", "export_torchscript"), "onnx": ("model.onnx", "export_onnx")}


def write(kind: str, detector: DenseDetector, args: argparse.Namespace) -> tuple[list[dict], dict[str, Any]]:
    """Writes and checks one file; returns how it agrees and its row of the table. A wrong file is not kept."""
    from d2kd import export

    name, function = FORMATS[kind]
    path = args.output / name
    unchecked = args.output / f"{name}.unchecked"
    height, width = args.size
    sizes = dict.fromkeys([(height, width), (width, height), (height * 3 // 4, width * 2 // 3)])
    try:
        run = getattr(export, function)(detector, unchecked, (height, width))
        agreements = export.check_agreement(name, run, detector, list(sizes))
        unchecked.replace(path)
    finally:
        unchecked.unlink(missing_ok=True)
    row = {
        "model": f"{name}{'' if kind == 'torchscript' else ' (onnxruntime, CPU)'}",
        "parameters (M)": sum(p.numel() for p in detector.parameters()) / 1e6,
        "size (MB)": path.stat().st_size / 1e6,
        "ms (median)": export.median_ms(run, detector.device, args.size, args.seconds),
    }
    return [{"file": name, **asdict(agreement)} for agreement in agreements], row


def in_pytorch(label: str, detector: DenseDetector, args: argparse.Namespace) -> dict[str, Any]:
    """The row of a detector that runs in PyTorch; its size is that of the weights alone."""
    from d2kd import export

    weights = detector.state_dict().values()
    return {
        "model": label,
        "parameters (M)": sum(p.numel() for p in detector.parameters()) / 1e6,
        "size (MB)": sum(x.numel() * x.element_size() for x in weights) / 1e6,
        "ms (median)": export.median_ms(export.Exportable(detector), detector.device, args.size, args.seconds),
    }


def others(args: argparse.Namespace) -> list[tuple[str, DenseDetector]]:
    """The detectors of --compare."""
    from d2kd.errors import D2kdError
    from d2kd.export import load_detector, split_label

    loaded = []
    for text in args.compare:
        label, config, weights = split_label(text)
        if not config:
            raise D2kdError(f"--compare {text}: write label=config:weights")
        loaded.append((label, load_detector(config, weights, device=args.device)))
    return loaded


def run(args: argparse.Namespace) -> None:
    """Exports, checks and times a detector, and writes the report."""
    import torch
    from tabulate import tabulate

    from d2kd.errors import D2kdError
    from d2kd.export import evaluation_size, load_detector
    from d2kd.exported import REPORT
    from d2kd.predict import describe_export

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.size = tuple(args.size or evaluation_size(args.config_file, args.opts))
    detector = load_detector(args.config_file, args.weights, args.opts, args.device)
    compared = others(args)  # all mistakes show before anything is written
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise D2kdError(f"--output {args.output}: {error.strerror}; choose a folder that can be written") from error
    rows = [in_pytorch(label, other, args) for label, other in [*compared, (args.label, detector)]]
    checks: list[dict] = []
    for kind in FORMATS if args.format == "both" else [args.format]:
        agreements, row = write(kind, detector, args)
        checks += agreements
        rows.append(row)
    about = describe_export(args.config_file, args.opts, args.weights, detector)
    settings = {key: str(value) for key, value in vars(args).items()}
    result = {"settings": settings, **about.to_json(), "checks": checks, "models": rows}
    (args.output / REPORT).write_text(json.dumps(result, indent=1) + "\n")
    print(tabulate(checks, headers=HEADINGS, tablefmt="github", floatfmt=".2g"), end="\n\n")
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".1f"), end="\n\n")
    print(f"wrote {args.output}: image (3, height, width) float32, 0 to 255, {about.input_format}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, help="config of the run; a teacher in it is not needed")
    parser.add_argument("--weights", required=True, help="checkpoint of the run")
    parser.add_argument("--output", required=True, type=Path, help="folder for the files")
    parser.add_argument("--format", default="both", choices=[*FORMATS, "both"], help="default: both")
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        metavar=("HEIGHT", "WIDTH"),
        help="size of the image for tracing, checks and timing (default: the config's test size); the files take any",
    )
    parser.add_argument("--label", default="student", help="name of the detector in the table (default: student)")
    parser.add_argument(
        "--compare", nargs="*", default=[], metavar="LABEL=CONFIG:WEIGHTS", help="other detectors for the table"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is a GPU")
    parser.add_argument("--seconds", type=float, default=3.0, help="minimum time to time each model (default: 3)")
    parser.add_argument("opts", nargs="*", default=[], help="overrides of the config in its own style, after --")
    args = parser.parse_args()
    from d2kd.errors import exit_status
    from d2kd.quiet import quiet_known_warnings

    quiet_known_warnings()
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
