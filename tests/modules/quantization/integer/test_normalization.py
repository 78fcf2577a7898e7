"""LayerNorm on integers: exactly what its docstring says, and within its bound of the real one."""

import math

import pytest
import torch

from fairseq.modules.quantization.integer.checked import checked
from fairseq.modules.quantization.integer.normalization import normalize

LARGEST = 2**21 - 1


def rows(count):
    """Of noise of several sizes, all equal, one far from all others, both extremes."""
    draw = torch.Generator().manual_seed(count)
    noise = torch.randn(6, count, generator=draw) * 10 ** torch.arange(1.0, 7.0)[:, None]
    kinds = [noise.round().long().clamp(-LARGEST - 1, LARGEST)]
    kinds.append(torch.full((2, count), 5) * torch.tensor([[1], [-400_000]]))
    alone = torch.zeros(2, count, dtype=torch.int64)
    alone[0, 0], alone[1, -1] = LARGEST, -LARGEST - 1
    ends = torch.full((1, count), LARGEST)
    ends[0, : count // 2] = -LARGEST - 1
    return torch.cat([*kinds, alone, ends])


def by_hand(h, eps):
    count = len(h)
    mean = (2 * sum(h) + count) // (2 * count)
    d = [x - mean for x in h]
    v = sum(x * x for x in d) + eps
    j = (62 - v.bit_length()) // 2
    r = (2**61 - 1) // math.isqrt(v << 2 * j)
    return [(2 * x * r + (1 << (37 - j))) >> (38 - j) for x in d]


@pytest.mark.parametrize("count", [1, 2, 3, 192, 4096])
def test_integers_and_bound(count):
    h = rows(count)
    for eps in (1, 1000, 2**50):
        with checked():
            got = normalize(h, torch.tensor(eps))
        assert got.tolist() == [by_hand(row, eps) for row in h.tolist()]
        d = h.double() - h.double().mean(-1, keepdim=True)
        v = (d * d).sum(-1, keepdim=True) + eps
        bound = (0.5 + d.abs() * count / 8 / v) / v.sqrt() + 2**-24
        assert ((got / 2**24 - d / v.sqrt()).abs() <= bound).all()


def test_more_bits_than_22_are_seen_in_checked_mode():
    with checked(), pytest.raises(OverflowError, match="LayerNorm, input"):
        normalize(torch.tensor([[0, 2**21]]), torch.tensor(1))
