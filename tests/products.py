"""torch._int_mm, which is exact on one processor and not on another: what is true of it here, and of it everywhere."""

import torch

SMALL = 64
"""Integers from -SMALL to SMALL - 1 have exact products on every processor.

Where there is no instruction for sums of products of bytes, one factor becomes unsigned, at most 255, and two
neighbouring products are added up in 16 bits, where they saturate: 2 * 255 * 64 still fits.
"""


def integers(*shape, seed=0, half=128):
    """int8 from -half to half - 1."""
    return torch.randint(-half, half, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def is_exact_here():
    """Whether the largest products, of either sign, have exact sums on this processor."""
    ends = torch.tensor([[127], [-128]], dtype=torch.int8).expand(2, 64).contiguous()
    return torch.equal(torch._int_mm(ends, ends.T), in_float64(ends, ends.T))


def in_float64(a, b, *, out=None):
    """torch._int_mm, exact on every processor: the sums are far below 2**53."""
    result = (a.double() @ b.double()).to(torch.int32)
    return result if out is None else out.copy_(result)
