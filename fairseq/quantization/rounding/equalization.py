"""Exact rescaling of a block's channels, so that those which share one scale, in weight or input, have like ranges.

With r > 0 per channel, y = W x = (W / r) (r x). The factor r goes where it costs nothing: into the LayerNorm that feeds
query, key, value and fc1, and into the value layer's rows for the output projection (attention mixes tokens, not
channels). Where nothing linear comes before, as for fc2 and the classifier, the layer multiplies its input itself.
(Nagel et al., Data-free quantization, 2019, section 4.1; Xiao et al., SmoothQuant, 2023, equation 3; for static inputs
Li et al., RepQ-ViT, 2023, section 3.2.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from fairseq.modules.quantization.scalar.ops import fake_quantize, histogram_range, range_to_qparams
from fairseq.modules.quantization.scalar.tokens import fake_quantize_tokens
from fairseq.modules.quantization.scalar.weights import observe_weight, weight_to_int, weight_to_real
from fairseq.quantization.architectures.blocks import BlockPlan
from fairseq.quantization.config import LayerConfig
from fairseq.quantization.rounding.statistics import Sample

POWERS = (0.25, 0.5, 0.75, 1.0)
"""How much of the channels' ranges is moved; the one with the least error is taken, or none."""
LARGEST = 100.0
"""No factor is above it or below its inverse."""
ROWS = 1024
"""Output channels, evenly spaced, that the search for the factor looks at."""


class Consumer(NamedTuple):
    """A layer that reads the input to be rescaled: what a factor is judged by.

    Attributes:
        weight: (out, in).
        settings: how it is going to be quantized.
        sample: of that input; needed where the settings round it coarsely.
        moments: variance and mean of each channel of that input, (in,) each, or None for 1 and 0; the channels count
            as uncorrelated.
    """

    weight: Tensor
    settings: LayerConfig
    sample: Sample | None = None
    moments: tuple[Tensor, Tensor] | None = None


@torch.no_grad()
def equalize(
    block: nn.Module,
    plan: BlockPlan,
    settings: Mapping[str, LayerConfig],
    samples: Mapping[str, Sample] | None = None,
) -> dict[str, Tensor]:
    """Rescale the layers of one block in place; what the block computes stays the same.

    Args:
        block: of float layers, that was seen to compute what ``plan`` says (see ``architectures.observe.folds``).
        plan: its norms and layers.
        settings: by role, how each layer is going to be quantized; one that is missing stays in float.
        samples: by role, of the layer's input, for those whose settings round it coarsely.

    Returns:
        By role, the factor, (in,), by which the layer's input is multiplied from now on, where it is not 1.
    """
    samples = samples or {}
    layers = {role: cast(nn.Linear, block.get_submodule(path)) for role, path in plan.layers.items()}
    rescaled: dict[str, Tensor] = {}
    for path, roles in plan.norms.items():
        norm = cast(nn.LayerNorm, block.get_submodule(path))
        moments = norm.weight**2, norm.bias  # of gamma x + beta, x ~ N(0, 1)
        consumers = [
            Consumer(layers[role].weight, settings[role], samples.get(role), moments)
            for role in roles
            if role in settings
        ]
        factor = channel_factor(consumers)
        if factor is not None:
            norm.weight.mul_(factor)
            norm.bias.mul_(factor)
            for role in roles:
                layers[role].weight.div_(factor)
                rescaled[role] = factor
    if plan.value_feeds_output:
        value, output = layers["value"], layers["output"]
        after = [Consumer(output.weight, settings["output"], samples.get("output"))] if "output" in settings else []
        before = settings.get("value")
        factor = channel_factor(after, value.weight if before and before.method == "tensor" else None, before)
        if factor is not None:
            output.weight.div_(factor)
            value.weight.mul_(factor[:, None])
            if value.bias is not None:
                value.bias.mul_(factor)
            rescaled["output"] = factor
    return rescaled


@torch.no_grad()
def input_factor(weight: Tensor, settings: LayerConfig, sample: Sample | None = None) -> Tensor | None:
    """The factor r, (in,), by which a layer multiplies its own input, its weight being divided by it; None for 1."""
    return channel_factor([Consumer(weight, settings, sample)])


