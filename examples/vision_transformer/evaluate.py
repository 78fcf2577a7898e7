#!/usr/bin/env python3
"""Accuracy of a ViT before and after quantization, over a folder of labelled pictures.

    python examples/vision_transformer/evaluate.py --model DIR --images DIR --labels labels.csv
    python examples/vision_transformer/evaluate.py ... --configs 4:tensor 3:histogram

The CSV has the columns ``file`` (in the folder) and ``class_index``. Columns of the result: top-1 and top-5 accuracy;
"kept", top-1 as a share of the float model's; "agreement", the share of pictures with the float model's top-1 class;
and the mean squared error of the logits. All models see each batch in turn.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from common import (
    CONFIGURATIONS,
    UserError,
    batches,
    first_line,
    labelled_images,
    load_model,
    logits,
    parse_configuration,
    positive,
    quantize,
    run,
    table,
)
from torch import Tensor, nn
from tqdm import tqdm

from fairseq.models.vit_quantization import ViTQuantizer


class Score:
    """Running sums of one model's results."""

    def __init__(self) -> None:
        self.top1 = self.top5 = self.agree = self.count = 0
        self.squared_error, self.values = 0.0, 0

    def add(self, got: Tensor, expected: Tensor, labels: Tensor) -> None:
        """Logits of this model and of the float model, (B, classes), and labels, (B,)."""
        first = got.argmax(-1)
        self.top1 += int((first == labels).sum())
        self.top5 += int((got.topk(min(5, got.shape[-1])).indices == labels[:, None]).any(-1).sum())
        self.agree += int((first == expected.argmax(-1)).sum())
        self.squared_error += float((got - expected).double().square().sum())
        self.values += got.numel()
        self.count += len(labels)

    def row(self, name: str, reference: Score, seconds: float | None) -> list[str]:
        kept = self.top1 / reference.top1 if reference.top1 else float("nan")
        return [
            name, f"{self.top1 / self.count:.1%}", f"{self.top5 / self.count:.1%}", f"{kept:.1%}",
            f"{self.agree / self.count:.1%}", f"{self.squared_error / self.values:.2e}",
            "" if seconds is None else f"{seconds:.1f}",
        ]  # fmt: skip


def score_all(
    models: dict[str, nn.Module], images: list, labels: Tensor, processor: Any, size: int
) -> dict[str, Score]:
    """Scores of all models, the first of them the reference; they see each batch of ``size`` pictures in turn."""
    scores = {name: Score() for name in models}
    with tqdm(total=len(images), desc="Evaluating", unit="image") as bar:
        for pixel_values in batches(images, processor, size):
            expected, truth = None, labels[bar.n : bar.n + len(pixel_values)]
            for name, model in models.items():
                got = logits(model, pixel_values)
                expected = got if expected is None else expected
                scores[name].add(got, expected, truth)
            bar.update(len(pixel_values))
    return scores


def named_pictures(table: Path, folder: Path) -> dict[Path, None]:
    """The pictures of ``folder`` that a text file names, one a line, in its order."""
    try:
        names = [line.strip() for line in table.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--calibration {table}: {first_line(error)}") from None
    if not names:
        raise UserError(f"--calibration {table}: names no picture")
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"--calibration {table}: {folder / name} is not a file")
    return dict.fromkeys(folder / name for name in names)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id of an image classifier")
    parser.add_argument("--images", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--labels", type=Path, required=True, help="CSV with the columns file and class_index")
    parser.add_argument(
        "--configs", type=parse_configuration, nargs="+", default=CONFIGURATIONS, metavar="BITS:METHOD",
        help="default: 8 and 4 bits with each of tensor, channel, histogram",
    )  # fmt: skip
    parser.add_argument(
        "--activations", choices=["dynamic", "static", "none"], default="dynamic",
        help="dynamic: a scale per token (default); static: one, from calibration; none: only weights are quantized",
    )  # fmt: skip
    parser.add_argument("--activation-bits", type=int, default=8, metavar="BITS", help="2 to 8, default 8")
    parser.add_argument(
        "--calibration", type=Path, default=None, metavar="FILE",
        help="calibrate on the pictures named in this file, one a line, and leave them out of the evaluation",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=positive, default=16)
    parser.add_argument("--limit", type=positive, default=None, help="only the first so many pictures")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    args = parser.parse_args()

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device that PyTorch can use")
    model, processor, name = load_model(args.model)
    images, labels = labelled_images(args.images, args.labels, model.config.num_labels)
    calibration = None
    if args.calibration is not None:
        chosen = named_pictures(args.calibration, args.images)
        kept = [i for i, image in enumerate(images) if image.args[0] not in chosen]
        images, labels = [images[i] for i in kept], labels[kept]
        calibration = list(chosen)
    images, labels = images[: args.limit], labels[: args.limit]
    if not images:
        raise UserError("no picture is left to evaluate")
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    models, seconds = {"float": model.to(device)}, {}
    for bits, method in args.configs:
        key, started = f"{bits}-bit {method}", time.perf_counter()
        activations = None if args.activations == "none" else args.activations
        try:
            quantizer = ViTQuantizer(
                bits=bits, method=method, activations=activations, activation_bits=args.activation_bits
            )
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from error
        models[key] = quantize(quantizer, model, calibration=calibration, processor=processor)
        seconds[key] = time.perf_counter() - started

    scores = score_all(models, images, labels, processor, args.batch_size)
    print(
        f"{name}, {len(images)} pictures, all Linear layers quantized, activations: {args.activations}"
        f"{'' if args.activation_bits == 8 else f' {args.activation_bits} bits'}, "
        f"{f'calibrated on {len(calibration)} others' if calibration else 'without calibration'}, on {device}\n"
    )
    header = ["configuration", "top-1", "top-5", "kept", "agreement", "logit MSE", "quantized in s"]
    print(table(header, [score.row(key, scores["float"], seconds.get(key)) for key, score in scores.items()]))
    return 0


if __name__ == "__main__":
    run(main)
