"""(weight, statistics, config) -> integers, scale, zero_point: to nearest, or so that the layer's output errs least.

Every function here is pure tensor arithmetic on one layer. With D the change of the weight, the squared error of the
output is tr(D H D^T), H the second moment of the layer's inputs; nearest rounding takes H for the identity.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor

from fairseq.modules.quantization.packed.config import LinearConfig
from fairseq.modules.quantization.scalar.ops import check_tensor, quantized_range
from fairseq.modules.quantization.scalar.weights import observe_weight, weight_to_int
from fairseq.quantization.config import resolve_rounding

CLIPS = (1.0, 0.9, 0.8)
"""Candidate ranges, as multiples of the one that the method gives."""
DAMPING = 0.3
"""Added to the diagonal of H, as a share of its mean: some hundred pictures leave H uncertain."""
CORRECTION = 0.7
"""How much of the drift of the inputs is made up for."""
BLOCK = 64
SWEEPS = 2


class Statistics(NamedTuple):
    """What a layer's inputs x were on the calibration images, each token with its weight.

    Attributes:
        second_moment: E[x x^T], float32 or float64 (in, in).
        mean: E[x], (in,).
        low, high: the range for one static grid over all x.
        static_sqnr: the signal over the error of x on that grid, in dB.
        drift: E[(x* - x) x^T], (in, in), x* what the layer reads in the float model; None where that is not known.
        drift_mean: E[x* - x], (in,), likewise.
        samples: how many tokens of equal weight tell as much: (sum of the weights)^2 / (sum of their squares).
    """

    second_moment: Tensor
    mean: Tensor
    low: float = 0.0
    high: float = 0.0
    static_sqnr: float = 0.0
    drift: Tensor | None = None
    drift_mean: Tensor | None = None
    samples: float = 1.0


class Rounded(NamedTuple):
    """real = scale * (integers - zero_point); the shapes of ``weights.observe_weight`` and ``weight_to_int``."""

    integers: Tensor
    scale: Tensor
    zero_point: Tensor


def grid_used(config: LinearConfig, rounding: str) -> dict[str, str]:
    """What "method" comes to for a weight, by the names of a report's fields.

    Args:
        config: method and group_size.
        rounding: "nearest", "gptq" or "gptaq", as it was done.

    Returns:
        granularity: what has a scale of its own, "tensor", "channel" or "group".
        range_search: "min-max" for nearest rounding by "channel"; all else takes ranges of "least squared error".
    """
    granularity = "group" if config.group_size is not None else "tensor" if config.method == "tensor" else "channel"
    plain = config.method == "channel" and rounding == "nearest"
    return {"granularity": granularity, "range_search": "min-max" if plain else "least squared error"}


def round_weight(
    weight: Tensor, statistics: Statistics | None, config: LinearConfig, rounding: str = "auto", name: str = "weight"
) -> Rounded:
    """Round a Linear weight to integers.

    Args:
        weight: (out, in), finite.
        statistics: of its inputs, or None.
        config: bits, method, group_size, symmetric.
        rounding: "nearest", "gptq", "gptaq", or "auto": gptaq if there are statistics, else nearest.
        name: how errors call the weight.

    Raises:
        ValueError: the weight is not finite, an unknown rounding, or one that needs statistics without them, or with
            ones of another shape or with NaN.
    """
    chosen = resolve_rounding(rounding, statistics is not None)
    check_tensor(weight, name)
    if statistics is not None:
        expected = (weight.shape[1], weight.shape[1])
        if statistics.second_moment.shape != expected:
            raise ValueError(
                f"{name}: the second moment must be of shape {expected}, got {tuple(statistics.second_moment.shape)}"
            )
        check_tensor(statistics.second_moment, f"{name}: the second moment of its inputs")
        if chosen == "gptaq" and statistics.drift is None:
            if rounding != "auto":
                raise ValueError(f"{name}: rounding='gptaq' needs statistics with the drift of its inputs; got none")
            chosen = "gptq"
    elif chosen != "nearest":
        raise ValueError(f"{name}: rounding={rounding!r} needs calibration images; without them there is 'nearest'")
    return ROUNDINGS[chosen](weight.detach(), statistics, config)


def nearest(weight: Tensor, statistics: Statistics | None, config: LinearConfig) -> Rounded:
    """Each weight to the nearest point of the grid that ``config.method`` observes."""
    scale, zero_point = observe_weight(weight, config.bits, config.method, config.group_size, config.symmetric)
    return Rounded(weight_to_int(weight, scale, zero_point, config.bits, config.group_size), scale, zero_point)


def gptq(weight: Tensor, statistics: Statistics | None, config: LinearConfig) -> Rounded:
    """Column by column, each rounding error made up for by the columns that follow; then single steps downhill.

    Frantar et al., GPTQ (2023, algorithm 1), the columns in the order of falling H_jj; after it coordinate descent on
    tr(D H D^T), which can only lower it. The range is the best of :data:`CLIPS` around the clipped one, for each output
    channel (for the layer with "tensor"). Under the damped H the result never errs more than nearest rounding on that
    clipped range, which it starts from.
    """
    assert statistics is not None
    if config.method == "channel":
        config = dataclasses.replace(config, method="histogram")  # the same granularity, and the range is searched
    start = nearest(weight, None, config)
    h = damped(statistics.second_moment, weight)
    order = torch.argsort(h.diagonal(), descending=True, stable=True)
    h = h.float()[order[:, None], order]
    factor = inverse_factor(h).float()
    w = weight.float().T[order]  # (in, out), the inputs by importance and contiguous, as all below
    scale, zero_point = (_per_weight(p, weight.shape, config.group_size).T[order] for p in start[1:])
    top = quantized_range(config.bits)[1]

    def error(q: Tensor, clip: Tensor) -> Tensor:
        d = (q - zero_point) * (scale * clip) - w
        channels = ((h @ d) * d).sum(0)
        return channels.sum().expand_as(channels) if config.method == "tensor" else channels  # (out,)

    clip = torch.ones(w.shape[1], device=w.device)
    q = start.integers.float().T[order]
    least = error(q, clip)
    for candidate in CLIPS:
        tried = torch.full_like(clip, candidate)
        rounded = _compensate(w, factor, scale * tried, zero_point, top)
        got = error(rounded, tried)
        better = got < least
        q, clip, least = torch.where(better, rounded, q), torch.where(better, tried, clip), torch.minimum(got, least)
    q = _descend(w, q, h, scale * clip, zero_point, top)
    integers = torch.empty_like(q).index_copy_(0, order, q).T.contiguous()
    final = start.scale * (clip[:1] if start.scale.numel() == 1 else clip.view(-1, *[1] * (start.scale.ndim - 1)))
    return Rounded(integers.to(torch.uint8), final, start.zero_point)


def gptaq(weight: Tensor, statistics: Statistics | None, config: LinearConfig) -> Rounded:
    """:func:`gptq` of the weight that makes up for the drift of the inputs, too: see :func:`drift_corrected`."""
    assert statistics is not None
    return gptq(drift_corrected(weight, statistics), statistics, config)


ROUNDINGS: dict[str, Callable[[Tensor, Statistics | None, LinearConfig], Rounded]] = {
    "nearest": nearest,
    "gptq": gptq,
    "gptaq": gptaq,
}


def drift_corrected(weight: Tensor, statistics: Statistics) -> Tensor:
    """The weight, (out, in), whose product with the inputs x comes near that of ``weight`` with the float model's x*.

    The layers before have changed x. E|V x - W x*|^2 is least for V = W + W E[(x* - x) x^T] H^-1 (the aim of Li et al.,
    GPTAQ, 2025; here in closed form before rounding). What some hundred pictures tell of it holds for others in part:
    H is damped by the number of inputs over that of the samples, and the result shrunk to :data:`CORRECTION` of it.
    """
    assert statistics.drift is not None
    wide = torch.promote_types(weight.dtype, statistics.drift.dtype)
    wanted = weight.to(wide) @ statistics.drift.to(wide)
    factor = _cholesky(damped(statistics.second_moment, weight, weight.shape[1] / statistics.samples))
    correction = torch.cholesky_solve(wanted.T.to(factor.dtype), factor).T
    return (weight.to(factor.dtype) + CORRECTION * correction).to(weight.dtype)


def damped(second_moment: Tensor, weight: Tensor, share: float = DAMPING) -> Tensor:
    """H in float64, symmetric, with a ``share`` of its mean added to its diagonal; the identity if all inputs were 0.

    The same for every input channel in the units in which the columns of ``weight``, (out, in), have one norm: so that
    it does not matter how equalization shares a channel's scale between the weight and the input.
    """
    h = (second_moment + second_moment.T).to(torch.float64).mul_(0.5)
    norms = weight.to(torch.float64).square().mean(0)
    norms = norms.clamp(min=1e-3 * float(norms.mean())) if bool((norms > 0).any()) else torch.ones_like(norms)
    mean = (h.diagonal() * norms).mean()
    h.diagonal().add_(share * mean / norms if mean > 0 else 1.0)
    return h


def inverse_factor(h: Tensor) -> Tensor:
    """The upper triangular U with H^-1 = U^T U, float64 (in, in).

    Holds two such matrices at a time: for the widest layers they are what memory peaks with.
    """
    lower = _cholesky(h)
    return torch.linalg.cholesky(torch.cholesky_inverse(lower, out=lower), upper=True)


def _cholesky(h: Tensor) -> Tensor:
    """The lower triangular L with H = L L^T, float64 (in, in); the damping grows tenfold until H can be factorized."""
    h = h.to(torch.float64)
    lower, failed = torch.linalg.cholesky_ex(h)
    more = DAMPING * float(h.diagonal().abs().mean())
    while failed:
        del lower
        firmer = h.clone()
        firmer.diagonal().add_(more)
        lower, failed = torch.linalg.cholesky_ex(firmer)
        more *= 10
    return cast(Tensor, lower)


def _per_weight(parameter: Tensor, shape: torch.Size, group_size: int | None) -> Tensor:
    """A scale or zero point of any of the three shapes as one number per weight, float32 (out, in)."""
    per_row = parameter.float().reshape(-1, 1) if parameter.ndim == 1 else parameter.float()
    if group_size is not None:
        per_row = per_row.repeat_interleave(group_size, dim=1)[:, : shape[1]]
    return per_row.expand(shape)


def _compensate(w: Tensor, factor: Tensor, scale: Tensor, zero_point: Tensor, top: int) -> Tensor:
    """GPTQ's pass over the inputs: integers as floats, (in, out)."""
    w, q = w.clone(), torch.empty_like(w)
    for start in range(0, len(w), BLOCK):
        stop = min(start + BLOCK, len(w))
        block = w[start:stop]
        errors = torch.empty_like(block)
        for j, (s, z) in enumerate(zip(scale[start:stop], zero_point[start:stop], strict=True)):
            integer = (block[j] / s + z).round_().clamp_(0, top)
            q[start + j] = integer
            row = factor[start + j, start + j : stop]
            errors[j] = (block[j] - (integer - z) * s) / row[0]
            block[j:] -= torch.outer(row, errors[j])
        w[stop:] -= factor[start:stop, stop:].T @ errors
    return q


def _descend(w: Tensor, q: Tensor, h: Tensor, scale: Tensor, zero_point: Tensor, top: int) -> Tensor:
    """Coordinate descent: each integer to its best value while the others stay, :data:`SWEEPS` times over them all."""
    q = q.clone()
    gradient = h @ ((q - zero_point) * scale - w)  # half of it, (in, out)
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
                local += torch.outer(inner[j], moves[j])
            gradient += h[:, start:stop] @ moves
    return q
