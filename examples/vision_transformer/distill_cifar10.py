#!/usr/bin/env python3
"""Distil the embedded CIFAR-10 ViT at 2-bit weights, and at 4-bit weights and activations, before and after.

    python examples/vision_transformer/distill_cifar10.py
    python examples/vision_transformer/distill_cifar10.py --data DIR --pictures 5000 --epochs 2

The teacher is the float model itself. Without ``--data`` the pictures are the first 300 of the 500 test pictures that
ship with the examples, without their labels, and it evaluates on the others; DIR holds ``train.zip`` and ``test.zip``
as for ``train_cifar10.py``: pictures are then of the first, and it evaluates on all of the second. With
``--held-back 60`` so many of the pictures are neither calibrated nor trained on, and training that makes the loss on
them no smaller is undone.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from cifar10_pictures import normalize, read_split
from common import UserError, embedded_images, load_embedded, logits, positive, run, table
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq.models.vit_quantization import Reconstruction, ViTQuantizer
from fairseq.quantization.training.distill import distill
from fairseq.quantization.training.losses import Losses

TRAINED = 300
CALIBRATED = 256
SETTINGS: dict[str, dict[str, Any]] = {
    "W2A8, groups of 64": {"bits": 2, "method": "channel", "group_size": 64},
    "W4A4, channel": {"bits": 4, "method": "channel", "activation_bits": 4},
}


def pictures(
    data: Path | None, count: int | None, seed: int, model: Any, processor: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """To train on, to evaluate on, (N, 3, 32, 32) each, and the labels of the latter, (N,)."""
    if data is not None:
        train, test = read_split(data, "train"), read_split(data, "test")
        order = torch.randperm(len(train.pixels), generator=torch.Generator().manual_seed(seed))
        classes = model.config.label2id
        if unknown := [name for name in test.names if name not in classes]:
            raise UserError(f"--data: the embedded CIFAR-10 ViT has no class {', '.join(unknown)}")
        labels = torch.tensor([classes[name] for name in test.names])[test.labels]
        return normalize(train.pixels[order[:count]]), normalize(test.pixels), labels
    readers, names = embedded_images()
    order = torch.randperm(len(readers), generator=torch.Generator().manual_seed(seed))
    pixels = processor(images=[readers[i]() for i in order], return_tensors="pt")["pixel_values"]
    labels = torch.tensor([model.config.label2id[names[i]] for i in order])
    used = TRAINED if count is None else count
    if used >= len(pixels):
        raise UserError(f"--pictures {used}: of {len(pixels)} pictures some must be left to evaluate on")
    return pixels[:used], pixels[used:], labels[used:]


def calibrated(kind: str, teacher: nn.Module, pixels: Tensor, args: argparse.Namespace) -> Any:
    """The student that training begins with."""
    reconstruct = Reconstruction(epochs=args.reconstruct) if args.reconstruct else False
    quantizer = ViTQuantizer(execution="emulated", **SETTINGS[kind])
    return quantizer.quantize_model(teacher, pixels, images=min(len(pixels), CALIBRATED), reconstruct=reconstruct)


@torch.no_grad()
def outputs(model: nn.Module, pixels: Tensor) -> Tensor:
    return torch.cat([logits(model, batch) for batch in pixels.split(250)])


def packed_outputs(student: nn.Module, pixels: Tensor) -> Tensor:
    return outputs(ViTQuantizer.pack_model(student), pixels)


def row(name: str, got: Tensor, expected: Tensor, labels: Tensor, seconds: float) -> list[str]:
    right, before = ((x.argmax(-1) == labels).float().mean() for x in (got, expected))
    agree = (got.argmax(-1) == expected.argmax(-1)).float().mean()
    apart = F.kl_div(got.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="batchmean")
    return [name, f"{right:.1%}", f"{right / before:.1%}", f"{agree:.1%}", f"{apart:.3g}", f"{seconds:.0f}"]


def counted(text: str) -> int:
    """0 or more, for argparse."""
    return 0 if text == "0" else positive(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=None, help="folder with train.zip and test.zip")
    parser.add_argument("--pictures", type=positive, default=None, help="to train on; default: 300, or all of --data")
    parser.add_argument("--epochs", type=float, default=8.0)
    parser.add_argument("--batch-size", type=positive, default=32)
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--scale-learning-rate", type=float, default=1e-3)
    parser.add_argument("--features", type=float, default=1.0, help="weight of the loss of hidden states")
    parser.add_argument("--temperature", type=float, default=1.0, help="of logits")
    parser.add_argument("--no-augment", action="store_true", help="the pictures as they are, without crops and flips")
    parser.add_argument("--held-back", type=counted, default=0, help="pictures that decide whether it stays")
    parser.add_argument("--reconstruct", type=counted, default=0, help="epochs of reconstruction before it")
    parser.add_argument("--only", choices=list(SETTINGS), default=None, help="one of the two")
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16 while it is trained")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    model, processor, name = load_embedded()
    teacher: Any = model.float()
    teacher.set_attn_implementation("eager")  # whose backward pass is several times faster here
    train, test, labels = pictures(args.data, args.pictures, args.seed, teacher, processor)
    print(f"{name}: {len(train)} pictures without labels to learn from, {len(test)} others to evaluate on\n")
    if args.held_back >= len(train):
        raise UserError(f"--held-back {args.held_back}: of {len(train)} pictures some must be left to train on")
    held, train = train[: args.held_back], train[args.held_back :]
    expected = outputs(teacher, test)
    rows = [row("float", expected, expected, labels, 0)]
    for kind in SETTINGS if args.only is None else [args.only]:
        started = time.perf_counter()
        student = calibrated(kind, teacher, train, args)
        seconds = time.perf_counter() - started
        rows.append(row(f"{kind}: calibrated", packed_outputs(student, test), expected, labels, seconds))
        started = time.perf_counter()
        distill(
            student, teacher, train, epochs=args.epochs, batch_size=args.batch_size, bf16=args.bf16,
            augment=not args.no_augment, learning_rate=args.learning_rate, held_back=held if len(held) else 0,
            seed=args.seed, scale_learning_rate=args.scale_learning_rate,
            losses=Losses(features=args.features, temperature=args.temperature),
            progress=lambda progress: print(progress, file=sys.stderr),
        )  # fmt: skip
        seconds = time.perf_counter() - started
        rows.append(row(f"{kind}: distilled", packed_outputs(student, test), expected, labels, seconds))
    print(table(["model", "top-1", "kept", "agreement", "KL", "s"], rows))
    return 0


if __name__ == "__main__":
    run(main)
