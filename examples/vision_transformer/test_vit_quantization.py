#!/usr/bin/env python3
"""Explore a ViT, its layers, parameters and sizes by component, and quantize it at 8 and 4 bits with each method.

python examples/vision_transformer/test_vit_quantization.py
python examples/vision_transformer/test_vit_quantization.py --model DIR --layers
"""

from __future__ import annotations

import argparse
import time

import torch
from common import CONFIGURATIONS, load_model, quantize, run, table
from torch import nn

from fairseq.models.vit_quantization import ViTQuantizer, compare_models
from fairseq.quantization.architectures.families import component_of
from fairseq.quantization.architectures.layers import linear_layers
from fairseq.quantization.architectures.recognition import family_of
from fairseq.quantization.evaluation.report import megabytes


def explore(model: nn.Module) -> str:
    """A table of the model's Linear layers by component, and everything else."""
    total = sum(p.numel() for p in model.parameters())
    groups: dict[str, list[nn.Module]] = {"attention": [], "mlp": [], "classifier": [], "other Linear": []}
    for name, layer in linear_layers(model).items():
        groups[component_of(name, family_of(model)) or "other Linear"].append(layer)
    rows, linear = [], 0
    for component, layers in groups.items():
        count = sum(p.numel() for layer in layers for p in layer.parameters())
        linear += count
        rows.append([component, str(len(layers)), f"{count:,}", f"{count / total:.1%}", megabytes(4 * count)])
    rest = total - linear
    rows.append(["everything else", "", f"{rest:,}", f"{rest / total:.1%}", megabytes(4 * rest)])
    layers = str(sum(len(group) for group in groups.values()))
    rows.append(["all", layers, f"{total:,}", "100.0%", megabytes(4 * total)])
    return table(["component", "Linear layers", "parameters", "share", "float32"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="folder or hub id; default: as in test_with_image.py")
    parser.add_argument("--layers", action="store_true", help="list every Linear layer")
    args = parser.parse_args()

    model, _, name = load_model(args.model)
    config = model.config
    print(f"{name}: {type(model).__name__}, {model.num_parameters():,} parameters")
    print(explore(model))
    if args.layers:
        rows = [
            [n, component_of(n, family_of(model)) or "other", f"{m.out_features}x{m.in_features}"]
            for n, m in linear_layers(model).items()
        ]
        print(table(["layer", "component", "shape"], rows))

    # The same normal noise for every run; a real picture is the business of test_with_image.py.
    size = config.image_size
    pixels = torch.randn(4, config.num_channels, size, size, generator=torch.Generator().manual_seed(0))
    rows = []
    for bits, method in CONFIGURATIONS:
        quantizer, started = ViTQuantizer(bits=bits, method=method), time.perf_counter()
        quantized = quantize(quantizer, model)
        seconds = time.perf_counter() - started
        mse, mae, _ = compare_models(model, quantized, pixels)
        report = quantizer.report
        rows.append(
            [
                f"{bits}-bit {method}", str(len(report.quantized)), f"{seconds:.2f}", megabytes(report.bytes_after),
                f"{1 - report.bytes_after / report.bytes_before:.1%}", f"{mse:.2e}", f"{mae:.2e}",
            ]
        )  # fmt: skip
    print("\nQuantized, errors of the logits on four pictures of noise:")
    print(table(["configuration", "layers", "seconds", "size", "saved", "MSE", "MAE"], rows))
    return 0


if __name__ == "__main__":
    run(main)
