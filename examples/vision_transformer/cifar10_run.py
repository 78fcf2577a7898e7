"""Run: one model's training on CIFAR-10 for ``train_cifar10.py``, epoch by epoch, from its checkpoint on."""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from cifar10_pictures import Pictures, augment, cutmix, normalize
from torch import Tensor, nn
from tqdm import tqdm

MAY_CHANGE = ("data", "output", "epochs", "max_minutes")
"""What may be another when a run goes on; with another of the rest, its checkpoint would not fit, or mix two runs."""
VALIDATION = 1000  # training pictures held out to watch the run; the test set is looked at once, at the end

LossOf = Callable[[Tensor, Tensor, Tensor, float, float], Tensor]


class Run:
    """A model that is trained on the pictures, epoch by epoch, and goes on where its checkpoint ends.

    Args:
        args: the command line.
        name: what is trained, as the progress says.
        checkpoint: the name of its file in ``args.output``.
        modules: all that is trained; the first is what is evaluated.
        optimizers: of their parameters; each group's rate is followed down.
        epochs: at most so many.
        cutmix: the share of batches that are mixed.
        max_minutes: in at most this time.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        name: str,
        checkpoint: str,
        modules: list[nn.Module],
        optimizers: list[torch.optim.Optimizer],
        epochs: int,
        cutmix: float = 0.0,
        max_minutes: float | None = None,
    ):
        self.args, self.name, self.modules, self.optimizers = args, name, modules, optimizers
        self.epochs, self.cutmix, self.max_minutes = epochs, cutmix, max_minutes
        self.rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        self.settings = {k: value for k, value in vars(args).items() if k not in MAY_CHANGE}
        self.checkpoint = args.output / checkpoint
        self.epoch, self.elapsed = 0, 0.0

    def resume(self, device: torch.device) -> None:
        """Take the state of the checkpoint, if there is one; SystemExit if that has other settings."""
        if not self.checkpoint.is_file():
            return
        state = torch.load(self.checkpoint, map_location=device)
        if "modules" not in state:
            raise SystemExit(f"error: {self.checkpoint} is of an earlier version; give another --output")
        other = [k for k, value in self.settings.items() if state["settings"].get(k, value) != value]
        if other:
            said = ", ".join(f"{k.replace('_', '-')} {state['settings'][k]}, not {self.settings[k]}" for k in other)
            raise SystemExit(f"error: {self.checkpoint} was written with {said}; give the same, or another --output")
        for module, saved in zip(self.modules, state["modules"], strict=True):
            module.load_state_dict(saved)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.epoch, self.elapsed = state["epoch"], state["elapsed"]
        print(f"resumed {self.checkpoint} after {self.epoch} epochs and {self.elapsed / 60:.1f} minutes")

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        state = {
            "modules": [m.state_dict() for m in self.modules], "optimizers": [o.state_dict() for o in self.optimizers],
            "epoch": self.epoch, "elapsed": self.elapsed, "settings": self.settings,
        }  # fmt: skip
        torch.save(state, self.checkpoint.with_suffix(".tmp"))
        os.replace(self.checkpoint.with_suffix(".tmp"), self.checkpoint)

    def progress(self, share: float, seconds: float) -> float:
        """How far the schedule is, after a share of the present epoch that took so many seconds."""
        done = (self.epoch + share) / self.epochs
        return max(done, (self.elapsed + seconds) / (60 * self.max_minutes)) if self.max_minutes else done

    def train(self, data: Pictures, device: torch.device, loss_of: LossOf) -> None:
        """All epochs that are left.

        Args:
            data: the training pictures.
            device: of the modules.
            loss_of: the loss of normalized images, the two labels of each, the first one's share, and the progress.
        """
        args = self.args
        shuffled = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(args.seed))
        held_out, chosen = shuffled[:VALIDATION], shuffled[VALIDATION:]
        precision = torch.autocast(device.type, torch.bfloat16) if args.mixed_precision else nullcontext()
        steps = len(chosen) // args.batch_size
        progress = self.progress(0, 0)
        while self.epoch < self.epochs and progress < 1:
            generator = torch.Generator().manual_seed(args.seed + 1 + self.epoch)  # a resumed epoch sees the same
            order = chosen[torch.randperm(len(chosen), generator=generator)]
            started, losses = time.monotonic(), []
            for step in (
                bar := tqdm(range(steps), desc=f"{self.name}, epoch {self.epoch + 1}", mininterval=5, unit="batch")
            ):
                progress = self.progress(step / steps, time.monotonic() - started)
                if progress >= 1:
                    break
                self._set_rates(learning_rate_factor(progress))
                index = order[step * args.batch_size : (step + 1) * args.batch_size]
                pixels, labels = augment(data.pixels[index].to(device), generator), data.labels[index].to(device)
                others, own = labels, 1.0
                if self.cutmix > 0 and torch.rand((), generator=generator) < self.cutmix:
                    pixels, others, own = cutmix(pixels, labels, generator)
                with precision:
                    loss = loss_of(normalize(pixels), labels, others, own, progress)
                loss.backward()
                for optimizer in self.optimizers:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                losses.append(loss.item())
                bar.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}")
            self.epoch += 1
            self.elapsed += time.monotonic() - started
            validation = accuracy(self.modules[0], data.pixels[held_out], data.labels[held_out], device)
            tqdm.write(
                f"{self.name}, epoch {self.epoch} ({progress:.0%}): loss {np.mean(losses or [math.nan]):.3f}, "
                f"held-out accuracy {validation:.1%}, {self.elapsed / 60:.1f} minutes"
            )
            self.save()

    def _set_rates(self, factor: float) -> None:
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, self.rates, strict=True):
            group["lr"] = rate * factor


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
