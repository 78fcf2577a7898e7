#!/usr/bin/env python3
"""Accuracy of a ViT before and after quantization, over labelled pictures; of a model without classes, its embeddings.

    python examples/vision_transformer/evaluate.py
    python examples/vision_transformer/evaluate.py --model DIR --images DIR --labels labels.csv
    python examples/vision_transformer/evaluate.py ... --calibration 128 --configs 4:channel 4.5:channel
    python examples/vision_transformer/evaluate.py ... --calibration 128 --held-out 256 --json rows.json
    python examples/vision_transformer/evaluate.py --model DIR --images DIR [--prompts prompts.txt]

Without a model, the embedded one on the 500 pictures that come with it. The CSV has the columns ``file`` (in the
folder) and ``class_index``. 4.5 bits stand for widths of 2 to 8 chosen layer by layer, 4.5 per weight on average.
Columns of the result: top-1 and top-5 accuracy; "kept", top-1 as a share of the float model's; "agreement", the share
of pictures with the float model's top-1 class; the mean squared error of the logits; and "divergence", the mean
Kullback-Leibler divergence from the float model's softmax. All models see each batch in turn. ``accuracy_picture.py``
draws what several calls added to one --json.

Without labels, how much of the embeddings is kept: their cosine with the float model's, the mean and the least over
the pictures; and "overlap", the share of each picture's nearest others that are still among them. For CLIP and SigLIP
with --prompts, a text file with a prompt for each class on a line of its own, "zero-shot": the share of pictures for
which the most fitting prompt is the float model's.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from common import (
    CONFIGURATIONS,
    PROC,
    UserError,
    batches,
    embedded_images,
    first_line,
    labelled_images,
    load_embedded,
    load_model,
    logits,
    memory,
    parse_configuration,
    pictures_in,
    positive,
    processor_name,
    quantize,
    run,
    table,
)
from rows import add_rows, read_rows
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoTokenizer

from fairseq.cli import measure
from fairseq.cli.options import parse_overrides
from fairseq.models.vit_quantization import Reconstruction, ViTQuantizer, zero_shot_agreement
from fairseq.quantization.calibration.synthetic import synthetic_images
from fairseq.quantization.config import ROUNDINGS
from fairseq.quantization.evaluation.compare import compare_vectors, embeddings
from fairseq.quantization.training.distill import distill
from fairseq.quantization.training.pictures import hold_back

LEARNING_RATE = 1e-4  # of --distill


class Score(measure.Score):
    """Running sums of one model's results, and a row of the table."""

    def row(self, name: str, reference: Score, seconds: float | None) -> list[str]:
        kept = self.top1 / reference.top1 if reference.top1 else float("nan")
        return [
            name, f"{self.top1 / self.count:.1%}", f"{self.top5 / self.count:.1%}", f"{kept:.1%}",
            f"{self.agree / self.count:.1%}", f"{self.squared_error / self.values:.2e}",
            f"{self.divergence / self.count:.4f}", "" if seconds is None else f"{seconds:.1f}",
        ]  # fmt: skip

    def figures(self, reference: Score) -> dict[str, float | None]:
        """The same, as numbers."""
        return {
            "top1": self.top1 / self.count, "top5": self.top5 / self.count,
            "kept": self.top1 / reference.top1 if reference.top1 else None,
            "agreement": self.agree / self.count, "mse": self.squared_error / self.values,
            "divergence": self.divergence / self.count,
        }  # fmt: skip


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


