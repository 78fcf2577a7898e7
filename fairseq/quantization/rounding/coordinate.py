"""coordinate: integers and scales in turns, each at its best while the others stay; for 2 to 4 bits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq.modules.quantization.float_product import float_product
from fairseq.modules.quantization.packed.config import LinearConfig
from fairseq.modules.quantization.scalar.ops import quantized_range
from fairseq.quantization.rounding.gptaq import drift_corrected
from fairseq.quantization.rounding.gptq import compensated, descend, per_weight
from fairseq.quantization.rounding.second_moment import damped
from fairseq.quantization.rounding.statistics import Rounded, Statistics
from fairseq.quantization.rounding.two_sided import two_sided

DAMPING = 0.1
"""Added to the diagonal of H, as a share of its mean. Coarse grids err more than pictures leave uncertain."""
CORRECTION = 1.0
"""How much of the drift of the inputs is made up for, where it was not tried out."""
ROUNDS, WIDE = 4, 2**19
"""How often scales and integers are gone through; and with how many weights a layer goes through them once: there one
round takes as long as all of GPTQ."""


def coordinate(weight: Tensor, statistics: Statistics | None, config: LinearConfig) -> Rounded:
    """From GPTQ's integers, :data:`ROUNDS` times: all scales by least squares, then single steps of the integers.

    With V = scale (q - zero point), E|V x - W x*|^2 is quadratic in the scales of an output channel, one or one for
    each group, for given integers, and in each integer for given scales. Both are solved in closed form, so that the
    error under the damped H falls with every step. No range is searched for: a scale follows from the integers, as in
    Beacon (2025, arXiv 2508.20293), which takes the scale along with each single integer. The zero points stay those of
    the range. At last the integers are found once more, for those scales, by :func:`two_sided`.
    """
    assert statistics is not None
    target = weight
    if statistics.target_moved:
        target = drift_corrected(weight, statistics, CORRECTION)
    h = damped(statistics.second_moment, weight, DAMPING)
    rounds = ROUNDS if weight.numel() <= WIDE else 1
    found = in_turns(target, h, config, compensated(target, h, config, descends=False), rounds)
    return two_sided(target, h, found, config, statistics.outputs)


def in_turns(weight: Tensor, h: Tensor, config: LinearConfig, start: Rounded, rounds: int = ROUNDS) -> Rounded:
    """Scales and integers in turns, from ``start``: tr(D H D^T), D the change of ``weight``, (out, in), falls.

    Args:
        h: positive definite, (in, in).
        start: integers, scales and zero points as ``config`` says; the zero points are kept.
        rounds: at most.
    """
    h, w = h.float(), weight.float().T.contiguous()  # (in, out)
    wanted = float_product(h, w.t())
    top = quantized_range(config.bits)[1]
    scale, q = start.scale, start.integers.float().T.contiguous()
    zero_point = per_weight(start.zero_point, weight.shape, config.group_size).T
    for _ in range(rounds):
        scale = _refit(h, wanted, q - zero_point, scale, config)
        moved = descend(w, q, h, per_weight(scale, weight.shape, config.group_size).T, zero_point, top)
        if torch.equal(moved, q):
            break
        q = moved
    return Rounded(q.T.contiguous().to(torch.uint8), scale, start.zero_point)


def _refit(h: Tensor, wanted: Tensor, units: Tensor, scale: Tensor, config: LinearConfig) -> Tensor:
    """The scales, positive, of the shape of ``scale``, with which ``units``, q - zero point, (in, out), err least.

    Args:
        wanted: H w, (in, out), w the weight.
    """
    size = config.group_size or len(h)
    product = _group_sums(units * wanted, size)  # (groups, out)
    gram = torch.stack(
        [
            _group_sums(units * float_product(h[:, at : at + size], units[at : at + size].t()), size)
            for at in range(0, len(h), size)
        ]
    )  # (groups, groups, out)
    if config.method == "tensor":
        product, gram = product.sum(-1, keepdim=True), gram.sum(-1, keepdim=True)
    old = scale.float().reshape(product.shape[1], -1)  # (out, groups)
    a, b = gram.permute(2, 0, 1).double(), product.T.double()
    ridge = 1e-6 * a.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(torch.float32).tiny)
    a = a + torch.diag_embed(ridge[:, None].expand(b.shape))  # a group of zeros alone leaves its scale open
    found = torch.linalg.solve(a, b)
    new = torch.where(found > 1e-3 * old, found, old.double())  # not one that turns the signs, or vanishes

    def error(s: Tensor) -> Tensor:
        return ((a @ s[..., None]).squeeze(-1) * s - 2 * b * s).sum(1, keepdim=True)

    new = torch.where(error(new) < error(old.double()), new, old.double())
    return new.to(scale.dtype).reshape(scale.shape)


def _group_sums(x: Tensor, size: int) -> Tensor:
    """(in, out) -> (groups, out): sums over ``size`` inputs each, the last group over what is left."""
    return F.pad(x, (0, 0, 0, -len(x) % size)).view(-1, size, x.shape[1]).sum(1)
