#!/usr/bin/env python3
"""Train the small ViT that ships with the project on CIFAR-10, from scratch, on a GPU or a CPU.

    python examples/vision_transformer/train_cifar10.py --data DIR --output runs/cifar10

DIR holds ``train.zip`` and ``test.zip`` (or the folders ``train`` and ``test``): one folder of JPEG files per class,
32x32 pixels. An interrupted run goes on where it was when the same command is given again. ``--max-minutes`` bends
the ViT's cosine schedule so that it ends in time on a slow machine.

Three things make a plain ViT learn CIFAR-10 in a CPU's hours instead of days, none of which changes the architecture:
mimetic initialization (Trockman and Kolter, 2023, https://arxiv.org/abs/2305.09828), the Muon optimizer for the
encoder's matrices (``torch.optim.Muon``), and dropping half of the patches in the first part of the training
(PatchDropout, Liu et al., 2022, https://arxiv.org/abs/2208.07220). CutMix (Yun et al., 2019,
https://arxiv.org/abs/1905.04899) to the end keeps many epochs from learning the pictures by heart.

With ``--teacher-epochs 10`` it first trains a small convolutional network, from which the ViT learns, too:
``cifar10_teacher.py``.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cifar10_pictures import MEAN, STD, Pictures, normalize, read_split
from cifar10_run import Run, accuracy
from cifar10_teacher import Guide, Teacher
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

WHITENED = 5000  # pictures whose patches say what the teacher's first convolution is


def build(args: argparse.Namespace, names: list[str]) -> ViTForImageClassification:
    config = ViTConfig(
        hidden_size=args.hidden, num_hidden_layers=args.layers, num_attention_heads=args.hidden // 64,
        intermediate_size=args.mlp, image_size=32, patch_size=4, hidden_dropout_prob=0.0,
        id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)},
        attn_implementation="eager",  # the fused CPU kernel's backward pass is several times slower at 65 tokens
    )  # fmt: skip
    model = ViTForImageClassification(config)
    initialize_mimetic(model)
    return model


@torch.no_grad()
def initialize_mimetic(model: ViTForImageClassification) -> None:
    """Sine-cosine positions; W_q^T W_k close to the identity per head; W_o W_v close to minus the identity."""
    hidden = model.config.hidden_size
    head_dim = hidden // model.config.num_attention_heads
    position = model.vit.embeddings.position_embeddings  # (1, 1 + patches, hidden)
    side = math.isqrt(position.shape[1] - 1)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    frequency = 10000 ** (-torch.arange(hidden // 4) / (hidden // 4))
    angles = [axis.reshape(-1, 1) * frequency for axis in (y, x)]
    position[0, 1:] = 0.5 * torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)

    def factor(alpha: float, beta: float, rank: int) -> tuple[Tensor, Tensor]:
        """Two (rank, hidden) factors a, b with a^T b close to alpha * noise + beta * identity."""
        noise = torch.randn(hidden, hidden) / math.sqrt(hidden)
        u, s, vh = torch.linalg.svd(alpha * noise + beta * torch.eye(hidden))
        root = s[:rank].sqrt()[:, None]
        return u[:, :rank].T * root, vh[:rank] * root

    for q, k, v, o in attention_projections(model):
        for start in range(0, hidden, head_dim):
            rows = slice(start, start + head_dim)
            q.weight[rows], k.weight[rows] = factor(0.7, 0.7, head_dim)
        left, right = factor(0.4, -0.4, hidden)
        o.weight.copy_(left.T)
        v.weight.copy_(right)


def attention_projections(model: ViTForImageClassification) -> list[list[nn.Linear]]:
    """Query, key, value and output of each layer, by the names of any version of transformers."""
    endings = (r"(query|q_proj)$", r"(key|k_proj)$", r"(value|v_proj)$", r"attention\.(output\.dense|o_proj)$")
    found = [[m for n, m in model.named_modules() if re.search(ending, n)] for ending in endings]
    assert all(len(kind) == model.config.num_hidden_layers for kind in found)
    return [list(layer) for layer in zip(*found)]


class PatchDropout:
    """A forward hook on the embeddings: keeps the class token and a random share of the patches while training."""

    def __init__(self, keep: float):
        self.keep = keep
        self.kept: Tensor | None = None
        """The numbers of the patches that each picture of the last batch kept, (B, n); None for all."""

    def __call__(self, module: nn.Module, args: Any, tokens: Tensor) -> Tensor:
        self.kept = None
        if not module.training or self.keep >= 1:
            return tokens
        batch, count, hidden = tokens.shape
        kept = int((count - 1) * self.keep)
        chosen = torch.rand(batch, count - 1, device=tokens.device).argsort(dim=1)[:, :kept]  # (B, kept)
        self.kept = chosen
        chosen = F.pad(chosen + 1, (1, 0))  # index 0, the class token, first
        return tokens.gather(1, chosen.unsqueeze(-1).expand(-1, -1, hidden))


def make_optimizers(model: nn.Module, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the encoder's matrices, AdamW for everything else (no decay on vectors and positions)."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and ".layer" in name else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, weight_decay=0.0, betas=(0.9, 0.95)),
    ]


def mixed_cross_entropy(logits: Tensor, labels: Tensor, others: Tensor, own: float) -> Tensor:
    """The cross-entropy with both labels of each picture, as much as there is of each."""
    loss = own * F.cross_entropy(logits, labels, label_smoothing=0.1)
    return loss if own == 1 else loss + (1 - own) * F.cross_entropy(logits, others, label_smoothing=0.1)


def train(args: argparse.Namespace) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = read_split(args.data, "train")
    torch.manual_seed(args.seed)
    model = build(args, data.names).to(device).train()
    dropout = PatchDropout(args.keep_patches)
    model.vit.embeddings.register_forward_hook(dropout)
    optimizers, modules = make_optimizers(model, args.lr, args.weight_decay), [model]
    guide = Guide(args.hidden, args.layers).to(device) if args.teacher_epochs else None
    if guide is not None:
        modules.append(guide)
        optimizers.append(torch.optim.AdamW(guide.parameters(), lr=args.lr, weight_decay=0.0))
    run = Run(args, "ViT", "checkpoint.pt", modules, optimizers, args.epochs, args.cutmix, args.max_minutes)
    run.resume(device)
    teacher, teacher_minutes = train_teacher(args, data, device) if guide is not None else (None, 0.0)

    def loss_of(images: Tensor, labels: Tensor, others: Tensor, own: float, progress: float) -> Tensor:
        dropout.keep = args.keep_patches if progress < args.full_patches_from else 1.0
        result = model(pixel_values=images, output_hidden_states=teacher is not None)
        loss = mixed_cross_entropy(result.logits.float(), labels, others, own)
        if teacher is None or guide is None:
            return loss
        with torch.no_grad():
            taught = teacher(images)
        return guide(loss, taught, result.logits.float(), result.hidden_states, dropout.kept)

    run.train(data, device, loss_of)
    return finish(model, args, run, teacher_minutes, device)


def train_teacher(args: argparse.Namespace, data: Pictures, device: torch.device) -> tuple[Teacher, float]:
    """The convolutional network that teaches, trained now or before, and the minutes that this took."""
    torch.manual_seed(args.seed)
    some = data.pixels[:: -(-len(data.pixels) // WHITENED)]  # of all classes, by which they are sorted
    teacher = Teacher(normalize(some), len(data.names)).to(device, memory_format=torch.channels_last).train()
    run = Run(args, "teacher", "teacher.pt", [teacher], teacher.optimizers(args.teacher_lr), args.teacher_epochs)

    def loss_of(images: Tensor, labels: Tensor, others: Tensor, own: float, progress: float) -> Tensor:
        return F.cross_entropy(teacher(images).logits, labels, label_smoothing=0.1)  # its pictures are not mixed

    run.resume(device)
    run.train(data, device, loss_of)
    return teacher.eval().requires_grad_(False), run.elapsed / 60


def finish(
    model: ViTForImageClassification, args: argparse.Namespace, run: Run, teacher_minutes: float, device: torch.device
) -> dict[str, Any]:
    """Round to float16, measure that on the test set, and write the HuggingFace folder."""
    test = read_split(args.data, "test")
    model.half().float()
    result = {
        "test_accuracy": accuracy(model.eval(), test.pixels, test.labels, device),
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": run.epoch, "minutes": round(run.elapsed / 60, 1), "teacher_minutes": round(teacher_minutes, 1),
        "device": device.type, "torch": torch.__version__,
        "settings": {k: v for k, v in vars(args).items() if k not in ("data", "output")},
    }  # fmt: skip
    model.half().save_pretrained(args.output)
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, resample=3, image_mean=MEAN, image_std=STD)
    processor.save_pretrained(args.output)
    (args.output / "training.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def share(text: str) -> float:
    """A number from 0 to 1, for argparse."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return value


def at_least(least: int) -> Callable[[str], int]:
    """A whole number that is not below ``least``, for argparse."""

    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least {least}")
        return int(text)

    return count


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with train.zip and test.zip")
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint and the result")
    parser.add_argument("--epochs", type=at_least(1), default=90)
    parser.add_argument("--max-minutes", type=float, default=None, help="finish the ViT's schedule within this time")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--hidden", type=int, default=192, help="width, a multiple of 64")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--mlp", type=int, default=384, help="width of the MLP")
    parser.add_argument("--keep-patches", type=float, default=0.5, help="share of patches seen in the first part")
    parser.add_argument("--full-patches-from", type=float, default=0.8, help="progress at which all are seen")
    parser.add_argument("--cutmix", type=share, default=0.5, help="share of batches that are mixed")
    parser.add_argument("--mixed-precision", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--teacher-epochs", type=at_least(0), default=0, help="of a convolutional network that teaches; 0: none"
    )
    parser.add_argument("--teacher-lr", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    result = train(args)
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
