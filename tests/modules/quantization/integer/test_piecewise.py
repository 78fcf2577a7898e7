"""The table of an activation on all its inputs."""

import torch

from fairseq.modules.quantization.integer.checked import checked
from fairseq.modules.quantization.integer.piecewise import piecewise, table


def test_lines_go_through_the_ends_of_pieces_and_beyond_the_table_it_is_exact():
    ends = torch.arange(-128, 129) * 256.0
    values = torch.where(ends < 0, ends / 256, ends).double()  # a kink at 0, which is an end
    t = torch.cat([torch.arange(-(2**15) - 300, 2**15 + 300), torch.tensor([-(2**23), 2**23 - 1])])
    with checked():
        got = piecewise(t, table(values).long())
    exact = torch.where(t < 0, t / 256, t.double())
    inside = t >= -(2**15)
    assert ((got - exact).abs()[inside] <= 0.5).all()
    assert (got[~inside] == 0).all()
    assert torch.equal(got[t >= 0], t[t >= 0])
