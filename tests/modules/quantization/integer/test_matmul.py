"""Products of integers: exact on every device, of any sizes, without a float."""

import pytest
import torch

from fairseq.modules.quantization.integer.matmul import matmul, outer_products
from fairseq.modules.quantization.integer.no_float import NoFloat


@pytest.mark.parametrize("function", [matmul, outer_products])
@pytest.mark.parametrize(("lead", "m", "k", "n"), [((), 3, 5, 2), ((2, 3), 4, 1, 7), ((2,), 1, 0, 3)])
def test_products_are_those_of_int64(function, lead, m, k, n, device):
    draw = torch.Generator().manual_seed(0)
    a = torch.randint(-(2**30), 2**30, (*lead, m, k), generator=draw)
    b = torch.randint(-(2**30), 2**30, (*lead, k, n), generator=draw)  # sums past 2**53
    with NoFloat():
        got = function(a.to(device), b.to(device).transpose(-1, -2).contiguous().transpose(-1, -2))
    assert got.dtype == torch.int64
    assert torch.equal(got.cpu(), a @ b)
