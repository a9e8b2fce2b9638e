#!/usr/bin/env python3
"""Exports a trained detector, distilled or plain, to TorchScript and ONNX, with decoding and NMS inside.

Each file is compared with PyTorch on images of several sizes before it is kept. A table shows its size and speed;
--compare adds other detectors to it, such as the teacher and a plain student, and --evaluate the AP of each. All
numbers go to export.json as well, with what a program needs to prepare images: channel order, sides, class names.

--int8 adds an ONNX file of 8-bit integers, for which some images calibrate the ranges of activations:
    $ python tools/export.py --config-file cfg.yaml --weights model_final.pth --output export --int8 --evaluate
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
INT8_FILE = "model_int8.onnx"


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
    label = f"{name}{'' if kind == 'torchscript' else f' (opset {export.OPSET}, onnxruntime, CPU)'}"
    return [{"file": name, **asdict(agreement)} for agreement in agreements], in_file(label, path, run, detector, args)


def write_int8(detector: DenseDetector, args: argparse.Namespace) -> dict[str, Any]:
    """Quantizes the ONNX file; returns the row of the INT8 file. It rounds, so only AP tells whether it is right."""
    from d2kd.export import OPSET
    from d2kd.predict import calibration_images, predictor_of
    from d2kd.quantize import quantize_onnx

    path = args.output / INT8_FILE
    images = calibration_images(args.calibration, predictor_of(detector, args.about))
    run = quantize_onnx(args.output / FORMATS["onnx"][0], path, images, detector.test_score_thresh)
    return in_file(f"{INT8_FILE} (INT8, opset {OPSET}, onnxruntime, CPU)", path, run, detector, args)


def in_file(label: str, path: Path, run: Any, detector: DenseDetector, args: argparse.Namespace) -> dict[str, Any]:
    """The row of an exported file."""
    from d2kd.exported import ExportedDetector

    model = ExportedDetector(run, detector.test_score_thresh, detector.device)
    return {**make_row(label, detector, run, path.stat().st_size, args), **score(label, model, args.about, args)}


def in_pytorch(label: str, detector: DenseDetector, about: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The row of a detector that runs in PyTorch; its size is that of the weights alone."""
    from d2kd.export import Exportable

    size = sum(x.numel() * x.element_size() for x in detector.state_dict().values())
    return {**make_row(label, detector, Exportable(detector), size, args), **score(label, detector, about, args)}


def make_row(label: str, detector: DenseDetector, run: Any, size: int, args: argparse.Namespace) -> dict[str, Any]:
    """What a row of the table says of each detector or file; size is in bytes."""
    from d2kd.complexity import num_parameters
    from d2kd.export import median_ms

    return {
        "model": label,
        "parameters (M)": num_parameters(detector) / 1e6,
        "size (MB)": size / 1e6,
        "ms (median)": median_ms(run, detector.device, args.size, args.seconds),
    }


def score(label: str, model: Any, about: Any, args: argparse.Namespace) -> dict[str, float]:
    """The AP of a detector or file on --evaluate's data set, as a column; nothing without it."""
    from d2kd.predict import evaluate, predictor_of

    return {"AP": evaluate(predictor_of(model, about), args.data_set, label).ap} if args.data_set else {}


def others(args: argparse.Namespace) -> list[tuple[str, DenseDetector, Any]]:
    """The detectors of --compare."""
    from d2kd.errors import D2kdError
    from d2kd.export import load_detector, split_label
    from d2kd.predict import describe_export

    loaded = []
    for text in args.compare:
        label, config, weights = split_label(text)
        if not config:
            raise D2kdError(f"--compare {text}: write label=config:weights")
        detector = load_detector(config, weights, device=args.device)
        loaded.append((label, detector, describe_export(config, [], weights, detector)))
    return loaded


