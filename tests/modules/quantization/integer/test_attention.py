"""Attention on bytes: exponentials over their whole range, means against exact ones, extremes within their widths."""

import operator
from fractions import Fraction

import pytest
import torch

from fairseq.modules.quantization.integer.attention import ONE, attend, exp2, scale_scores, scores
from fairseq.modules.quantization.integer.checked import checked


def test_every_exponential_is_within_the_bound():
    d = torch.arange(25 * ONE)
    with checked():
        x = exp2(d)
    assert (x / ONE - 255 * torch.exp2(-d.double() / ONE)).abs().max() < 0.52
    assert x[0] == 255 * ONE
    assert x.min() == 0
    assert exp2(torch.tensor([2**31, 2**62])).tolist() == [0, 0]


def test_means_are_those_of_the_exponentials():
    draw = torch.Generator().manual_seed(0)
    u = torch.randint(-5 * ONE, 5 * ONE, (2, 3, 7, 7), generator=draw)
    v = torch.randint(-127, 128, (2, 3, 7, 5), generator=draw, dtype=torch.int8)
    with checked():
        got = attend(u, v)
    for place in [(0, 0, 0, 0), (1, 2, 6, 4), (1, 0, 3, 2)]:
        b, h, i, c = place
        x, values = exp2(u[b, h, i].max() - u[b, h, i]).tolist(), v[b, h, :, c].tolist()
        e = [(one + ONE // 2) // ONE for one in x]
        rest = Fraction(sum(x) - ONE * sum(e), ONE)
        exact = (sum(map(operator.mul, e, values)) + rest * Fraction(sum(values), 7)) / (sum(e) + rest) * 2**12
        mean_off = abs(rest) / (sum(e) + rest) * 2**12 / 2**9  # half a unit of the mean, 2**-8
        assert abs(got[place].item() - exact) <= Fraction(1, 2) + mean_off + abs(exact) * Fraction(
            sum(x), 2**53
        ) + Fraction(1, 99)


def test_many_small_exponentials_are_not_lost():
    v = torch.full((1, 401, 1), 100, dtype=torch.int8)
    v[0, 0] = -100
    u = torch.full((1, 1, 401), -10 * ONE)  # 255 / 1024: each rounds to 0, and all together are 100
    u[0, 0, 0] = 0
    exact = (-255 + 400 * 255 / 1024) / (255 + 400 * 255 / 1024) * 100
    assert abs(attend(u, v).item() / 4096 - exact) < 0.6


def test_equal_scores_give_the_mean_and_a_large_one_its_value():
    v = torch.tensor([[127], [-127], [64]], dtype=torch.int8)
    assert attend(torch.zeros(1, 3, dtype=torch.int64), v).tolist() == [[round(64 / 3 * 4096)]]
    assert attend(torch.tensor([[0, 40 * ONE, -(2**40)]]), v).tolist() == [[-127 * 4096]]


@pytest.mark.parametrize("sign", [-1, 1])
def test_extremes_stay_within_their_widths(sign):
    q, k = torch.full((4, 256), 127, dtype=torch.int8), torch.full((4, 256), sign * 127, dtype=torch.int8)
    m = torch.full((4, 1), 2**15)
    with checked():
        u = scale_scores(scores(q, k), m, m, torch.tensor(2**16 - 1), torch.tensor(42))
        assert u.unique().tolist() == [sign * 127 * 127 * 256 * 2**30 >> 26]
        attend(u, k)


def test_scales_of_rows_and_columns_multiply_scores():
    draw = torch.Generator().manual_seed(1)
    s = torch.randint(-(2**20), 2**20, (5, 6), generator=draw)
    m, n = (torch.randint(1, 2**15, (size, 1), generator=draw) for size in (5, 6))
    multiplier, shift = torch.tensor(50_001), torch.tensor(43)
    exact = s.double() * m * n.T * 50_001 / 2.0**43
    error = s.double().abs() * n.T * 2**16 / 2.0**44  # half a unit of the row's multiplier
    assert ((scale_scores(s, m, n, multiplier, shift) - exact).abs() <= 0.5 + error + 1e-6).all()