def fidelity(
    models: dict[str, nn.Module], images: list, processor: Any, size: int, k: int, words: Any
) -> tuple[list[str], dict[str, list[str]]]:
    """Columns, and for each quantized model what they say of its embeddings against those of the first model."""
    reference, *others = models
    found: dict[str, list[Tensor]] = {name: [] for name in models}
    agreed = dict.fromkeys(others, 0.0)
    kind = ""
    for start in tqdm(range(0, len(images), size), desc="Evaluating", unit="batch", leave=False, delay=1):
        pictures = [read() for read in images[start : start + size]]
        inputs = processor(images=pictures, return_tensors="pt")
        for name, model in models.items():
            kind, vectors = embeddings(model, inputs, size)
            found[name].append(vectors)
            if words is not None and name != reference:
                agreed[name] += len(pictures) * zero_shot_agreement(models[reference], model, inputs, words, size)
    columns = ["cosine", "least cosine", f"overlap@{k}", *(["zero-shot"] if words is not None else [])]
    rows = {}
    for name in others:
        kept = compare_vectors(torch.cat(found[reference]), torch.cat(found[name]), k, kind)
        rows[name] = [f"{kept.cosine:.5f}", f"{kept.cosine_min:.5f}", f"{kept.overlap:.1%}"]
        rows[name] += [f"{agreed[name] / len(images):.1%}"] if words is not None else []
    return columns, rows


def tokenized(source: str, prompts: Path, model: nn.Module) -> Any:
    """The prompts of a text file, one a line, as the text tower of ``model`` takes them."""
    if not hasattr(model, "get_text_features"):
        raise UserError(f"--prompts: {source} has no text tower")
    try:
        lines = [line.strip() for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"--prompts {prompts}: {first_line(error)}") from None
    if len(lines) < 2:
        raise UserError(f"--prompts {prompts}: needs a prompt for each of at least two classes, one a line")
    length = model.config.text_config.max_position_embeddings
    padding = "max_length" if "siglip" in model.config.model_type else True  # as it was trained
    return tokenizer(lines, padding=padding, truncation=True, max_length=length, return_tensors="pt")


def subject(args: argparse.Namespace) -> tuple[nn.Module, Any, str, list, Tensor | None]:
    """Model, processor, its name, pictures to read and their labels, int64 (N,), or None for none."""
    given = [args.model, args.images, args.labels]
    if given == [None] * 3:
        model, processor, name = load_embedded()
        images, classes = embedded_images()
        return model, processor, name, images, torch.tensor([model.config.label2id[c] for c in classes])
    if args.model is None or args.images is None:
        raise UserError("--model, --images and --labels go together; without them the embedded model is evaluated")
    if args.labels is None:
        model, processor, name = load_model(args.model, any_kind=True)
        return model, processor, name, pictures_in(args.images), None
    model, processor, name = load_model(args.model)
    return model, processor, name, *labelled_images(args.images, args.labels, model.config.num_labels)


def split(args: argparse.Namespace, images: list) -> tuple[list[int], list[int]]:
    """Which of the pictures to calibrate on, and which to evaluate on: all others, or --held-out of them."""
    calibration, count = args.calibration or "", len(images)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(args.seed)).tolist()
    held_out = args.held_out or 0
    if held_out >= count:
        raise UserError(f"--held-out {held_out}: of {count} pictures, 1 to {count - 1} can be held out")
    if calibration in ("", "synthetic"):
        chosen = []
    elif calibration.isdecimal() and not Path(calibration).exists():
        left = count - max(1, held_out)
        if not 1 <= int(calibration) <= left:
            raise UserError(f"--calibration {calibration}: of {count} pictures, 1 to {left} can serve")
        chosen = order[: int(calibration)]
    else:
        chosen = named(calibration, images, args.images)
    evaluated = sorted(set(order[count - held_out :] if held_out else order) - set(chosen))
    if held_out > len(evaluated):
        raise UserError(f"--calibration {calibration}: {held_out - len(evaluated)} of its pictures are held out")
    return chosen, evaluated


def named(calibration: str, images: list, folder: Path | None) -> list[int]:
    """The places of the pictures that a text file names, one a line."""
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
            raise UserError(f"--calibration {calibration}: {folder / name} is not one of the pictures")
    return [places[folder / name] for name in names]


