"""Reconstructor: learns the integers of one encoder block after the other on what the float block gives."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Sequence

import torch
from torch import nn

from fairseq.modules.quantization.scalar.modules.replace import names_of
from fairseq.modules.quantization.scalar.weights import weight_to_real
from fairseq.quantization.architectures.plan import LayerPlan, ModelPlan
from fairseq.quantization.calibration.calibration import Calibration
from fairseq.quantization.conversion.quantize_stage import replace_layer
from fairseq.quantization.conversion.resume import DoneStage
from fairseq.quantization.reconstruction.learner import Learner, vectors
from fairseq.quantization.reconstruction.settings import Reconstruction, learned_blocks
from fairseq.quantization.reconstruction.task import Task, token_weights
from fairseq.quantization.rounding.quality import weight_statistics

logger = logging.getLogger(__name__)

TIMED = 3
"""Steps that are timed before the first block, the first of them not counted."""
SLOWER = 0.125
"""The integer rate of a second attempt, as a share of the first one's."""
WORTH = 0.99
"""The share of the error that a first attempt may leave at most; else there is a second."""
UNREACHED = "not reconstructed: pictures do not reach its block"
TIED = "not reconstructed: its block shares parameters with another"


class Reconstructor:
    """Block reconstruction of a model that is being quantized, block by block.

    With its layers rounded, a block of the quantized model gets what it reads, and has to come near what the float
    block gives for what *that* reads. Learned are the integers (see :class:`~.learned_linear.LearnedLinear`), scales,
    biases, and the one-dimensional parameters of what stays in float: gains and biases of norms, LayerScale. The loss
    is the squared error of the block's output, each token weighted by how much an error there changes the model's
    output. What was learned stays only if it lowers that error on pictures that were held back; where it hardly does,
    the block learns once more, its integers slowly. The block runs as before: nothing is added to it. Li et al., BRECQ
    (2021, https://arxiv.org/abs/2102.05426) and, for learning all of a block's weights at once, Chen et al.,
    EfficientQAT (2024, https://arxiv.org/abs/2407.11062).

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
        self.twice = settings.minutes is None  # minutes have no time for second attempts
        self.half = calibration.half
        self.views = getattr(calibration.inputs.pixel_values, "views", 1)
        self.seed = seed
        self.blocks = learned_blocks(plan)
        self.epochs: int | None = None if settings.minutes is not None else settings.epochs
        self.timed = False

    def reconstruct(self, stage: Sequence[LayerPlan], done: DoneStage) -> None:
        """Learn one stage, whose layers are quantized by now.

        Args:
            stage: the chosen layers of one block; of others nothing is learned.
            done: what became of them; it is brought up to date, as the model is.
        """
        name = stage[0].block
        if name is None:
            return
        if name not in self.blocks:
            why = TIED if name in self.plan.tied_blocks else UNREACHED
            for layer in stage:
                record = done.layers[layer.name][0].record
                record["note"] = "; ".join(filter(None, (record["note"], why)))
            return
        learning = [layer for layer in stage if not layer.tied]
        inputs, outputs = self.calibration.inputs.arguments(name), self.calibration.exact_outputs(name)
        weights = token_weights(self.calibration.weights.get(name), outputs)
        task = Task(inputs, outputs, weights, self.model, self.half, self.views)
        block = self.model.get_submodule(name)
        with torch.enable_grad():
            if not self.timed:
                rates = self.settings.rates(learning, 1, task.steps)
                self._announce(name, Learner(block, name, learning, done, rates), task)
            assert self.epochs is not None
            rates = self.settings.rates(learning, self.epochs, task.steps)
            learner = Learner(block, name, learning, done, rates)
            before = task.error(block, task.held_back)
            number = self.calibration.inputs.blocks.index(name)  # a resumed run makes the same steps
            left = learner.learn(task, self.epochs, torch.Generator().manual_seed(self.seed + number))
            if self.twice and not left < WORTH * before:
                slower = rates._replace(integer_rate=SLOWER * rates.integer_rate)
                slow = Learner(block, name, learning, done, slower)
                if slow.learn(task, self.epochs, torch.Generator().manual_seed(self.seed + number)) < left:
                    learner = slow
            self.calibration.progress.learned(self.epochs / len(self.blocks))
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

    def _put(self, learner: Learner, name: str, learning: Sequence[LayerPlan], done: DoneStage) -> None:
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
        return vectors(self.model.get_submodule(name), f"{name}.")

    def _announce(self, name: str, trial: Learner, task: Task) -> None:
        """Time some steps of ``trial``, settle the number of epochs, and say how long it is going to take."""
        self.timed = True
        steps = task.steps(trial.batch_size)
        generator = torch.Generator().manual_seed(0)
        seconds = []
        for _ in range(TIMED):
            started = time.perf_counter()
            trial.step(task, next(task.shuffled(trial.batch_size, generator)))
            seconds.append(time.perf_counter() - started)
        left = len(self.blocks) - self.blocks.index(name)  # a resumed run has done some
        epoch = min(seconds[1:]) * steps * left
        if self.epochs is None:
            assert self.settings.minutes is not None
            self.epochs = max(1, int(60 * self.settings.minutes / epoch))
        self.calibration.progress.learns(self.epochs * left / len(self.blocks))
        text = (
            f"Reconstruction: {left} block{'s'[: left > 1]}, {self.epochs} epoch{'s'[: self.epochs > 1]} each, "
            f"about {_duration(epoch * self.epochs)} on this machine"
            f"{', more where a block learns twice' if self.twice else ''}"
        )
        logger.info("%s", text)
        self.calibration.progress.say(text)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"
