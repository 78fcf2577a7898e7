"""Learner: a float copy of a block whose quantized layers are learned by gradient descent."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from fairseq.modules.quantization.scalar.modules.replace import carry_hooks
from fairseq.quantization.architectures.plan import LayerPlan
from fairseq.quantization.conversion.resume import DoneStage
from fairseq.quantization.reconstruction.learned_linear import LearnedLinear, QuantizedLinear
from fairseq.quantization.reconstruction.settings import Rates
from fairseq.quantization.reconstruction.task import Task


class Learner(nn.Module):
    """A float copy of a block whose quantized layers can be learned.

    Args:
        block: it stays as it is.
        name: of it in the model.
        layers: those of it that are learned.
        done: their float weights.
        rates: of its steps.
    """

    def __init__(self, block: nn.Module, name: str, layers: Sequence[LayerPlan], done: DoneStage, rates: Rates):
        super().__init__()
        self.block = copy.deepcopy(block).eval().requires_grad_(False)
        double = any(p.dtype == torch.float64 for p in self.block.parameters())
        dtype = torch.float64 if double else torch.float32
        self.block.to(dtype)
        self.batch_size = rates.batch_size
        self.layers: dict[str, LearnedLinear] = {}
        for layer in layers:
            inner = layer.name.removeprefix(f"{name}.")
            own = cast(QuantizedLinear, block.get_submodule(inner))
            twin = LearnedLinear(own, done.weights.get(layer.name), dtype)
            carry_hooks(own, twin)
            self.block.set_submodule(inner, twin)
            self.layers[layer.name] = twin
        self.vectors = vectors(self.block, f"{name}.")
        latents = [twin.latent for twin in self.layers.values()]
        scales = [twin.log_scale for twin in self.layers.values()]
        scales += [twin.log_stretch for twin in self.layers.values() if twin.log_stretch is not None]
        biases = [twin.bias for twin in self.layers.values() if twin.bias is not None]
        groups = [
            {"params": latents, "lr": rates.integer_rate},
            {"params": scales, "lr": rates.scale_rate},
            {"params": [*biases, *self.vectors.values()], "lr": rates.bias_rate},
        ]
        self.groups = [group for group in groups if group["params"] and group["lr"]]
        for parameter in self.learned():
            parameter.requires_grad_(True)
        self.highest = [cast(float, group["lr"]) for group in self.groups]
        self.optimizer = torch.optim.Adam(self.groups, betas=(0.9, 0.99))

    def learn(self, task: Task, epochs: int, generator: torch.Generator) -> float:
        """All epochs, the rates falling along half a cosine; the best that there was stays, the start included.

        Returns:
            The error on pictures held back that is left.
        """
        steps, at = epochs * task.steps(self.batch_size), 0
        least, best = task.error(self.block, task.held_back), [p.detach().clone() for p in self.learned()]
        for _ in range(epochs):
            for batches in task.shuffled(self.batch_size, generator):
                share = 0.5 * (1 + math.cos(math.pi * at / steps))
                for group, rate in zip(self.optimizer.param_groups, self.highest, strict=True):
                    group["lr"] = rate * share
                self.step(task, batches)
                at += 1
            error = task.error(self.block, task.held_back)
            if error < least:
                least, best = error, [p.detach().clone() for p in self.learned()]
        for parameter, value in zip(self.learned(), best, strict=True):
            parameter.data.copy_(value)
        return least

    def learned(self) -> list[nn.Parameter]:
        """All parameters that are learned."""
        return [p for group in self.groups for p in cast(list[nn.Parameter], group["params"])]

    def step(self, task: Task, batches: Sequence[int]) -> None:
        """One step on some batches."""
        self.optimizer.zero_grad()
        for batch in batches:
            (task.loss(self.block, batch) / len(batches)).backward()
        self.optimizer.step()


def vectors(block: nn.Module, prefix: str) -> dict[str, nn.Parameter]:
    """The one-dimensional parameters of what is no Linear in a block, by name: of norms and LayerScale."""
    found: dict[str, nn.Parameter] = {}
    for name, module in block.named_modules(prefix=prefix[:-1]):
        if not isinstance(module, nn.Linear | LearnedLinear):
            found |= {f"{name}.{key}": p for key, p in module.named_parameters(recurse=False) if p.ndim == 1}
    return found