def data_set(args: argparse.Namespace) -> str:
    """The name of --evaluate's data set, by default the config's; "" without it."""
    from d2kd.engine.styles import load_for_evaluation
    from d2kd.errors import D2kdError
    from d2kd.predict import find_data

    if args.evaluate is None:
        return ""
    names = [args.evaluate] if args.evaluate else load_for_evaluation(args.config_file, args.opts).test_sets
    if not names:
        raise D2kdError("--evaluate: the config has no data set to evaluate on; name one, --evaluate val.json:images")
    return find_data(names[0], args.output / "data")[0]


def calibration(args: argparse.Namespace) -> list[Path]:
    """The images that --int8 calibrates with; none without it."""
    from d2kd.engine.styles import load_for_evaluation
    from d2kd.errors import D2kdError
    from d2kd.predict import find_calibration
    from d2kd.quantize import check_quantization

    if args.int8 is None:
        return []
    if args.format == "torchscript":
        raise D2kdError("--int8 quantizes the ONNX file: use --format onnx or both")
    check_quantization()
    train_sets = load_for_evaluation(args.config_file, args.opts).train_sets
    return find_calibration(args.int8, train_sets, args.calibration_images, args.output / "data")


def run(args: argparse.Namespace) -> None:
    """Exports, checks and times a detector, and writes the report."""
    import torch
    from tabulate import tabulate

    from d2kd.errors import D2kdError
    from d2kd.export import OPSET, evaluation_size, load_detector
    from d2kd.exported import REPORT
    from d2kd.predict import describe_export

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.size = tuple(args.size or evaluation_size(args.config_file, args.opts))
    detector = load_detector(args.config_file, args.weights, args.opts, args.device)
    args.about = describe_export(args.config_file, args.opts, args.weights, detector)
    compared = others(args)  # all mistakes show before anything is written
    args.calibration = calibration(args)  # first: own data to evaluate get the same name in place of it
    args.data_set = data_set(args)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise D2kdError(f"--output {args.output}: {error.strerror}; choose a folder that can be written") from error
    rows = [in_pytorch(*entry, args) for entry in [*compared, (args.label, detector, args.about)]]
    checks: list[dict] = []
    for kind in FORMATS if args.format == "both" else [args.format]:
        agreements, row = write(kind, detector, args)
        checks += agreements
        rows.append(row)
    rows += [write_int8(detector, args)] if args.calibration else []
    settings = {key: str(value) for key, value in vars(args).items() if key not in ("about", "calibration")}
    facts = {"opset": OPSET, "threads": torch.get_num_threads(), "calibrated_with": len(args.calibration)}
    result = {"settings": settings, **facts, **args.about.to_json(), "checks": checks, "models": rows}
    (args.output / REPORT).write_text(json.dumps(result, indent=1) + "\n")
    print(tabulate(checks, headers=HEADINGS, tablefmt="github", floatfmt=".2g"), end="\n\n")
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".1f"), end="\n\n")
    size, threads = " x ".join(map(str, args.size)), facts["threads"]
    print(f"ms: one image of {size}, {threads} thread{'s' * (threads > 1)}; ONNX opset {OPSET}")
    if args.calibration:
        unknown = "" if args.data_set else "; what it costs in AP is not measured: add --evaluate"
        print(f"{INT8_FILE}: calibrated with {len(args.calibration)} images{unknown}")
    print(f"wrote {args.output}: image (3, height, width) float32, 0 to 255, {args.about.input_format}")


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
    parser.add_argument(
        "--evaluate",
        nargs="?",
        const="",
        metavar="DATA",
        help="add the AP of each detector and file to the table, on the config's data set or on own data, "
        "val.json:images",
    )
    parser.add_argument(
        "--int8",
        nargs="?",
        const="",
        metavar="IMAGES",
        help=f"also write {INT8_FILE}, calibrated with the config's training set, or with a folder of images, own data "
        "(train.json:images) or a registered data set",
    )
    parser.add_argument(
        "--calibration-images", type=int, default=100, metavar="N", help="how many of them, at most (default: 100)"
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
