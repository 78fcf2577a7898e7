"""Exact rescaling of a ViT block, so that its weights' input channels have ranges alike before they share one scale.

With r > 0 per channel, y = W x = (W / r) (r x). The factor r goes where it costs nothing: into the LayerNorm that feeds
query, key, value and fc1, and into the value layer's rows for the output projection (attention mixes tokens, not
channels). Where nothing linear comes before, as for fc2 and the classifier, the layer multiplies its input itself.
(Nagel et al., Data-free quantization, 2019, section 4.1; Xiao et al., SmoothQuant, 2023, equation 3.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq.modules.quantization.scalar.weights import observe_weight, weight_to_int, weight_to_real
from fairseq.quantization.vit_layers import Wiring

POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""How much of a channel's range is moved out of the weight; the one with the least error is taken."""
LARGEST = 100.0
"""No factor is above it or below its inverse."""


@torch.no_grad()
def equalize(wiring: Wiring, bits: dict[str, int]) -> None:
    """Rescale the layers of one block in place; what the block computes stays the same.

    Args:
        wiring: the block's LayerNorms and Linear layers (see ``vit_layers.wiring``).
        bits: by role, the width that each layer is going to be rounded to; a role that is missing counts as 8.
    """
    for norm, roles in wiring.norms:
        layers = [wiring.layers[role] for role in roles]
        moment = torch.diag(norm.weight**2) + torch.outer(norm.bias, norm.bias)  # of gamma x + beta, x ~ N(0, 1)
        widths = [bits.get(role, 8) for role in roles]
        factor = channel_factor([layer.weight for layer in layers], [moment] * len(layers), widths)
        norm.weight.mul_(factor)
        norm.bias.mul_(factor)
        for layer in layers:
            layer.weight.div_(factor)
    if wiring.value_feeds_output:
        value, output = wiring.layers["value"], wiring.layers["output"]
        ranges = output.weight.abs().amax(0) / value.weight.abs().amax(1).clamp(
            min=torch.finfo(value.weight.dtype).tiny
        )
        factor = _best_power(
            _normalized(ranges).sqrt(),
            lambda r: (
                _error(output.weight, r, None, bits.get("output", 8))
                + _error(value.weight.T, 1 / r, None, bits.get("value", 8))
            ),
        )
        output.weight.div_(factor)
        value.weight.mul_(factor[:, None])
        if value.bias is not None:
            value.bias.mul_(factor)


@torch.no_grad()
def input_factor(weight: Tensor, bits: int) -> Tensor:
    """The factor r, (in,), by which a layer multiplies its own input, its weight being divided by it."""
    return channel_factor([weight], [None], [bits])


def channel_factor(weights: list[Tensor], moments: list[Tensor | None], bits: list[int]) -> Tensor:
    """r of shape (in,), one for all the ``weights`` (out, in), whose outputs then err least when rounded per tensor.

    Args:
        weights: the layers that read the same input.
        moments: the second moment of that input, (in, in), or None for the identity, one for each weight.
        bits: the width of each.
    """
    largest = torch.stack([w.abs().amax(0) / w.abs().max().clamp(min=torch.finfo(w.dtype).tiny) for w in weights])
    cases = list(zip(weights, moments, bits, strict=True))
    return _best_power(_normalized(largest.amax(0)), lambda r: sum(_error(w, r, h, b) for w, h, b in cases))


def _best_power(ranges: Tensor, error) -> Tensor:  # type: ignore[no-untyped-def]
    """``ranges`` to that of :data:`POWERS` that ``error`` finds best."""
    candidates = [ranges**power for power in POWERS]
    return min(candidates, key=lambda r: float(error(r)))


def _normalized(ranges: Tensor) -> Tensor:
    """``ranges`` over their geometric mean, within the limits; an unused channel counts as an average one."""
    used = ranges > 0
    mean = ranges[used].log().mean().exp() if used.any() else ranges.new_ones(())
    return torch.where(used, ranges / mean, 1).clamp(1 / LARGEST, LARGEST)


def _error(weight: Tensor, factor: Tensor, moment: Tensor | None, bits: int) -> Tensor:
    """tr(D H D^T) / tr(W H W^T), D the error of ``weight`` rounded with one scale after division by ``factor``."""
    scaled = weight / factor
    scale, zero_point = observe_weight(scaled, bits, "tensor")
    d = weight_to_real(weight_to_int(scaled, scale, zero_point, bits), scale, zero_point) * factor - weight
    energy = [(m * m).sum() if moment is None else ((m @ moment) * m).sum() for m in (d, weight)]
    return energy[0] / energy[1].clamp(min=torch.finfo(weight.dtype).tiny)