def make(
    args: argparse.Namespace, bits: float, method: str, model: nn.Module, processor: Any, calibration: list | None,
    held_back: list,
) -> nn.Module:  # fmt: skip
    """The quantized model of one of --configs; pictures held back decide whether --distill helped."""
    settings: dict[str, Any] = {
        "method": method, "activations": None if args.activations == "none" else args.activations,
        "activation_bits": args.activation_bits, "arithmetic": args.arithmetic, "functions": args.functions,
        "rounding": args.rounding, "group_size": args.group_size, "rotate": args.rotate,
        "overrides": parse_overrides(args.override), "execution": "emulated" if args.distill else "packed",
        "seed": args.seed,
    }  # fmt: skip
    try:
        if isinstance(bits, int):
            quantizer = ViTQuantizer(bits=bits, **settings)
        elif calibration is None:
            raise UserError(f"{bits:g}:{method}: choosing widths by layer needs pictures; pass --calibration")
        else:
            assigner = ViTQuantizer(**{**settings, "execution": "packed"})
            chosen = assigner.assign_bits(model, calibration, processor, images=len(calibration), average_bits=bits)
            quantizer = ViTQuantizer(**{**settings, "overrides": chosen.overrides})
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    pictures: dict[str, Any] = {}
    if calibration is not None:
        pictures = {"calibration": calibration, "processor": processor, "images": "all"}
    if args.reconstruct is not None:
        pictures["reconstruct"] = Reconstruction(epochs=args.reconstruct)
    result = quantize(quantizer, model, **pictures)
    if args.distill is None:
        return result
    assert calibration is not None
    try:
        distill(
            result, model, calibration, processor, epochs=args.distill, batch_size=args.batch_size, augment=True,
            learning_rate=args.learning_rate or LEARNING_RATE, held_back=held_back, seed=args.seed,
        )  # fmt: skip
        return ViTQuantizer.pack_model(result)
    except (ImportError, TypeError, ValueError) as error:
        raise UserError(f"--distill: {error}") from error


