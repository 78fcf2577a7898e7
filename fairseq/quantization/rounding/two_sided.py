"""two_sided: integers once more, each output's error made up for by the outputs that follow, as columns do by GPTQ."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq.modules.quantization.float_product import float_product
from fairseq.modules.quantization.packed.config import LinearConfig
from fairseq.modules.quantization.scalar.ops import quantized_range
from fairseq.quantization.config import TWO_SIDED_BITS
from fairseq.quantization.rounding.gptq import BLOCK, importance, per_weight
from fairseq.quantization.rounding.second_moment import inverse_factor
from fairseq.quantization.rounding.statistics import OutputMoment, Rounded

DAMPING = 0.1
"""Added to the diagonal of G, as a share of its mean, beside the number of outputs over that of the samples."""
OUTPUTS = 8
"""Outputs that are rounded together; they make up for those before, and not for one another."""
INPUTS = 16
"""Columns from one look at the outputs before to the next."""
SETS, SWEEPS = 16, 2
"""Into how many sets, each spread over all outputs, they are divided for single steps downhill, as those of a set move
together; and how often all integers are gone through."""


def two_sided(weight: Tensor, h: Tensor, start: Rounded, config: LinearConfig, outputs: OutputMoment | None) -> Rounded:
    """Round to the grid of ``start`` so that tr(G D H D^T) is small, D the change of ``weight``, (out, in).

    H says which errors of the inputs' sums meet, and G, the second moment of the gradient at the layer's outputs, which
    errors of outputs add up behind it, and which cancel: of keys, for example, only what queries see of them. With
    G = (I + M)^T C (I + M), M below the diagonal and C on it, each output is rounded as by GPTQ under H towards what
    makes up for the outputs before it, its row of W - M D. Single steps of the integers follow where that helped.
    (Tseng et al., Model-Preserving Adaptive Rounding, 2025, arXiv 2505.22988, rounds a weight under two such factors.)

    Args:
        weight: (out, in), what is to be rounded.
        h: positive definite, damped, (in, in).
        start: integers, scales and zero points, as by another rounding. Scales and zero points stay.
        config: bits and group_size.
        outputs: of the layer; None for ``start`` as it is, as beyond 7 bits.

    Returns:
        ``start`` with other integers for those blocks of outputs where that makes the sum smaller.
    """
    if outputs is None or config.bits > TWO_SIDED_BITS:
        return start
    order = importance(h)
    h = h.float()[order[:, None], order]
    factor = inverse_factor(h).float()
    scale, zero_point = (per_weight(p, weight.shape, config.group_size)[:, order] for p in start[1:])
    w, integers = weight.float()[:, order], start.integers.float()[:, order]
    top, at = quantized_range(config.bits)[1], 0
    for moment in outputs.blocks:
        here = slice(at, at + len(moment))
        at = here.stop
        g = moment.to(h.device, torch.float64)
        if not g.diagonal().mean() > 0:  # no error of these outputs is felt
            continue
        g = g + (DAMPING + len(g) / outputs.samples) * g.diagonal().mean() * torch.eye(len(g)).to(g)
        grid = scale[here], zero_point[here]

        def error(q: Tensor, g: Tensor = g, here: slice = here, grid: tuple[Tensor, Tensor] = grid) -> float:
            change = (q - grid[1]) * grid[0] - w[here]
            return float((g * float_product(float_product(change, h), change)).sum())

        found, least = _rounded(w[here], g, factor, *grid, top), error(integers[here])
        for left in range(SWEEPS, -1, -1):
            if not (got := error(found)) < least:
                break
            integers[here], least = found, got
            if left:
                found = _downhill(w[here], found, g.float(), h, *grid, top)
    return start._replace(integers=torch.empty_like(integers).index_copy_(1, order, integers).to(torch.uint8))


def _rounded(w: Tensor, g: Tensor, factor: Tensor, scale: Tensor, zero_point: Tensor, top: int) -> Tensor:
    """Integers as floats, (out, in), under one block of G; the columns come in order, the outputs by falling G_ii.

    The outputs are taken in groups, and the columns in panels. A group's panel needs the panels before it in the group,
    and its own panel in the groups before. So all pairs of a group and a panel that lie on one diagonal are rounded
    together, in batches: as many steps as there are groups and panels, instead of their product.
    """
    order = torch.argsort(g.diagonal(), descending=True, stable=True)
    g = g[order[:, None], order]
    lower = torch.linalg.cholesky(g.flip(0, 1)).flip(0, 1).T  # G = lower^T lower
    inputs, groups, panels = w.shape[1], -(-len(w) // OUTPUTS), -(-w.shape[1] // INPUTS)
    rows, columns = groups * OUTPUTS - len(w), panels * INPUTS - inputs
    lower = _padded(lower, rows)
    factor = _padded(factor, columns)
    wanted, scale, zero_point = (
        F.pad(x[order], (0, columns, 0, rows), value=value)  # (groups, columns, OUTPUTS)
        .view(groups, OUTPUTS, -1)
        .transpose(1, 2)
        .contiguous()
        for x, value in ((w, 0.0), (scale, 1.0), (zero_point, 0.0))
    )
    shares = [_share(lower, group).to(w.dtype) for group in range(groups)]
    corners = torch.stack([factor[at : at + INPUTS, at : at + INPUTS] for at in range(0, len(factor), INPUTS)])
    left, q = wanted.clone(), torch.empty_like(wanted)
    change = wanted.new_zeros(len(factor), groups * OUTPUTS)
    for diagonal in range(groups + panels - 1):
        first, last = max(0, diagonal - panels + 1), min(groups, diagonal + 1)
        starts = ((group, (diagonal - group) * INPUTS) for group in range(first, last))
        pairs = [(group, slice(at, at + INPUTS)) for group, at in starts]
        work = torch.stack([left[k, at] - change[at, : k * OUTPUTS] @ shares[k] for k, at in pairs])
        steps, zeros = (torch.stack([x[k, at] for k, at in pairs]) for x in (scale, zero_point))
        corner = corners[[diagonal - k for k, _ in pairs]]
        found, errors = _panel(work, corner, steps, zeros, top)
        moved = (found - zeros) * steps
        for i, (k, at) in enumerate(pairs):
            q[k, at] = found[i]
            change[at, k * OUTPUTS : (k + 1) * OUTPUTS] = moved[i] - wanted[k, at]
            left[k, at.stop :] -= factor[at, at.stop :].T @ errors[i]
    flat = q.transpose(1, 2).reshape(groups * OUTPUTS, -1)[: len(w), :inputs]
    return torch.empty_like(flat).index_copy_(0, order, flat)


def _downhill(w: Tensor, q: Tensor, g: Tensor, h: Tensor, scale: Tensor, zero_point: Tensor, top: int) -> Tensor:
    """Each integer to its best value while those of other sets and columns stay, once over all: (out, in)."""
    q, scale = q.T.contiguous(), scale.T.contiguous()  # (in, out)
    gradient = float_product(float_product(h, ((q - zero_point.T) * scale).t() - w), g)  # half of it
    sets = [slice(first, None, SETS) for first in range(min(SETS, len(g)))]
    rows, curvature = [g[own].contiguous() for own in sets], g.diagonal()
    for start in range(0, len(h), BLOCK):
        here = slice(start, start + BLOCK)
        inner, local = h[here, here], gradient[here].clone()
        moves = torch.zeros_like(local)
        for j, (slope, moved) in enumerate(zip(local, moves, strict=True)):
            integers, step, along = q[start + j], scale[start + j], inner[j, j]
            for own, row in zip(sets, rows, strict=True):
                new = (integers[own] - slope[own] / (along * curvature[own] * step[own])).round_().clamp_(0, top)
                moved[own] = (new - integers[own]) * step[own]
                integers[own] = new
                slope += along * (moved[own] @ row)
            local[j + 1 :] += torch.outer(inner[j, j + 1 :], moved @ g)
        gradient += h[:, here] @ (moves @ g)
    return q.T


def _panel(work: Tensor, corner: Tensor, scale: Tensor, zero_point: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """GPTQ within panels, (pairs, columns, outputs): integers, and the errors that later columns make up for."""
    q, errors = torch.empty_like(work), torch.empty_like(work)
    for j in range(work.shape[1]):
        s, z, row = scale[:, j], zero_point[:, j], corner[:, j, j:]
        integer = (work[:, j] / s + z).round_().clamp_(0, top)
        q[:, j] = integer
        errors[:, j] = (work[:, j] - (integer - z) * s) / row[:, :1]
        work[:, j:] -= row[:, :, None] * errors[:, j, None]
    return q, errors


def _share(lower: Tensor, group: int) -> Tensor:
    """What a group of outputs makes up for of the change of those before: (those before, OUTPUTS)."""
    here, before = slice(group * OUTPUTS, (group + 1) * OUTPUTS), slice(0, group * OUTPUTS)
    return torch.linalg.solve_triangular(lower[here, here], lower[here, before], upper=False).T


def _padded(square: Tensor, more: int) -> Tensor:
    """With so many more rows and columns of the identity."""
    padded = F.pad(square, (0, more, 0, more))
    padded.diagonal()[len(square) :] = 1
    return padded
