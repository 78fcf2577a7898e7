"""gptq: column by column, each rounding error made up for by the columns that follow."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fairseq.modules.quantization.float_product import float_product
from fairseq.modules.quantization.packed.config import LinearConfig
from fairseq.modules.quantization.scalar.ops import quantized_range
from fairseq.quantization.rounding.nearest import nearest
from fairseq.quantization.rounding.second_moment import damped, inverse_factor
from fairseq.quantization.rounding.statistics import Rounded, Statistics

CLIPS = (1.0, 0.9, 0.8)
"""Candidate ranges, as multiples of the one that the method gives."""
BLOCK = 64
SWEEPS = 2


def gptq(weight: Tensor, statistics: Statistics | None, config: LinearConfig) -> Rounded:
    """Column by column, each rounding error made up for by the columns that follow; then single steps downhill.

    Frantar et al., GPTQ (2023, algorithm 1), the columns in the order of falling H_jj; after it coordinate descent on
    tr(D H D^T), which can only lower it. The range is the best of :data:`CLIPS` around the clipped one, for each output
    channel (for the layer with "tensor"). Under the damped H the result never errs more than nearest rounding on that
    clipped range, which it starts from.
    """
    assert statistics is not None
    return compensated(weight, damped(statistics.second_moment, weight), config)


def compensated(
    weight: Tensor, h: Tensor, config: LinearConfig, first: Tensor | None = None, descends: bool = True
) -> Rounded:
    """What :func:`gptq` does under a second moment that is damped already.

    Args:
        weight: (out, in).
        h: positive definite, float64 (in, in).
        config: bits, method, group_size, symmetric.
        first: (out, in); what is rounded in the place of ``weight`` in the column that :func:`importance` puts first.
            The others make up for that column's distance from ``weight`` all the same.
        descends: single steps downhill follow.
    """
    if config.method == "channel":
        config = dataclasses.replace(config, method="histogram")  # the same granularity, and the range is searched
    start = nearest(weight, None, config)
    order = importance(h)
    h = h.float()[order[:, None], order]
    factor = inverse_factor(h).float()
    w = weight.float().T[order]  # (in, out), the inputs by importance and contiguous, as all below
    scale, zero_point = (per_weight(p, weight.shape, config.group_size).T[order] for p in start[1:])
    top = quantized_range(config.bits)[1]
    head = w[0] if first is None else first.float()[:, order[0]]

    def error(q: Tensor, clip: Tensor) -> Tensor:
        d = (q - zero_point) * (scale * clip) - w
        channels = (float_product(h, d.t()) * d).sum(0)
        return channels.sum().expand_as(channels) if config.method == "tensor" else channels  # (out,)

    clip = torch.ones(w.shape[1], device=w.device)
    q = start.integers.float().T[order]
    least = error(q, clip)
    for candidate in CLIPS:
        tried = torch.full_like(clip, candidate)
        rounded = _compensate(w, head, factor, scale * tried, zero_point, top)
        got = error(rounded, tried)
        better = got < least
        q, clip, least = torch.where(better, rounded, q), torch.where(better, tried, clip), torch.minimum(got, least)
    if descends:
        q = descend(w, q, h, scale * clip, zero_point, top)
    integers = torch.empty_like(q).index_copy_(0, order, q).T.contiguous()
    final = start.scale * (clip[:1] if start.scale.numel() == 1 else clip.view(-1, *[1] * (start.scale.ndim - 1)))
    return Rounded(integers.to(torch.uint8), final, start.zero_point)


def importance(h: Tensor) -> Tensor:
    """The order of the columns, int64 (in,): by falling H_jj."""
    return torch.argsort(h.diagonal(), descending=True, stable=True)


def per_weight(parameter: Tensor, shape: torch.Size, group_size: int | None) -> Tensor:
    """A scale or zero point of any of the three shapes as one number per weight, float32 (out, in)."""
    per_row = parameter.float().reshape(-1, 1) if parameter.ndim == 1 else parameter.float()
    if group_size is not None:
        per_row = per_row.repeat_interleave(group_size, dim=1)[:, : shape[1]]
    return per_row.expand(shape)


def _compensate(w: Tensor, first: Tensor, factor: Tensor, scale: Tensor, zero_point: Tensor, top: int) -> Tensor:
    """GPTQ's pass over the inputs: integers as floats, (in, out); of the first one, ``first``, (out,), is rounded."""
    w, q = w.clone(), torch.empty_like(w)
    for start in range(0, len(w), BLOCK):
        stop = min(start + BLOCK, len(w))
        block = w[start:stop]
        errors = torch.empty_like(block)
        for j, (s, z) in enumerate(zip(scale[start:stop], zero_point[start:stop], strict=True)):
            wanted = block[j] if start + j else first
            integer = (wanted / s + z).round_().clamp_(0, top)
            q[start + j] = integer
            row = factor[start + j, start + j : stop]
            errors[j] = (block[j] - (integer - z) * s) / row[0]
            block[j:] -= torch.outer(row, errors[j])
        w[stop:] -= factor[start:stop, stop:].T @ errors
    return q


def descend(w: Tensor, q: Tensor, h: Tensor, scale: Tensor, zero_point: Tensor, top: int) -> Tensor:
    """Coordinate descent: each integer to its best value while the others stay, :data:`SWEEPS` times over them all."""
    q = q.clone()
    gradient = float_product(h, ((q - zero_point) * scale - w).t())  # half of it, (in, out)
    for _ in range(SWEEPS):
        for start in range(0, len(w), BLOCK):
            stop = min(start + BLOCK, len(w))
            inner, local = h[start:stop, start:stop], gradient[start:stop].clone()
            moves = torch.empty_like(local)
            for j, s in enumerate(scale[start:stop]):
                old = q[start + j]
                new = (old - local[j] / (inner[j, j] * s)).round_().clamp_(0, top)
                moves[j] = (new - old) * s
                q[start + j] = new
                local[j + 1 :] += torch.outer(inner[j, j + 1 :], moves[j])
            gradient += h[:, start:stop] @ moves
    return q
