"""The fingerprint of a weight: every edit changes it, and nothing else does."""

from typing import ClassVar

import pytest
import torch

from fairseq.modules.quantization.scalar.modules.fingerprint import fingerprint, in_backward

SHAPES = [(8, 6), (5, 7), (4, 3, 2, 2), (1, 1)]


def weight(shape=(8, 6), dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_one_bit_of_one_element_changes_it(dtype, shape):
    w = weight(shape, dtype)
    before = fingerprint(w)
    bits = w.view(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[w.element_size()])
    seen = {before}
    for bit in (0, 3, 8 * w.element_size() - 1):
        for place in (0, -1):
            flip = 1 << bit if bit < 8 * w.element_size() - 1 else torch.iinfo(bits.dtype).min
            bits[place] ^= flip
            seen.add(fingerprint(w))
            bits[place] ^= flip
    assert len(seen) == (4 if w.numel() == 1 else 7)
    assert fingerprint(w) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("fill", [weight, lambda shape, dtype: torch.ones(shape, dtype=dtype)], ids=["normal", "ones"])
def test_edits_of_many_elements_that_sums_of_bits_would_miss(fill, dtype):
    """Signs in pairs, powers of two, whole rows and columns: changes that cancel modulo 2**64 in a plain sum."""
    w = fill((4096, 8), dtype)
    edits = {
        "negated": -w,
        "doubled": 2 * w,
        "times 16": 16 * w,
        "two columns": torch.cat([w[:, :1], -w[:, 1:2], w[:, 2:3], -w[:, 3:4], w[:, 4:]], 1),
        "two rows": torch.cat([-w[:2], w[2:]]),
    }
    if fill is weight:
        edits |= {"rows moved": w.flip(0), "columns moved": w.roll(2, 1), "neighbours": w[:, [1, 0, 2, 3, 4, 5, 6, 7]]}
    prints = {fingerprint(value) for value in (w, *edits.values())}
    assert len(prints) == len(edits) + 1


def test_shape_and_dtype_belong_to_it():
    w = torch.zeros(4, 6)
    assert len({fingerprint(v) for v in (w, w.view(6, 4), w.half(), w.view(4, 3, 2))}) == 4


def test_layout_gradients_threads_and_modes_do_not(device):
    w = weight((300, 70))
    expected = fingerprint(w)
    assert fingerprint(w.t().contiguous().t()) == expected
    assert fingerprint(torch.nn.Parameter(w).to(device)) == expected
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert fingerprint(w) == expected
    finally:
        torch.set_num_threads(threads)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert fingerprint(w) == expected


def test_it_is_the_same_in_every_process():
    """A pickled layer holds it; so it depends on nothing that changes from run to run or machine to machine."""
    assert fingerprint(torch.arange(12.0).view(3, 4)) == "31393176cce81ca9227a9d95685983ef"


class Watched(torch.autograd.Function):
    seen: ClassVar[list[bool]] = []

    @staticmethod
    def forward(ctx, x):
        Watched.seen.append(in_backward())
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        Watched.seen.append(in_backward())
        return grad


def test_in_backward():
    Watched.apply(torch.ones(1, requires_grad=True)).backward()
    assert Watched.seen == [False, True]
    assert not in_backward()
