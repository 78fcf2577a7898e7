#!/usr/bin/env python3
"""End to end: a picture in, a ViT's prediction before and after quantization, with errors, times and sizes.

    python examples/vision_transformer/test_with_image.py
    python examples/vision_transformer/test_with_image.py --all --model DIR --image cat.jpg

Without --model it takes google/vit-base-patch16-224 if that can be loaded, else the small ViT that ships with the
project, and says which. The accuracy over 500 labelled CIFAR-10 test pictures is shown for a model that knows their
classes, as the shipped one does (for others use evaluate.py, with pictures of their own classes).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from common import (
    CONFIGURATIONS,
    SAMPLE_IMAGE,
    batches,
    embedded_images,
    load_model,
    logits,
    milliseconds_per_image,
    quantize,
    read_image,
    run,
    table,
)
from torch import nn

from fairseq.models.vit_quantization import ViTQuantizer, compare_models
from fairseq.quantization.evaluation.report import megabytes

SHORT = [(8, "channel"), (4, "channel")]


def prediction(model: nn.Module, inputs: dict) -> str:
    """The top class and its probability, of one picture."""
    probability = logits(model, inputs["pixel_values"])[0].softmax(-1)
    best = int(probability.argmax())
    return f"{model.config.id2label[best]} ({probability[best]:.1%})"


def accuracies(models: dict[str, nn.Module], processor) -> dict[str, float]:
    """Top-1 over the 500 pictures that ship with the embedded model."""
    images, names = embedded_images()
    index = next(iter(models.values())).config.label2id
    right = dict.fromkeys(models, 0)
    done = 0
    for pixel_values in batches(images, processor, 50):
        labels = torch.tensor([index[n] for n in names[done : done + len(pixel_values)]])
        for name, model in models.items():
            right[name] += int((logits(model, pixel_values).argmax(-1) == labels).sum())
        done += len(pixel_values)
    return {name: count / done for name, count in right.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="folder or hub id of an image classifier")
    parser.add_argument("--image", type=Path, default=SAMPLE_IMAGE, help="a picture file (default: a cat)")
    parser.add_argument("--all", action="store_true", help="8 and 4 bits with every method, instead of two of the six")
    args = parser.parse_args()

    image = read_image(args.image, f"--image {args.image}")
    model, processor, name = load_model(args.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    inputs = processor(images=image, return_tensors="pt")
    print(f"Model: {name}, on {device}")
    print(f"Image: {args.image.name}, {image.width}x{image.height}")
    print(f"Original prediction: {prediction(model, inputs)}\n")

    models, rows = {"float": model}, []
    for bits, method in CONFIGURATIONS if args.all else SHORT:
        title = f"{bits}-bit {method}"
        quantizer, started = ViTQuantizer(bits=bits, method=method), time.perf_counter()
        models[title] = quantize(quantizer, model)
        seconds = time.perf_counter() - started
        mse, mae, match = compare_models(model, models[title], inputs)
        report = quantizer.report
        print(f"{title}")
        print(f"  Quantized {len(report.quantized)} linear layers in {seconds:.2f} s")
        print(f"  Prediction: {prediction(models[title], inputs)}")
        print(f"  MSE: {mse:.6f}   MAE: {mae:.6f}   Top-1 Match: {'✓' if match == 1 else '✗'}")
        print(f"  Size in memory: {megabytes(report.bytes_before)} in float32, {megabytes(report.bytes_after)} now")
        rows.append([title, f"{mse:.2e}", "yes" if match == 1 else "no", megabytes(report.bytes_after)])
    rows.insert(0, ["float", "", "", megabytes(report.bytes_before)])

    header = ["configuration", "logit MSE", "top-1 match", "size"]
    measured = milliseconds_per_image(models, inputs["pixel_values"])
    header.append("ms per image")
    for row in rows:
        row.append(f"{measured[row[0]]:.1f}")
    if set(embedded_images()[1]) <= set(model.config.label2id):
        header.append("accuracy, 500 pictures")
        for row, value in zip(rows, accuracies(models, processor).values(), strict=True):
            row.append(f"{value:.1%}")
    print(f"\n{table(header, rows)}")
    print("Sizes are of all parameters and buffers in memory; times are of one picture at a time, the models in turns.")
    if min(measured[row[0]] for row in rows[1:]) > measured["float"]:
        print("This model has too little to multiply for integers to be faster; a ViT-Small or larger one has enough.")
    return 0


if __name__ == "__main__":
    run(main)
