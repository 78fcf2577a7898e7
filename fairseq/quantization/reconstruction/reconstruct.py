"""Reconstructor: learns the integers of one encoder block after the other on what the float block gives."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fairseq.modules.quantization.scalar.modules.replace import carry_hooks, names_of
from fairseq.modules.quantization.scalar.weights import weight_to_real
from fairseq.quantization.architectures.forward import evaluating
from fairseq.quantization.architectures.observe import Arguments, copied
from fairseq.quantization.architectures.plan import LayerPlan, ModelPlan
from fairseq.quantization.calibration.block_inputs import Stored, first
from fairseq.quantization.calibration.calibration import Calibration
from fairseq.quantization.calibration.precision import products
from fairseq.quantization.calibration.statistics import BATCH_SIZE
from fairseq.quantization.calibration.storage import Storage
from fairseq.quantization.conversion.quantize_stage import replace_layer
from fairseq.quantization.conversion.resume import DoneStage
from fairseq.quantization.reconstruction.learned_linear import LearnedLinear, QuantizedLinear
from fairseq.quantization.reconstruction.settings import Reconstruction
from fairseq.quantization.rounding.quality import weight_statistics

logger = logging.getLogger(__name__)

HELD_BACK = 8
"""Every eighth batch is not learned from; it decides whether what was learned stays."""
TIMED = 3
"""Steps that are timed before the first block, the first of them not counted."""
UNREACHED = "not reconstructed: pictures do not reach its block"
TIED = "not reconstructed: its block shares parameters with another"


class Reconstructor:
    """Block reconstruction of a model that is being quantized, block by block.

    With its layers rounded, a block of the quantized model gets what it reads, and has to come near what the float
    block gives for what *that* reads. Learned are the integers (see :class:`~.learned_linear.LearnedLinear`), scales,
    biases, and the one-dimensional parameters of what stays in float: gains and biases of norms, LayerScale. The loss
    is the squared error of the block's output, each token weighted by how much an error there changes the model's
    output. What was learned stays only if it lowers that error on pictures that were held back. The block runs as
    before: nothing is added to it. Li et al., BRECQ (2021, https://arxiv.org/abs/2102.05426) and, for learning all of a
    block's weights at once, Chen et al., EfficientQAT (2024, https://arxiv.org/abs/2407.11062).

    Args:
        model: the quantized one, which is changed.
        plan: of the float model.
        calibration: whose pictures are used.
        settings: how long and how fast.
        seed: of the order of the pictures.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: ModelPlan,
        calibration: Calibration,
        settings: Reconstruction,
        seed: int,
    ):
        self.model, self.plan, self.calibration, self.settings = model, plan, calibration, settings
        self.half = calibration.half
        self.views = getattr(calibration.inputs.pixel_values, "views", 1)
        self.seed = seed
        self.epochs: int | None = None if settings.minutes is not None else settings.epochs
        self.timed = False

    def blocks(self) -> list[str]:
        """The names of the blocks that can be reconstructed."""
        known = {layer.block for layer in self.plan.chosen if self.plan.reaches(layer.name)}
        names = self.calibration.inputs.blocks
        return [name for name in names if name in known and name not in self.plan.tied_blocks]

    def reconstruct(self, stage: Sequence[LayerPlan], done: DoneStage) -> None:
        """Learn one stage, whose layers are quantized by now.

        Args:
            stage: the chosen layers of one block; of others nothing is learned.
            done: what became of them; it is brought up to date, as the model is.
        """
        name = stage[0].block
        if name is None:
            return
        if name not in self.blocks():
            why = TIED if name in self.plan.tied_blocks else UNREACHED
            for layer in stage:
                record = done.layers[layer.name][0].record
                record["note"] = "; ".join(filter(None, (record["note"], why)))
            return
        learning = [layer for layer in stage if not layer.tied]
        inputs, outputs = self.calibration.inputs.arguments(name), self.calibration.exact_outputs(name)
        weights = _token_weights(self.calibration.weights.get(name), outputs)
        task = _Task(inputs, outputs, weights, self.model, self.half, self.views)
        block = self.model.get_submodule(name)
        with torch.enable_grad():
            learner = _Learner(block, name, learning, done, self.settings)
            if not self.timed:
                self._announce(name, learner, task)
            assert self.epochs is not None
            before = task.error(block, task.held_back)
            number = self.calibration.inputs.blocks.index(name)  # a resumed run makes the same steps
            learner.learn(task, self.epochs, torch.Generator().manual_seed(self.seed + number))
            self.calibration.progress.learned(self.epochs / len(self.blocks()))
        kept = copy.copy(done.layers), {key: x.clone() for key, x in self._parameters(name).items()}
        modules = {layer.name: self.model.get_submodule(layer.name) for layer in learning}
        self._put(learner, name, learning, done)
        after = task.error(self.model.get_submodule(name), task.held_back)
        share = after / before if before > 0 else 1.0
        if not after < before:
            share = 1.0
            done.layers.update(kept[0])
            with torch.no_grad():
                for key, x in self._parameters(name).items():
                    x.copy_(kept[1][key])
            for layer in learning:
                for alias in names_of(self.model, self.model.get_submodule(layer.name)):
                    self.model.set_submodule(alias, modules[layer.name])
        done.parameters |= {key: x.detach().clone() for key, x in self._parameters(name).items()}
        for layer in learning:
            done.layers[layer.name][0].record["reconstructed"] = share
        logger.info("%s: reconstruction left %.0f%% of the error on pictures held back", name, 100 * share)

    def _put(self, learner: _Learner, name: str, learning: Sequence[LayerPlan], done: DoneStage) -> None:
        """Bring what was learned into the model and into ``done``."""
        parameters = self._parameters(name)
        with torch.no_grad():
            for key, x in learner.vectors.items():
                parameters[key].copy_(x)
        for layer in learning:
            twin = learner.layers[layer.name]
            rounded, factor = done.layers[layer.name]
            integers, scale, bias, real, stretch = twin.learned()
            record = dict(rounded.record)
            weight = done.weights.get(layer.name)
            if weight is not None:
                on_grid = weight_to_real(integers, scale, rounded.zero_point, rounded.settings.group_size, scale.dtype)
                record |= weight_statistics(weight, on_grid, per_tensor=rounded.settings.method == "tensor")
            span = rounded.input_range and (stretch * rounded.input_range[0], stretch * rounded.input_range[1])
            new = rounded._replace(integers=integers, scale=scale, bias=bias, input_range=span, record=record)
            done.layers[layer.name] = new, factor
            replace_layer(self.model, layer, new, factor, real)

    def _parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The vectors of a block that are learned, by their names in the model."""
        return _vectors(self.model.get_submodule(name), f"{name}.")

    def _announce(self, name: str, learner: _Learner, task: _Task) -> None:
        """Time some steps, settle the number of epochs, and say how long it is going to take."""
        self.timed = True
        trial = copy.deepcopy(learner)
        steps = task.steps(self.settings.batch_size)
        generator = torch.Generator().manual_seed(0)
        seconds = []
        for _ in range(TIMED):
            started = time.perf_counter()
            trial.step(task, next(task.shuffled(self.settings.batch_size, generator)))
            seconds.append(time.perf_counter() - started)
        left = len(self.blocks()) - self.blocks().index(name)  # a resumed run has done some
        epoch = min(seconds[1:]) * steps * left
        if self.epochs is None:
            assert self.settings.minutes is not None
            self.epochs = max(1, int(60 * self.settings.minutes / epoch))
        self.calibration.progress.learns(self.epochs * left / len(self.blocks()))
        text = (
            f"Reconstruction: {left} block{'s'[: left > 1]}, {self.epochs} epoch{'s'[: self.epochs > 1]} of {steps} "
            f"steps each, about {_duration(epoch * self.epochs)} on this machine"
        )
        logger.info("%s", text)
        self.calibration.progress.say(text)


class _Task:
    """What a block reads and should give, batch by batch, and how much each token counts.

    Args:
        inputs: what the quantized block is called with.
        outputs: what the float block gives, on the float model's way.
        weights: one per token, (tokens,) for each batch; None for 1 everywhere.
        model: where hidden states go.
        half: whether products are in bfloat16.
        views: of each picture, which follow one another; they are held back together.
    """

    def __init__(
        self,
        inputs: Stored,
        outputs: Storage,
        weights: list[Tensor] | None,
        model: nn.Module,
        half: bool,
        views: int = 1,
    ):
        self.inputs, self.outputs, self.weights, self.model, self.half = inputs, outputs, weights, model, half
        count, size = len(inputs), math.lcm(BATCH_SIZE, views) // BATCH_SIZE
        parts = [range(start, min(start + size, count)) for start in range(0, count, size)]  # whole pictures each
        held = parts[HELD_BACK - 1 :: HELD_BACK] or parts[-2:-1]  # the last may be short
        self.held_back = [batch for part in held for batch in part]
        self.learned_from = [i for i in range(count) if i not in self.held_back]

    def steps(self, batch_size: int) -> int:
        """How many steps an epoch has."""
        return -(-len(self.learned_from) // max(1, batch_size // BATCH_SIZE))

    def shuffled(self, batch_size: int, generator: torch.Generator) -> Iterator[list[int]]:
        """One epoch: the numbers of the batches of each step."""
        order = torch.randperm(len(self.learned_from), generator=generator).tolist()
        size = max(1, batch_size // BATCH_SIZE)
        for start in range(0, len(order), size):
            yield [self.learned_from[i] for i in order[start : start + size]]

    def loss(self, block: nn.Module, batch: int) -> Tensor:
        """The weighted squared error of what ``block`` gives for one batch, a mean over its tokens."""
        args, keywords = _as(copied(self.inputs[batch]), block)
        with products(self.model, self.half):
            got = first(block(*args, **keywords))
        wanted = self.outputs[batch]
        error = (got.to(torch.promote_types(got.dtype, torch.float32)) - wanted).square().mean(-1).flatten()
        weights = None if self.weights is None else self.weights[batch]
        return error.mean() if weights is None else (error * weights.to(error.device, error.dtype)).mean()

    @torch.no_grad()
    def error(self, block: nn.Module, batches: Sequence[int]) -> float:
        """The mean of the loss over some batches."""
        with evaluating(block):
            return math.fsum(float(self.loss(block, batch)) for batch in batches) / len(batches)


class _Learner(nn.Module):
    """A float copy of a block whose quantized layers can be learned.

    Args:
        block: it stays as it is.
        name: of it in the model.
        layers: those of it that are learned.
        done: their float weights.
        settings: the rates.
    """

    def __init__(
        self, block: nn.Module, name: str, layers: Sequence[LayerPlan], done: DoneStage, settings: Reconstruction
    ):
        super().__init__()
        self.block = copy.deepcopy(block).eval().requires_grad_(False)
        double = any(p.dtype == torch.float64 for p in self.block.parameters())
        dtype = torch.float64 if double else torch.float32
        self.block.to(dtype)
        self.batch_size = settings.batch_size
        self.layers: dict[str, LearnedLinear] = {}
        for layer in layers:
            inner = layer.name.removeprefix(f"{name}.")
            own = cast(QuantizedLinear, block.get_submodule(inner))
            twin = LearnedLinear(own, done.weights.get(layer.name), dtype)
            carry_hooks(own, twin)
            self.block.set_submodule(inner, twin)
            self.layers[layer.name] = twin
        self.vectors = _vectors(self.block, f"{name}.")
        latents = [twin.latent for twin in self.layers.values()]
        scales = [twin.log_scale for twin in self.layers.values()]
        scales += [twin.log_stretch for twin in self.layers.values() if twin.log_stretch is not None]
        biases = [twin.bias for twin in self.layers.values() if twin.bias is not None]
        groups = [
            {"params": latents, "lr": settings.integer_rate},
            {"params": scales, "lr": settings.scale_rate},
            {"params": [*biases, *self.vectors.values()], "lr": settings.bias_rate},
        ]
        self.groups = [group for group in groups if group["params"] and group["lr"]]
        for parameter in self.learned():
            parameter.requires_grad_(True)
        self.rates = [cast(float, group["lr"]) for group in self.groups]
        self.optimizer = torch.optim.Adam(self.groups, betas=(0.9, 0.99))

    def learn(self, task: _Task, epochs: int, generator: torch.Generator) -> None:
        """All epochs, the rates falling along half a cosine; the best that there was stays, the start included."""
        steps, at = epochs * task.steps(self.batch_size), 0
        least, best = task.error(self.block, task.held_back), [p.detach().clone() for p in self.learned()]
        for _ in range(epochs):
            for batches in task.shuffled(self.batch_size, generator):
                share = 0.5 * (1 + math.cos(math.pi * at / steps))
                for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                    group["lr"] = rate * share
                self.step(task, batches)
                at += 1
            error = task.error(self.block, task.held_back)
            if error < least:
                least, best = error, [p.detach().clone() for p in self.learned()]
        for parameter, value in zip(self.learned(), best, strict=True):
            parameter.data.copy_(value)

    def learned(self) -> list[nn.Parameter]:
        """All parameters that are learned."""
        return [p for group in self.groups for p in cast(list[nn.Parameter], group["params"])]

    def step(self, task: _Task, batches: Sequence[int]) -> None:
        """One step on some batches."""
        self.optimizer.zero_grad()
        for batch in batches:
            (task.loss(self.block, batch) / len(batches)).backward()
        self.optimizer.step()


def _vectors(block: nn.Module, prefix: str) -> dict[str, nn.Parameter]:
    """The one-dimensional parameters of what is no Linear in a block, by name: of norms and LayerScale."""
    found: dict[str, nn.Parameter] = {}
    for name, module in block.named_modules(prefix=prefix[:-1]):
        if not isinstance(module, nn.Linear | LearnedLinear):
            found |= {f"{name}.{key}": p for key, p in module.named_parameters(recurse=False) if p.ndim == 1}
    return found


def _token_weights(weights: Tensor | None, outputs: Storage) -> list[Tensor] | None:
    """The weights of a block's output tokens batch by batch; None if all are 1."""
    if weights is None or not len(weights):
        return None
    sizes = [x.shape[:-1].numel() for x in outputs]
    return list(weights.split(sizes)) if sum(sizes) == len(weights) else None


def _as(arguments: Arguments, block: nn.Module) -> Arguments:
    """Arguments whose floating tensors have the dtype of a block's parameters."""
    dtype = next((p.dtype for p in block.parameters() if p.is_floating_point()), None)

    def cast_(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point() and dtype is not None:
            return value.to(dtype)
        if isinstance(value, tuple) and not hasattr(value, "_fields"):
            return tuple(map(cast_, value))
        return value

    args, keywords = arguments
    return tuple(map(cast_, args)), {key: cast_(value) for key, value in keywords.items()}


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"
