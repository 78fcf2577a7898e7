#!/usr/bin/env python3
"""Train the small ViT that ships with the project on CIFAR-10, from scratch, on a GPU or a CPU.

    python examples/vision_transformer/train_cifar10.py --data DIR --output runs/cifar10

DIR holds ``train.zip`` and ``test.zip`` (or the folders ``train`` and ``test``): one folder of JPEG files per class,
32x32 pixels. An interrupted run goes on where it was when the same command is given again. ``--max-minutes`` bends
the cosine schedule so that it ends in time on a slow machine.

Three things make a plain ViT learn CIFAR-10 in a CPU's hours instead of days, none of which changes the architecture:
mimetic initialization (Trockman and Kolter, 2023, https://arxiv.org/abs/2305.09828), the Muon optimizer for the
encoder's matrices (``torch.optim.Muon``), and dropping half of the patches in the first part of the training
(PatchDropout, Liu et al., 2022, https://arxiv.org/abs/2208.07220). CutMix (Yun et al., 2019,
https://arxiv.org/abs/1905.04899) to the end keeps many epochs from learning the pictures by heart.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
import zipfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

MAY_CHANGE = ("data", "output", "epochs", "max_minutes")
"""What may be another when a run goes on; with another of the rest, its checkpoint would not fit, or mix two runs."""
MEAN = (0.4914, 0.4822, 0.4465)  # of the training pictures, per channel, in [0, 1]
STD = (0.2470, 0.2435, 0.2616)
VALIDATION = 1000  # training pictures held out to watch the run; the test set is looked at once, at the end


class Pictures(NamedTuple):
    """uint8 pixels of shape (N, 3, 32, 32), int64 labels of shape (N,), and the class names."""

    pixels: Tensor
    labels: Tensor
    names: list[str]


def read_split(data: Path, split: str) -> Pictures:
    """Decode every JPEG of one split into memory, in the order of its path."""
    archive, folder = data / f"{split}.zip", data / split
    if archive.is_file():
        with zipfile.ZipFile(archive) as opened:
            files = sorted(n for n in opened.namelist() if n.lower().endswith((".jpg", ".jpeg")))
            decoded = [(Path(n).parent.name, np.asarray(Image.open(opened.open(n)).convert("RGB"))) for n in files]
    elif folder.is_dir():
        paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
        decoded = [(p.parent.name, np.asarray(Image.open(p).convert("RGB"))) for p in paths]
    else:
        raise SystemExit(f"error: found neither {archive} nor the folder {folder}; --data must hold one of them")
    names = sorted({name for name, _ in decoded})
    if not decoded or {pixels.shape for _, pixels in decoded} != {(32, 32, 3)}:
        raise SystemExit(f"error: {data} must hold 32x32 JPEG pictures in one folder per class for '{split}'")
    pixels = torch.from_numpy(np.stack([p for _, p in decoded])).permute(0, 3, 1, 2).contiguous()  # (N, 3, 32, 32)
    return Pictures(pixels, torch.tensor([names.index(n) for n, _ in decoded]), names)


def normalize(pixels: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float32, zero mean and unit variance over the training set."""
    mean, std = (torch.tensor(v, device=pixels.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture its own horizontal flip and its own 32x32 crop out of a 4-pixel reflected border."""
    batch, size = len(pixels), pixels.shape[-1]
    padded = F.pad(pixels.float(), (4, 4, 4, 4), mode="reflect").to(pixels.dtype)  # (B, 3, 40, 40)
    rows, columns = torch.randint(0, 9, (2, batch, 1), generator=generator) + torch.arange(size)  # (B, 32) each
    flip = torch.rand(batch, 1, generator=generator) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    images = torch.arange(batch).view(-1, 1, 1)
    rows, columns = rows.to(pixels.device), columns.to(pixels.device)
    return padded[images.to(pixels.device), :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def cutmix(pixels: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """One box of each picture is another picture's: the pixels, the other's labels, and the share that is its own."""
    size, batch = pixels.shape[-1], len(pixels)
    side = size * math.sqrt(1 - float(torch.rand((), generator=generator)))
    centre = torch.rand(2, generator=generator) * size
    (top, bottom), (left, right) = (
        (max(0, round(float(c) - side / 2)), min(size, round(float(c) + side / 2))) for c in centre
    )
    other = torch.randperm(batch, generator=generator).to(pixels.device)
    mixed = pixels.clone()
    mixed[:, :, top:bottom, left:right] = pixels[other, :, top:bottom, left:right]
    return mixed, labels[other], 1 - (bottom - top) * (right - left) / size**2


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

    def __call__(self, module: nn.Module, args: Any, tokens: Tensor) -> Tensor:
        if not module.training or self.keep >= 1:
            return tokens
        batch, count, hidden = tokens.shape
        kept = int((count - 1) * self.keep)
        chosen = torch.rand(batch, count - 1, device=tokens.device).argsort(dim=1)[:, :kept] + 1  # (B, kept)
        chosen = F.pad(chosen, (1, 0))  # index 0, the class token, first
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


@torch.no_grad()
def accuracy(model: nn.Module, pixels: Tensor, labels: Tensor, device: torch.device) -> float:
    model.eval()
    right = 0
    for start in range(0, len(pixels), 500):
        batch = normalize(pixels[start : start + 500].to(device))
        right += int((model(pixel_values=batch).logits.argmax(-1).cpu() == labels[start : start + 500]).sum())
    model.train()
    return right / len(pixels)


def learning_rate_factor(progress: float) -> float:
    """5% linear warm-up, then half a cosine to zero."""
    return progress / 0.05 if progress < 0.05 else 0.5 * (1 + math.cos(math.pi * (progress - 0.05) / 0.95))


def train(args: argparse.Namespace) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    data = read_split(args.data, "train")
    shuffled = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(args.seed))
    held_out, chosen = shuffled[:VALIDATION], shuffled[VALIDATION:]
    model = build(args, data.names).to(device).train()
    dropout = PatchDropout(args.keep_patches)
    model.vit.embeddings.register_forward_hook(dropout)
    optimizers = make_optimizers(model, args.lr, args.weight_decay)
    precision = torch.autocast(device.type, torch.bfloat16) if args.mixed_precision else nullcontext()

    settings = {k: value for k, value in vars(args).items() if k not in MAY_CHANGE}
    epoch, elapsed, checkpoint = 0, 0.0, args.output / "checkpoint.pt"
    if checkpoint.is_file():
        state = torch.load(checkpoint, map_location=device)
        other = [k for k, value in settings.items() if state.get("settings", {}).get(k, value) != value]
        if other:
            said = ", ".join(f"{k.replace('_', '-')} {state['settings'][k]}, not {settings[k]}" for k in other)
            raise SystemExit(f"error: {checkpoint} was written with {said}; give the same, or another --output")
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        epoch, elapsed = state["epoch"], state["elapsed"]
        print(f"resumed {checkpoint} after {epoch} epochs and {elapsed / 60:.1f} minutes")

    steps, progress = len(chosen) // args.batch_size, epoch / args.epochs
    if args.max_minutes:
        progress = max(progress, elapsed / (60 * args.max_minutes))
    while epoch < args.epochs and progress < 1:
        generator = torch.Generator().manual_seed(args.seed + 1 + epoch)  # a resumed epoch sees the same pictures
        order = chosen[torch.randperm(len(chosen), generator=generator)]
        started, losses = time.monotonic(), []
        for step in (bar := tqdm(range(steps), desc=f"epoch {epoch + 1}", mininterval=5, unit="batch")):
            progress = (epoch + step / steps) / args.epochs
            if args.max_minutes:
                progress = max(progress, (elapsed + time.monotonic() - started) / (60 * args.max_minutes))
            if progress >= 1:
                break
            dropout.keep = args.keep_patches if progress < args.full_patches_from else 1.0
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = args.lr * learning_rate_factor(progress)
            index = order[step * args.batch_size : (step + 1) * args.batch_size]
            pixels, labels = augment(data.pixels[index].to(device), generator), data.labels[index].to(device)
            others, own = labels, 1.0
            if args.cutmix > 0 and torch.rand((), generator=generator) < args.cutmix:
                pixels, others, own = cutmix(pixels, labels, generator)
            with precision:
                logits = model(pixel_values=normalize(pixels)).logits.float()
            loss = own * F.cross_entropy(logits, labels, label_smoothing=0.1)
            if own < 1:
                loss = loss + (1 - own) * F.cross_entropy(logits, others, label_smoothing=0.1)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            bar.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}")
        epoch += 1
        elapsed += time.monotonic() - started
        validation = accuracy(model, data.pixels[held_out], data.labels[held_out], device)
        tqdm.write(
            f"epoch {epoch} ({progress:.0%}): loss {np.mean(losses or [math.nan]):.3f}, "
            f"held-out accuracy {validation:.1%}, {elapsed / 60:.1f} minutes"
        )
        state = {
            "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
            "epoch": epoch, "elapsed": elapsed, "settings": settings,
        }  # fmt: skip
        torch.save(state, checkpoint.with_suffix(".tmp"))
        os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
    return finish(model, args, epoch, elapsed, device)


def finish(model: ViTForImageClassification, args, epoch: int, elapsed: float, device: torch.device) -> dict[str, Any]:
    """Round to float16, measure that on the test set, and write the HuggingFace folder."""
    test = read_split(args.data, "test")
    model.half().float()
    result = {
        "test_accuracy": accuracy(model.eval(), test.pixels, test.labels, device),
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": epoch, "minutes": round(elapsed / 60, 1), "device": device.type, "torch": torch.__version__,
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


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with train.zip and test.zip")
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint and the result")
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--max-minutes", type=float, default=None, help="finish the schedule within this time")
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
