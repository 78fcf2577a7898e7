"""PackedWeight: the integers, the real numbers and the zero points that its bytes stand for."""

import pytest
import torch

from fairseq.modules.quantization.packed.packing import packed_length
from fairseq.modules.quantization.packed.weight import PackedWeight, code_offset, pack_codes, to_codes, unpack_codes

WIDTHS = range(2, 9)
OUT, IN = 5, 71


def make(bits, group_size=None, packed=True):
    """Random integers with scales and zero points of their own per row or group; the weight and the integers."""
    generator = torch.Generator().manual_seed(bits)
    q = torch.randint(0, 2**bits, (OUT, IN), generator=generator, dtype=torch.int32).to(torch.uint8)
    q[0, :2] = torch.tensor([0, 2**bits - 1], dtype=torch.uint8)
    shape = (OUT,) if group_size is None else (OUT, -(-IN // group_size))
    scale = torch.rand(shape, generator=generator) + 0.1
    zero_point = torch.randint(0, 2**bits, shape, generator=generator).to(torch.uint8)
    codes = to_codes(q, bits)
    # above 4 bits a code has its byte, and the layer holds int8
    held = pack_codes(codes, bits) if packed and bits <= 4 else codes
    return PackedWeight(held, scale, zero_point, bits, IN, group_size, False), q


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_integers_are_those_that_went_in(bits, packed):
    weight, q = make(bits, packed=packed)
    assert weight.is_packed() == (packed and bits <= 4)
    assert torch.equal(weight.integers(), q)
    assert weight.integers().dtype == torch.uint8


@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_are_the_integers_less_the_offset(bits):
    weight, q = make(bits)
    offset = 128 if bits == 8 else 0
    assert code_offset(bits) == offset
    assert weight.unpacked().dtype == torch.int8
    assert torch.equal(weight.unpacked().int(), q.int() - offset)
    assert weight.code_zero_point().dtype == torch.int32
    assert weight.code_zero_point().tolist() == [z - offset for z in weight.zero_point.tolist()]


@pytest.mark.parametrize("group_size", [None, 32, 40, 128])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_dequantize_is_scale_times_distance_from_the_zero_point(bits, group_size, packed):
    weight, q = make(bits, group_size, packed)
    real = weight.dequantize()
    assert real.dtype == weight.scale.dtype
    columns = torch.arange(IN) // (group_size or IN)  # the group of each column
    scale, zero_point = weight.scale.reshape(OUT, -1)[:, columns], weight.zero_point.reshape(OUT, -1)[:, columns]
    assert torch.equal(real, scale * (q.float() - zero_point.float()))


@pytest.mark.parametrize("group_size", [None, 32])
def test_a_code_at_the_zero_point_is_exactly_zero(group_size):
    for bits in WIDTHS:
        weight, _ = make(bits, group_size, packed=False)
        zero = weight.code_zero_point().reshape(OUT, -1).repeat_interleave(group_size or IN, 1)[:, :IN]
        weight.codes[:, ::2] = zero.to(torch.int8)[:, ::2]
        assert bool((weight.dequantize()[:, ::2] == 0).all())
        assert torch.equal(weight.dequantize() == 0, weight.codes == zero)


def test_float64_scales_give_float64_weights():
    weight, _ = make(4)
    assert weight._replace(scale=weight.scale.double()).dequantize().dtype == torch.float64


@pytest.mark.parametrize(
    ("group_size", "expected"),
    [(None, [(0, 71)]), (32, [(0, 32), (32, 64), (64, 71)]), (128, [(0, 71)])],
)
def test_columns_of_the_groups(group_size, expected):
    assert make(4, group_size)[0].columns() == expected


@pytest.mark.parametrize("bits", WIDTHS)
def test_saved_bytes_give_the_codes_back(bits):
    codes = to_codes(make(bits)[1], bits)
    saved = pack_codes(codes, bits)
    assert saved.dtype == torch.uint8
    assert saved.shape == (OUT, packed_length(IN, bits))
    assert torch.equal(unpack_codes(saved, bits, IN), codes)
    if bits <= 4:
        out = torch.empty(OUT, IN, dtype=torch.uint8)
        assert unpack_codes(saved, bits, IN, out=out).data_ptr() == out.data_ptr()
        assert torch.equal(out.view(torch.int8), codes)
