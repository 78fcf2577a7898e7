"""Packing, against plain Python integers and against itself."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from fairseq.modules.quantization.packed.packing import PLANES, pack, packed_length, unpack

WIDTHS = range(2, 9)


def limits(bits, signed):
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def integers(shape, bits, signed, seed=0):
    """Random integers of every value that the width has."""
    low, high = limits(bits, signed)
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.int8 if signed else torch.uint8
    return torch.randint(low, high + 1, tuple(shape), generator=generator).to(dtype)


@st.composite
def rows(draw, bits, signed):
    """Integers of any shape, empty ones among them; contiguous, transposed or every other column."""
    shape = [*draw(st.lists(st.integers(0, 3), max_size=3)), draw(st.integers(0, 35))]
    seed = draw(st.integers(0, 2**31))
    kind = draw(st.sampled_from(["contiguous", "transposed", "strided"]))
    if kind == "transposed":
        return integers(shape[::-1], bits, signed, seed).permute(*range(len(shape))[::-1])
    if kind == "strided":
        return integers([*shape[:-1], 2 * shape[-1]], bits, signed, seed)[..., ::2]
    return integers(shape, bits, signed, seed)


def plane_by_hand(values, width):
    """One plane of a row as the docstring draws it: segment k lies ``width * k`` bits up in the bytes."""
    count = 8 // width
    h = -(-len(values) // count)
    filled = list(values) + [0] * (count * h - len(values))
    return [sum(filled[k * h + j] << (width * k) for k in range(count)) for j in range(h)]


def row_by_hand(values, bits):
    packed, shift = [], 0
    planes = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
    for width in planes[bits]:
        packed += plane_by_hand([((v % 256) >> shift) % 2**width for v in values], width)
        shift += width
    return packed


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", WIDTHS)
@given(data=st.data())
def test_round_trip_is_exact_and_the_bytes_are_those_drawn(bits, signed, data):
    q = data.draw(rows(bits, signed))
    packed = pack(q, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*q.shape[:-1], packed_length(q.shape[-1], bits))
    empty = pack(q.to("meta"), bits)
    assert (empty.is_meta, empty.dtype, empty.shape) == (True, packed.dtype, packed.shape)
    back = unpack(packed, bits, q.shape[-1], signed)
    assert back.dtype == q.dtype
    assert torch.equal(back, q)
    if q.numel():  # without elements a shape holds no rows to compare
        flat = zip(q.reshape(-1, q.shape[-1]).tolist(), packed.reshape(-1, packed.shape[-1]).tolist(), strict=True)
        assert all(bytes_ == row_by_hand(values, bits) for values, bytes_ in flat)


@pytest.mark.parametrize(
    ("bits", "values", "expected"),
    [
        (4, [1, 2, 3, 4, 5], [0x41, 0x52, 0x03]),  # h = 3: q[j] | q[3 + j] << 4
        (2, [0, 1, 2, 3, 3, 2, 1], [0b01_11_10_00, 0b00_10_11_01]),  # h = 2: q[6] q[4] q[2] q[0], then q[7] = 0 ...
        # low 2 bits of 5, 2, 7, h = 1: 01, 10, 11; then the high bits 1, 0, 1, h = 1
        (3, [5, 2, 7], [0b00_11_10_01, 0b101]),
        (8, [0, 255, 7], [0, 255, 7]),
        (5, [31, 0, 7], [0x7F, 0x00, 0b001]),  # low 4 bits, h = 2; then the high ones
        (6, [63, 16, 5], [0x5F, 0x00, 0b00_01_11]),  # then the high 2 bits 3, 1, 0
        (7, [127, 64, 16], [0x0F, 0x00, 0b01_00_11, 0b011]),  # then bits 4 and 5, then bit 6
    ],
)
def test_layout_of_rows_written_out(bits, values, expected):
    assert pack(torch.tensor(values, dtype=torch.uint8), bits).tolist() == expected


def test_signed_integers_lie_in_twos_complement():
    assert pack(torch.tensor([-1, -8, 7], dtype=torch.int8), 4).tolist() == [0xF | 7 << 4, 0x8]
    assert pack(torch.tensor([-1, -128], dtype=torch.int8), 8).tolist() == [255, 128]


@pytest.mark.parametrize("bits", WIDTHS)
def test_packed_length_is_the_size_of_a_packed_row(bits):
    for length in range(40):
        assert packed_length(length, bits) == len(pack(torch.zeros(length, dtype=torch.uint8), bits))


@pytest.mark.parametrize("bits", WIDTHS)
def test_an_integer_takes_as_many_bits_as_it_has(bits):
    assert sum(PLANES[bits]) == bits
    assert packed_length(768, bits) == 768 * bits // 8  # no byte is lost where the length is a multiple of 8


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("length", [0, 1, 5, 8, 33])
def test_out_gets_the_same_and_its_memory_is_returned(bits, signed, length):
    q = integers((3, length), bits, signed)
    out = torch.full((3, length), 255, dtype=torch.uint8)  # every bit has to be overwritten
    got = unpack(pack(q, bits), bits, length, signed, out=out)
    assert torch.equal(got, q)
    assert got.data_ptr() == out.data_ptr()


@pytest.mark.parametrize("bits", WIDTHS)
def test_out_may_be_a_part_of_wider_memory(bits):
    q = integers((3, 13), bits, signed=False)
    wide = torch.full((3, 20), 255, dtype=torch.uint8)
    unpack(pack(q, bits), bits, 13, out=wide[:, 2:15])
    assert torch.equal(wide[:, 2:15], q)
    assert bool((wide[:, :2] == 255).all() & (wide[:, 15:] == 255).all())


@pytest.mark.parametrize("bits", WIDTHS)
def test_packing_shares_no_memory_with_the_integers(bits):
    q = integers((2, 9), bits, signed=False)
    packed, before = pack(q, bits), q.clone()
    packed.fill_(0)
    assert torch.equal(q, before)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.bool])
def test_pack_refuses_another_dtype(dtype):
    with pytest.raises(TypeError, match=f"must be uint8 or int8, got {dtype}"):
        pack(torch.zeros(4, dtype=dtype), 4)


@pytest.mark.parametrize("bits", range(2, 8))
def test_pack_names_the_integers_that_do_not_fit(bits):
    low, high = limits(bits, True)
    message = f"{bits}-bit signed integers are from {low} to {high}, got "
    for smallest, largest in ((low - 1, 0), (0, high + 1)):
        with pytest.raises(ValueError, match=f"{message}{smallest} to {largest}$"):
            pack(torch.tensor([0, smallest, largest], dtype=torch.int8), bits)
    with pytest.raises(
        ValueError, match=f"{bits}-bit unsigned integers are from 0 to {2**bits - 1}, got 1 to {2**bits}$"
    ):
        pack(torch.tensor([1, 2**bits], dtype=torch.uint8), bits)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_no_dimensions_are_refused(dtype):
    with pytest.raises(ValueError, match=r"at least one dimension, got a tensor of shape \(\)"):
        pack(torch.tensor(1, dtype=dtype), 4)
    with pytest.raises(ValueError, match=r"take rows of 1 bytes, got a tensor of shape \(\)"):
        unpack(torch.tensor(1, dtype=torch.uint8), 4, 1)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("change", [-1, 1])
def test_unpack_refuses_rows_of_another_size(bits, change):
    size = packed_length(9, bits)
    message = rf"9 integers of {bits} bits take rows of {size} bytes, got a tensor of shape \(2, {size + change}\)"
    with pytest.raises(ValueError, match=message):
        unpack(torch.zeros(2, size + change, dtype=torch.uint8), bits, 9)


@pytest.mark.parametrize("bits", [1, 9])
def test_other_widths_are_refused(bits):
    for call in (lambda: pack(torch.zeros(2, dtype=torch.uint8), bits), lambda: packed_length(2, bits)):
        with pytest.raises(ValueError, match=f"bits must be from 2 to 8, got {bits}"):
            call()
