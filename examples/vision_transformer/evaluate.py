#!/usr/bin/env python3
"""Accuracy of a ViT before and after quantization, over labelled pictures.

    python examples/vision_transformer/evaluate.py
    python examples/vision_transformer/evaluate.py --model DIR --images DIR --labels labels.csv
    python examples/vision_transformer/evaluate.py ... --calibration 128 --configs 4:channel 4.5:channel

Without a model, the embedded one on the 500 pictures that come with it. The CSV has the columns ``file`` (in the
folder) and ``class_index``. 4.5 bits stand for widths of 2 to 8 chosen layer by layer, 4.5 per weight on average.
Columns of the result: top-1 and top-5 accuracy; "kept", top-1 as a share of the float model's; "agreement", the share
of pictures with the float model's top-1 class; and the mean squared error of the logits. All models see each batch in
turn.
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
    embedded_images,
    first_line,
    labelled_images,
    load_embedded,
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
from fairseq.quantization.synthetic import synthetic_images


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
        for pixel_values, truth in zip(batches(images, processor, size), labels.split(size), strict=True):
            expected = None
            for name, model in models.items():
                got = logits(model, pixel_values)
                expected = got if expected is None else expected
                scores[name].add(got, expected, truth)
            bar.update(len(pixel_values))
    return scores


def subject(args: argparse.Namespace) -> tuple[nn.Module, Any, str, list, Tensor]:
    """Model, processor, its name, pictures to read and their labels, int64 (N,)."""
    given = [args.model, args.images, args.labels]
    if given == [None] * 3:
        model, processor, name = load_embedded()
        images, classes = embedded_images()
        return model, processor, name, images, torch.tensor([model.config.label2id[c] for c in classes])
    if None in given:
        raise UserError("--model, --images and --labels go together; without them the embedded model is evaluated")
    model, processor, name = load_model(args.model)
    return model, processor, name, *labelled_images(args.images, args.labels, model.config.num_labels)


def drawn(calibration: str, images: list, folder: Path | None) -> list[int]:
    """Which of the pictures to calibrate on: those that a text file names, one a line, or so many at random."""
    if calibration.isdecimal() and not Path(calibration).exists():
        if not 1 <= int(calibration) < len(images):
            raise UserError(f"--calibration {calibration}: of {len(images)} pictures, 1 to {len(images) - 1} can serve")
        return torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[: int(calibration)].tolist()
    try:
        lines = Path(calibration).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--calibration {calibration}: {first_line(error)}") from None
    names = dict.fromkeys(line.strip() for line in lines if line.strip())
    if not names:
        raise UserError(f"--calibration {calibration}: names no picture")
    if folder is None:
        raise UserError(f"--calibration {calibration}: the embedded model takes a number of pictures instead of names")
    places = {image.args[0]: i for i, image in enumerate(images)}
    for name in names:
        if folder / name not in places:
            raise UserError(f"--calibration {calibration}: {folder / name} is not one of the labelled pictures")
    return [places[folder / name] for name in names]


def bits_and_method(text: str) -> tuple[float, str]:
    """ "4:histogram" -> (4, "histogram"), "4.5:channel" -> (4.5, "channel"), for argparse."""
    bits, _, method = text.partition(":")
    whole, point, rest = bits.partition(".")
    if not point:
        return parse_configuration(text)
    if not whole.isdecimal() or not rest.isdecimal() or not 2 <= float(bits) <= 8:
        raise argparse.ArgumentTypeError(f"{text!r} is not BITS:METHOD, with 2 to 8 bits, such as 4.5:channel")
    return float(bits), parse_configuration(f"8:{method}")[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="folder or hub id of an image classifier; needs the next two")
    parser.add_argument("--images", type=Path, default=None, help="folder of pictures")
    parser.add_argument("--labels", type=Path, default=None, help="CSV with the columns file and class_index")
    parser.add_argument(
        "--configs", type=bits_and_method, nargs="+", default=CONFIGURATIONS, metavar="BITS:METHOD",
        help="default: 8 and 4 bits with each of tensor, channel, histogram",
    )  # fmt: skip
    parser.add_argument(
        "--activations", choices=["dynamic", "static", "none"], default="dynamic",
        help="dynamic: a scale per token (default); static: one, from calibration; none: only weights are quantized",
    )  # fmt: skip
    parser.add_argument("--activation-bits", type=int, default=8, metavar="BITS", help="2 to 8, default 8")
    parser.add_argument(
        "--calibration", default=None, metavar="FILE|COUNT|synthetic",
        help="calibrate on the pictures named in this file, one a line, or on so many drawn at random (the same each "
        "time), and leave them out of the evaluation; or on 128 synthetic ones",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=positive, default=16)
    parser.add_argument("--limit", type=positive, default=None, help="only the first so many pictures")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    args = parser.parse_args()

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device that PyTorch can use")
    model, processor, name, images, labels = subject(args)
    calibration = None
    if args.calibration is not None:
        if args.calibration == "synthetic":
            chosen, calibration = [], synthetic_images()
        else:
            chosen = drawn(args.calibration, images, args.images)
            calibration = [images[i]() for i in chosen]
        kept = [i for i in range(len(images)) if i not in set(chosen)]
        images, labels = [images[i] for i in kept], labels[kept]
    images, labels = images[: args.limit], labels[: args.limit]
    if not images:
        raise UserError("no picture is left to evaluate")
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    models, seconds = {"float": model.to(device)}, {}
    for bits, method in args.configs:
        key, started = f"{bits:g}-bit {method}", time.perf_counter()
        settings = {
            "method": method, "activations": None if args.activations == "none" else args.activations,
            "activation_bits": args.activation_bits,
        }  # fmt: skip
        try:
            if isinstance(bits, int):
                quantizer = ViTQuantizer(bits=bits, **settings)
            elif calibration is None:
                raise UserError(f"{bits:g}:{method}: choosing widths by layer needs pictures; pass --calibration")
            else:
                chosen_bits = ViTQuantizer(**settings).assign_bits(
                    model, calibration, processor, images=len(calibration), average_bits=bits
                )
                quantizer = ViTQuantizer(overrides=chosen_bits.overrides, **settings)
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from error
        pictures = {} if calibration is None else {"calibration": calibration, "processor": processor}
        models[key] = quantize(quantizer, model, **pictures)
        seconds[key] = time.perf_counter() - started

    scores = score_all(models, images, labels, processor, args.batch_size)
    kind = "synthetic ones" if args.calibration == "synthetic" else "others"
    print(
        f"{name}, {len(images)} pictures, all Linear layers quantized, activations: {args.activations}"
        f"{'' if args.activation_bits == 8 else f' {args.activation_bits} bits'}, "
        f"{'without calibration' if calibration is None else f'calibrated on {len(calibration)} {kind}'}, on {device}\n"
    )
    header = ["configuration", "top-1", "top-5", "kept", "agreement", "logit MSE", "quantized in s"]
    print(table(header, [score.row(key, scores["float"], seconds.get(key)) for key, score in scores.items()]))
    return 0


if __name__ == "__main__":
    run(main)
