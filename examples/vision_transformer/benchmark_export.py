#!/usr/bin/env python3
"""Time exported ONNX files beside the float model and onnxruntime's own dynamic quantization, in onnxruntime.

    python examples/vision_transformer/benchmark_export.py --model DIR
    python examples/vision_transformer/benchmark_export.py --size base --batch 1 8

The candidates take turns. "speed" is the median of each round's ratio to the float file; "difference" the mean absolute
difference of the outputs to those of the float model, on noise; "of float" divides it by their standard deviation.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from benchmark import SIZES, build
from common import UserError, load_model, positive, run, table
from torch import nn

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.quantization.export.export import Positional

OURS: dict[str, dict[str, Any]] = {
    "ours 8-bit": {"bits": 8},
    "ours 8-bit, standard": {"bits": 8, "onnx_ops": "standard"},
    "ours 4-bit": {"bits": 4},
}
FORWARDS, PAUSE = 3, 0.03


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", help="a folder or hub id")
    source.add_argument("--size", choices=SIZES, default="base", help="random weights, where no model is given")
    parser.add_argument("--batch", type=positive, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--threads", type=positive, default=2)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f'{package} is not installed: pip install -e ".[onnx]"')
    model = load_model(args.model).model.eval() if args.model else build(args.size).eval()
    config = model.config
    pixels = torch.randn(max(args.batch), config.num_channels, config.image_size, config.image_size)
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(model, pixels[:2], Path(folder))
        print(compare(model, files, pixels, args.batch, args.rounds, args.threads))
    return 0


def write_files(model: nn.Module, pixels: torch.Tensor, folder: Path) -> dict[str, Path]:
    """Label -> file."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    pixels = torch.cat([pixels, pixels])[:2]
    files = {"float": folder / "float.onnx"}
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.onnx.export(
        Positional(model, ["pixel_values"], ["logits"]), (pixels,), str(files["float"]), dynamo=True, opset_version=21,
        dynamic_shapes=(({0: batch},),), input_names=["pixel_values"], output_names=["logits"], verbose=False,
        external_data=False,
    )  # fmt: skip
    for kind in ("QInt8", "QUInt8"):
        for scales, per_channel in (("channel", True), ("tensor", False)):
            label = f"onnxruntime dynamic {kind}, {scales}"
            files[label] = folder / f"{kind}_{scales}.onnx"
            quantize_dynamic(
                str(files["float"]), str(files[label]), weight_type=QuantType[kind], per_channel=per_channel
            )
    for number, (label, settings) in enumerate(OURS.items()):
        quantized = ViTQuantizer(bits=settings["bits"], method="channel").quantize_model(model)
        files[label] = folder / f"ours_{number}.onnx"
        ViTQuantizer.export(quantized, files[label], sample=pixels, onnx_ops=settings.get("onnx_ops", "onnxruntime"))
    return files


def compare(
    model: nn.Module, files: dict[str, Path], pixels: torch.Tensor, batches: list[int], rounds: int, threads: int
) -> str:
    """A table with a line for each file and batch size."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    sessions = {label: onnxruntime.InferenceSession(str(path), options) for label, path in files.items()}
    with torch.no_grad():
        expected = model(pixels).logits
    rows = []
    for batch in batches:
        inputs = {"pixel_values": pixels[:batch].numpy()}
        times: dict[str, list[float]] = {label: [] for label in sessions}
        for _ in range(rounds):
            for label, session in sessions.items():
                time.sleep(PAUSE)
                session.run(None, inputs)
                start = time.perf_counter()
                for _ in range(FORWARDS):
                    session.run(None, inputs)
                times[label].append((time.perf_counter() - start) / FORWARDS)
        for label, session in sessions.items():
            got = torch.from_numpy(session.run(None, inputs)[0])
            difference = float((got - expected[:batch]).abs().mean())
            speed = statistics.median(f / t for f, t in zip(times["float"], times[label]))
            rows.append([
                f"{label}, batch {batch}", f"{1e3 * statistics.median(times[label]):.1f}", f"{speed:.2f}x",
                f"{files[label].stat().st_size / 1e6:.1f}", f"{difference:.4f}", f"{difference / expected.std():.1%}",
            ])  # fmt: skip
    return table(["file", "ms", "speed", "MB", "difference", "of float"], rows)


if __name__ == "__main__":
    run(main)
