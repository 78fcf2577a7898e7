"""Calibration: what pictures tell of the inputs of each layer, as the layers before it are quantized."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fairseq.modules.quantization.scalar.tokens import fake_quantize_tokens
from fairseq.quantization.architectures.forward import Pixels
from fairseq.quantization.architectures.plan import LayerPlan, ModelPlan
from fairseq.quantization.calibration import processes
from fairseq.quantization.calibration.block_inputs import BlockInputs
from fairseq.quantization.calibration.output_moments import OutputMoments
from fairseq.quantization.calibration.precision import multiplies_in_half
from fairseq.quantization.calibration.progress import Progress
from fairseq.quantization.calibration.statistics import BATCH_SIZE, collect
from fairseq.quantization.calibration.storage import Storage
from fairseq.quantization.calibration.token_weights import token_weights
from fairseq.quantization.config import (
    MAKE_UP_FOR_BLOCK,
    MAKE_UP_FOR_DRIFT,
    TRIED_OUT,
    TWO_SIDED,
    TWO_SIDED_BITS,
    TWO_SIDED_WEIGHTS,
    resolve_rounding,
)
from fairseq.quantization.rounding.statistics import Sample, Statistics


class Calibration:
    """Pictures on their way through a model that is being quantized, and through the float one beside it.

    Temporary files hold the hidden states of all pictures at one place of each model and what the float model's current
    block reads, beyond some megabytes; memory holds the statistics of the layers that are being rounded. Labels are
    never needed.

    Args:
        model: the float model.
        result: its copy that is being quantized, stage by stage.
        plan: of the model.
        pixel_values: (N, C, H, W).
        seed: of the token weights.
        progress: is told what is done.
        follow: makes the ``BlockInputs`` of what is being quantized.
        kept: the token weights, and what errors of outputs count, if they are known.
        blocks: also weigh the outputs of the blocks, and follow the float model in any case.
        all_widths: layers may be rounded to fewer bits than the plan says, too.
    """

    def __init__(
        self,
        model: nn.Module,
        result: nn.Module,
        plan: ModelPlan,
        pixel_values: Pixels,
        seed: int,
        progress: Progress,
        follow: Callable[[nn.Module, nn.Module, Any, list[str]], BlockInputs] = BlockInputs,
        kept: tuple[dict[str, Tensor], OutputMoments] | None = None,
        blocks: bool = False,
        all_widths: bool = False,
    ):
        self.plan, self.progress, names = plan, progress, plan.blocks()
        self.half = multiplies_in_half(model)
        self.halves = BATCH_SIZE % getattr(pixel_values, "views", 1) == 0  # else both would have views of one picture
        reached = [layer.name for layer in plan.chosen if plan.reaches(layer.name)]
        reached += names if blocks else []
        two_sided = [x for x in plan.chosen if x.name in reached and _two_sided(x, model, all_widths)]
        self.moments = OutputMoments([layer.name for layer in two_sided], self.half)
        late = [layer.name for layer in two_sided if layer.block in names[len(names) // 2 :]]
        if kept is None:
            self.weights = token_weights(model, pixel_values, reached, seed, progress.weighted, self.moments.add, late)
            self.moments.finish()
        else:
            progress.weighted(progress.pictures)
            self.weights, self.moments = kept
        self.inputs = follow(model, result, pixel_values, names)
        exact = blocks or any(_rounds_by(layer, MAKE_UP_FOR_DRIFT) for layer in plan.chosen)
        self.exact_inputs = BlockInputs(model, model, pixel_values, names) if exact else None

    def enter(self, stage: Sequence[LayerPlan]) -> None:
        """Go to the entrance of a stage's block; those before it are final by now."""
        block = stage[0].block
        if block is not None and block in self.inputs.blocks:
            self.inputs.advance_to(block)
            if self.exact_inputs is not None:
                sources = {layer.source for layer in stage if self.plan.reaches(layer.name)}
                self.exact_inputs.pass_through(block, sorted(s for s in sources if s.startswith(f"{block}.")))

    def exact_outputs(self, block: str) -> Storage:
        """What the float block gives on the float model's way, batch by batch, after :meth:`enter`."""
        assert self.exact_inputs is not None
        return self.exact_inputs.outputs(block)

    def samples(self, layers: Sequence[LayerPlan]) -> dict[str, Sample]:
        """By name, some of the inputs of those layers that are going to round them coarsely.

        A token counts as much as it does for the layers that read it, on average.
        """
        readers: dict[str, list[LayerPlan]] = {}  # by source: layers that read one tensor
        for layer in layers:
            if self.plan.reaches(layer.name) and layer.settings.rounds_coarsely:
                readers.setdefault(layer.source, []).append(layer)
        found: dict[str, Sample] = {}
        for together in readers.values():
            known = [w for layer in together if len(w := self.weights[layer.name])]
            weights = torch.stack(known).sum(0) + (len(together) - len(known)) if known else None  # 1 of the others
            sample = self.inputs.sample(together[0].name, None if weights is None else weights / len(together))
            found |= {layer.name: sample for layer in together}
        return found

    def statistics(
        self,
        layers: Sequence[LayerPlan],
        factor: Tensor | None = None,
        moved: Tensor | None = None,
        ends_block: bool = False,
    ) -> list[Statistics | None]:
        """What each of some layers reads, which are called with one tensor and round it alike.

        Args:
            layers: at least one.
            factor: (in,), by which they multiply their input themselves.
            moved: (in,), by which their input is multiplied in comparison with the float model's.
            ends_block: it is one layer, the last of its block, all others of which are rounded by now.
        """
        first = layers[0]
        if not self.plan.reaches(first.name):
            return [None] * len(layers)
        if ends_block and self._makes_up_for_block(first):
            return self._with_moments(layers, self._with_missing(first, factor))
        inputs = (_read(x, first, factor) for x in self.inputs.inputs(first.name))
        exact = None
        if self.exact_inputs is not None and any(_rounds_by(layer, MAKE_UP_FOR_DRIFT) for layer in layers):
            exact = _scaled(self.exact_inputs.inputs(first.source), moved)
        bits = first.settings.activation_bits if first.settings.activations == "static" else None
        names = [layer.name for layer in layers]
        weights = [self.weights[name] for name in names]
        tried = self.halves and any(_rounds_by(layer, TRIED_OUT) for layer in layers)
        read = self.progress.reading(inputs, layers)
        found = collect(read, weights, names, bits, exact, self.half, halves=tried)
        found = [
            one if layer.corrected else one._replace(drift=None, drift_mean=None, halves=None)
            for layer, one in zip(layers, found, strict=True)
        ]
        return self._with_moments(layers, found)

    def _with_moments(self, layers: Sequence[LayerPlan], found: list[Statistics]) -> list[Statistics | None]:
        """The same with the moments of the layers' outputs."""
        return [one._replace(outputs=self.moments.of(layer.name)) for layer, one in zip(layers, found, strict=True)]

    def _makes_up_for_block(self, layer: LayerPlan) -> bool:
        """Whether a layer can give what its block is missing: it is known, and the block adds its output last."""
        return (
            self.exact_inputs is not None
            and self.exact_inputs.chained
            and type(self.inputs) is BlockInputs
            and _rounds_by(layer, MAKE_UP_FOR_BLOCK)
            and processes.first(self.inputs.ends_with(layer.name))
        )

    def _with_missing(self, layer: LayerPlan, factor: Tensor | None) -> list[Statistics]:
        """The statistics of the layer that ends a block, with what the block is missing."""
        assert self.exact_inputs is not None
        exact, through = (
            iter(self.exact_inputs.stored.hidden),
            self.inputs.through(layer.name, lambda x: _read(x, layer, factor).to(x.dtype)),
        )
        less: list[Tensor] = []  # of the batch that was read last

        def read() -> Iterator[Tensor]:
            for x, y in through:
                less.append(next(exact).flatten(0, -2).to(y.device, torch.float32) - y.float())
                del y
                yield x
                del x

        missing = (less.pop() for _ in itertools.count())
        inputs = self.progress.reading(read(), [layer])
        bits = layer.settings.activation_bits if layer.settings.activations == "static" else None
        return collect(inputs, [self.weights[layer.name]], [layer.name], bits, None, self.half, missing, self.halves)