def channel_factor(
    consumers: list[Consumer], feeding: Tensor | None = None, feeding_settings: LayerConfig | None = None
) -> Tensor | None:
    """r of shape (in,), one for all ``consumers``, whose outputs then err least; None where nothing is better than 1.

    Candidates are powers of the ranges of the weights' input channels, where one scale serves a weight, and inverse
    powers of the largest and of the root mean square magnitude of the input's channels, where one scale serves the
    input. For weights in half precision they are rounded to powers of two, so that rescaling rounds nothing.

    Args:
        consumers: the layers that read the same input.
        feeding: the weight, (in, features), whose rows are multiplied by r to make that input, if one scale serves it.
        feeding_settings: how that one is going to be quantized.
    """
    tiny = torch.finfo(torch.float32).tiny
    dtype = consumers[0].weight.dtype if consumers else feeding.dtype if feeding is not None else torch.float32
    feeding = None if feeding is None else _wide(feeding)
    directions = []
    per_tensor = [_wide(consumer.weight) for consumer in consumers if consumer.settings.method == "tensor"]
    if per_tensor or feeding is not None:
        shared = torch.stack([w.abs().amax(0) / w.abs().max().clamp(min=tiny) for w in per_tensor]) if per_tensor else 1
        ranges = shared.amax(0) if isinstance(shared, Tensor) else torch.ones_like(feeding[:, 0])  # type: ignore[index]
        if feeding is not None:
            ranges = (ranges / feeding.abs().amax(1).clamp(min=tiny)).sqrt()
        directions.append(_normalized(ranges))
    coarse = [(i, r.sample) for i, r in enumerate(consumers) if r.sample is not None and r.settings.rounds_coarsely]
    if coarse:
        samples = list({id(sample): sample for _, sample in coarse}.values())
        tokens, weights = (torch.cat([sample[part] for sample in samples]) for part in (0, 1))
        mean_squares = weights @ tokens.square() / weights.sum()
        directions += [1 / _normalized(tokens.abs().amax(0)), 1 / _normalized(mean_squares.sqrt())]
    if not directions:
        return None

    energies = {i: max(float(_output_energy(consumers[i], sample)), tiny) for i, sample in coarse}

    def error(r: Tensor) -> float:
        total = sum(float(_weight_error(consumer, r)) for consumer in consumers)
        total += sum(float(_input_error(consumers[i], sample, r)) / energies[i] for i, sample in coarse)
        if feeding is not None and feeding_settings is not None:
            total += float(_weight_error(Consumer(feeding.T, feeding_settings), 1 / r))
        return total

    best, least = None, error(torch.ones_like(directions[0]))
    for direction in directions:
        for power in POWERS:
            candidate = direction**power
            if dtype in (torch.float16, torch.bfloat16):
                candidate = candidate.log2().round().exp2()
            if (got := error(candidate)) < least:
                best, least = candidate, got
    return None if best is None else best.to(dtype)


def _normalized(ranges: Tensor) -> Tensor:
    """``ranges`` over their geometric mean, within the limits; an unused channel counts as an average one."""
    used = ranges > 0
    mean = ranges[used].log().mean().exp() if used.any() else ranges.new_ones(())
    return torch.where(used, ranges / mean, 1).clamp(1 / LARGEST, LARGEST)


def _wide(x: Tensor) -> Tensor:
    """In float32, or float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _sampled(weight: Tensor) -> Tensor:
    return _wide(weight[:: max(1, len(weight) // ROWS)])


def _weight_error(consumer: Consumer, factor: Tensor) -> Tensor:
    """E|D x|^2 / E|W x|^2, D the error of the weight rounded to nearest after division by ``factor``."""
    weight, settings = _sampled(consumer.weight), consumer.settings
    scaled = weight / factor
    scale, zero_point = observe_weight(scaled, settings.bits, settings.method, settings.group_size, settings.symmetric)
    integers = weight_to_int(scaled, scale, zero_point, settings.bits, settings.group_size)
    error = weight_to_real(integers, scale, zero_point, settings.group_size) * factor - weight
    return _energy(error, consumer.moments) / _energy(weight, consumer.moments).clamp(
        min=torch.finfo(weight.dtype).tiny
    )


def _energy(weight: Tensor, moments: tuple[Tensor, Tensor] | None) -> Tensor:
    if moments is None:
        return weight.square().sum()
    variance, mean = (moment.to(weight.dtype) for moment in moments)
    return (weight.square() @ variance).sum() + (weight @ mean).square().sum()


def _output_energy(consumer: Consumer, sample: Sample) -> Tensor:
    """E|W x|^2 over the tokens of a sample, as they count."""
    outputs = sample.tokens @ _sampled(consumer.weight).to(sample.tokens.dtype).T
    return sample.weights @ outputs.square().sum(1)


def _input_error(consumer: Consumer, sample: Sample, factor: Tensor) -> Tensor:
    """The same of what rounding the rescaled input changes in the output."""
    tokens, bits = sample.tokens, consumer.settings.activation_bits
    factor = factor.to(tokens.dtype)
    scaled = tokens * factor
    if consumer.settings.activations == "static":
        rounded = fake_quantize(scaled, *range_to_qparams(*histogram_range(scaled, bits), bits), bits)
    else:
        rounded = fake_quantize_tokens(scaled, bits)
    error = ((rounded - scaled) / factor) @ _sampled(consumer.weight).to(tokens.dtype).T
    return sample.weights @ error.square().sum(1)