def bits_and_method(text: str) -> tuple[float, str]:
    """ "4:histogram" -> (4, "histogram"), "4.5:channel" -> (4.5, "channel"), for argparse."""
    bits, _, method = text.partition(":")
    whole, point, rest = bits.partition(".")
    if not point:
        return parse_configuration(text)
    if not whole.isdecimal() or not rest.isdecimal() or not 2 <= float(bits) <= 8:
        raise argparse.ArgumentTypeError(f"{text!r} is not BITS:METHOD, with 2 to 8 bits, such as 4.5:channel")
    return float(bits), parse_configuration(f"8:{method}")[1]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="folder or hub id; needs the next")
    parser.add_argument("--images", type=Path, default=None, help="folder of pictures")
    parser.add_argument("--labels", type=Path, default=None, help="CSV with the columns file and class_index")
    parser.add_argument("--prompts", type=Path, default=None, help="without labels: a text file, one prompt a line")
    parser.add_argument("--neighbours", type=positive, default=5, help="without labels: of how many; default 5")
    parser.add_argument(
        "--configs", type=bits_and_method, nargs="+", default=CONFIGURATIONS, metavar="BITS:METHOD",
        help="default: 8 and 4 bits with each of tensor, channel, histogram",
    )  # fmt: skip
    parser.add_argument(
        "--activations", choices=["dynamic", "static", "none"], default="dynamic",
        help="dynamic: a scale per token (default); static: one, from calibration; none: only weights are quantized",
    )  # fmt: skip
    parser.add_argument("--activation-bits", type=int, default=8, metavar="BITS", help="2 to 8, default 8")
    parser.add_argument("--group-size", type=int, default=None, metavar="INPUTS", help="that share a scale; 32 to 128")
    parser.add_argument(
        "--rounding", choices=["auto", *ROUNDINGS], default="auto",
        help="auto: with --calibration coordinate up to 4 bits and gptaq above, else nearest",
    )  # fmt: skip
    parser.add_argument("--rotate", action="store_true", help="turn the hidden states first; ViT and DeiT")
    parser.add_argument(
        "--reconstruct", type=positive, default=None, metavar="EPOCHS",
        help="learn the integers of each block on the calibration pictures, for so many passes over them",
    )  # fmt: skip
    parser.add_argument(
        "--distill", type=positive, default=None, metavar="EPOCHS",
        help="then train it towards the float model; an eighth of the pictures is not trained or calibrated on, and "
        "decides whether that stays",
    )  # fmt: skip
    parser.add_argument("--learning-rate", type=float, default=None, help=f"of --distill; default {LEARNING_RATE}")
    parser.add_argument(
        "--override", action="append", default=[], metavar="GLOB=KEY:VALUE,...",
        help="other settings for the layers of that name, such as '*classifier=bits:8,activation_bits:8'; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--arithmetic", choices=["float", "integer"], default="float",
        help="integer: no floating operation from the rounded pixels to the logits; needs --calibration",
    )  # fmt: skip
    parser.add_argument(
        "--functions", choices=["default", "ibert", "ivit"], default="default",
        help="GELU and softmax with --arithmetic integer: of I-BERT or I-ViT, to compare with",
    )  # fmt: skip
    parser.add_argument(
        "--calibration", default=None, metavar="FILE|COUNT|synthetic",
        help="calibrate on the pictures named in this file, one a line, or on so many drawn at random (by --seed), "
        "and leave them out of the evaluation; or on 128 synthetic ones",
    )  # fmt: skip
    parser.add_argument(
        "--held-out", type=positive, default=None, metavar="COUNT",
        help="evaluate on so many drawn at random, the same whatever --calibration is; default: on all others",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=positive, default=16, help="of evaluation and of --distill; default 16")
    parser.add_argument("--seed", type=int, default=0, help="of which are drawn, and of what is learned; default 0")
    parser.add_argument("--limit", type=positive, default=None, help="only the first so many pictures")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="add the rows to those in this file")
    args = parser.parse_args()
    if args.distill is not None and args.calibration in (None, "synthetic"):
        raise UserError("--distill needs pictures; pass --calibration")
    if args.learning_rate is not None and (args.distill is None or not 0 < args.learning_rate < 1):
        raise UserError(f"--learning-rate {args.learning_rate}: goes with --distill, and is above 0 and below 1")
    if args.json is not None and (args.json.is_dir() or not args.json.parent.is_dir()):
        raise UserError(f"--json {args.json}: must be a file in a folder that there is")
    if args.json is not None and args.json.exists():
        read_rows(args.json)  # before minutes are spent
    return args