def _read(x: Tensor, layer: LayerPlan, factor: Tensor | None) -> Tensor:
    """What a layer multiplies of its input: times its factor, and rounded where that is coarse and for each token."""
    if factor is not None:
        x = x * factor
    if layer.settings.rounds_coarsely and layer.settings.activations == "dynamic":
        x = fake_quantize_tokens(x, layer.settings.activation_bits)
    return x


def _two_sided(layer: LayerPlan, model: nn.Module, all_widths: bool) -> bool:
    """Whether a layer's rounding looks at its outputs, too: that of a block, whose outputs are no classes."""
    settings = layer.settings
    chosen = resolve_rounding(settings.rounding, True, settings.bits, settings.method)
    if layer.block is None or chosen not in TWO_SIDED or not (all_widths or settings.bits <= TWO_SIDED_BITS):
        return False
    by_name = settings.rounding != "auto" and layer.corrected  # where blocks are going to learn "auto" is resolved
    return by_name or model.get_submodule(layer.name).get_parameter("weight").numel() <= TWO_SIDED_WEIGHTS


def _rounds_by(layer: LayerPlan, roundings: Sequence[str]) -> bool:
    """Whether a layer's rounding, with pictures, is one of these, which make up for what was done before it."""
    settings = layer.settings
    return layer.corrected and resolve_rounding(settings.rounding, True, settings.bits, settings.method) in roundings


def _scaled(inputs: Iterator[Tensor], factor: Tensor | None) -> Iterator[Tensor]:
    return inputs if factor is None else (x * factor for x in inputs)
