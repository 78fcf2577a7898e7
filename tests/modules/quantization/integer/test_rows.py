"""Rows of 16 bits to bytes, against exact division."""

import torch

from fairseq.modules.quantization.integer.checked import checked
from fairseq.modules.quantization.integer.rows import quantize_rows, quantize_unsigned_rows


def test_every_integer_of_rows_of_every_kind_is_within_the_bound():
    for m in (1, 2, 3, 126, 127, 128, 255, 4097, 16384, 32767, 32768):
        z = torch.arange(-m, min(m, 32767) + 1)[None]
        with checked():
            q, scale = quantize_rows(z)
        assert (q.dtype, scale.tolist()) == (torch.int8, [[m]])
        assert ((q.double() - 127 * z / m).abs() <= 0.5 + 2**-8).all()
        assert q[0, 0] == -127


def test_a_row_of_zeros_and_dimensions_that_share_a_scale():
    assert [t.tolist() for t in quantize_rows(torch.zeros(1, 3, dtype=torch.int64))] == [[[0, 0, 0]], [[1]]]
    z = torch.tensor([[[1, -2], [3, -4]], [[50, 0], [0, 100]]])
    q, m = quantize_rows(z, dims=(-2, -1))
    assert m.flatten().tolist() == [4, 100]
    assert q.tolist() == [[[32, -63], [95, -127]], [[63, 0], [0, 127]]]  # 63.5, and r is rounded down


def test_every_unsigned_integer_is_within_the_bound():
    for m in (1, 2, 254, 255, 256, 4097, 32767):
        z = torch.arange(-3, m + 1)[None]
        with checked():
            q, scale = quantize_unsigned_rows(z)
        assert (q.dtype, scale.tolist()) == (torch.int8, [[m]])
        assert ((q.double() + 128 - 255 * z.clamp(min=0) / m).abs() <= 0.5 + 2**-7).all()
        assert (q[0, 0], q[0, -1]) == (-128, 127)