def describe(args: argparse.Namespace, pictures: int | None) -> dict[str, Any]:
    """What all rows of one call share, in the words of the options; ``pictures`` calibrate."""
    return {
        "activations": args.activations, "activation_bits": args.activation_bits, "group_size": args.group_size,
        "rounding": args.rounding, "rotated": args.rotate, "overrides": args.override, "arithmetic": args.arithmetic,
        "calibration": "synthetic" if args.calibration == "synthetic" else pictures,
        "functions": args.functions, "reconstruct": args.reconstruct, "distill": args.distill,
        "learning_rate": (args.learning_rate or LEARNING_RATE) if args.distill else None, "batch_size": args.batch_size,
        "seed": args.seed, "device": args.device, "threads": torch.get_num_threads(),
        "processor": processor_name(), "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip


def main() -> int:
    args = parse_arguments()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device that PyTorch can use")
    model, processor, name, images, labels = subject(args)
    if args.prompts is not None and labels is not None:
        raise UserError("--prompts goes with --model and --images, and without --labels")
    words = None if args.prompts is None else tokenized(args.model, args.prompts, model)
    if args.json is not None and labels is None:
        raise UserError("--json holds accuracy and needs --labels")
    chosen, evaluated = split(args, images)
    if args.distill is not None and len(chosen) < 8:
        raise UserError(f"--distill needs at least 8 pictures, of which one decides; --calibration gives {len(chosen)}")
    deciding: list[int] = []
    if args.distill is not None:
        places, drawn = hold_back(len(chosen), len(chosen) // 8, args.seed)
        chosen, deciding = [chosen[i] for i in places], [chosen[i] for i in drawn]
    held_back = [images[i]() for i in deciding]
    calibration = [images[i]() for i in chosen] if chosen else None
    calibration = synthetic_images(seed=args.seed) if args.calibration == "synthetic" else calibration
    images, labels = [images[i] for i in evaluated], None if labels is None else labels[evaluated]
    images, labels = images[: args.limit], None if labels is None else labels[: args.limit]
    if not images:
        raise UserError("no picture is left to evaluate")
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    models, seconds = {"float": model.to(device)}, {}
    for bits, method in dict.fromkeys(args.configs):
        key, started = f"{bits:g}-bit {method}", time.perf_counter()
        models[key] = make(args, bits, method, model, processor, calibration, held_back)
        seconds[key] = time.perf_counter() - started

    if labels is None and len(images) <= args.neighbours:
        raise UserError(f"--images: {len(images)} pictures; {args.neighbours} neighbours need more")
    what = "Linear layers of the vision tower" if hasattr(model, "get_text_features") else "all Linear layers"
    kind = "synthetic ones" if args.calibration == "synthetic" else "others"
    print(
        f"{name}, {len(images)} pictures, {what} quantized, activations: {args.activations}"
        f"{'' if args.activation_bits == 8 else f' {args.activation_bits} bits'}, "
        f"{'' if args.rounding == 'auto' else f'rounding: {args.rounding}, '}"
        f"{'rotated, ' if args.rotate else ''}"
        f"{'' if args.group_size is None else f'groups of {args.group_size}, '}"
        f"{'' if args.reconstruct is None else f'blocks reconstructed ({args.reconstruct} epochs), '}"
        f"{'' if args.distill is None else f'distilled ({args.distill} epochs, {len(held_back)} pictures held back), '}"
        f"{', '.join(args.override)}{', ' if args.override else ''}"
        f"{'integers alone, ' if args.arithmetic == 'integer' else ''}"
        f"{'without calibration' if calibration is None else f'calibrated on {len(calibration)} {kind}'}, on {device}\n"
    )
    if labels is None:
        columns, kept_of = fidelity(models, images, processor, args.batch_size, args.neighbours, words)
        header = ["configuration", *columns, "quantized in s"]
        print(table(header, [[key, *row, f"{seconds[key]:.1f}"] for key, row in kept_of.items()]))
        return 0
    scores = score_all(models, images, labels, processor, args.batch_size)
    header = ["configuration", "top-1", "top-5", "kept", "agreement", "logit MSE", "divergence", "quantized in s"]
    print(table(header, [score.row(key, scores["float"], seconds.get(key)) for key, score in scores.items()]))
    if args.json is not None:
        names = "\n".join("/".join(Path(read.args[-1]).parts[-2:]) for read in images)  # file and folder
        shared = {
            "model": name, "evaluated": len(images), "evaluated_on": hashlib.sha256(names.encode()).hexdigest()[:12],
            **describe(args, len(calibration) if calibration else None), "held_back": len(held_back),
        }  # fmt: skip
        peak = memory()["peak"] / 1e9 if PROC.exists() else None  # GB, of the whole process until here
        add_rows(args.json, [
            {**shared, "bits": bits, "method": method, **scores[key].figures(scores["float"]), "seconds": seconds[key],
             "peak_gb": peak}
            for (bits, method), key in zip(dict.fromkeys(args.configs), seconds, strict=True)
        ])  # fmt: skip
    return 0


if __name__ == "__main__":
    run(main)
