"""Panels, against the layout that csrc/api.h describes, and back."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from fairseq.modules.quantization.packed.panels import from_panels, panels_shape, to_panels


def codes_of(outputs, inputs, bits, seed=0):
    low, high = (-128, 128) if bits == 8 else (0, 2**bits)
    return torch.randint(low, high, (outputs, inputs), generator=torch.Generator().manual_seed(seed)).to(torch.int8)


@pytest.mark.parametrize("bits", range(2, 9))
@given(outputs=st.integers(1, 70), inputs=st.integers(1, 40), seed=st.integers(0, 1000))
def test_round_trip_is_exact(bits, outputs, inputs, seed):
    codes = codes_of(outputs, inputs, bits, seed)
    panels = to_panels(codes, bits)
    assert panels.dtype == torch.uint8
    assert panels.shape == panels_shape(outputs, inputs, bits)
    assert torch.equal(from_panels(panels, outputs, inputs, bits), codes)


@pytest.mark.parametrize(("outputs", "inputs"), [(33, 18), (64, 16)])
def test_a_byte_is_where_the_products_look_for_it(outputs, inputs):
    codes = codes_of(outputs, inputs, 8)
    panels = to_panels(codes, 8)
    assert panels.shape == (2, -(-inputs // 16) * 4, 128)
    for n in range(outputs):
        for k in range(inputs):
            assert panels[n // 32, k // 4, n % 32 * 4 + k % 4] == int(codes[n, k]) % 256
    assert int((panels != 0).sum()) == int((codes != 0).sum())  # filled up with zeros


def test_two_narrow_codes_share_a_byte():
    codes = codes_of(40, 5, 4)
    panels = to_panels(codes, 4)
    assert panels.shape == (2, 4, 64)
    for n in range(40):
        for k in range(5):
            byte = int(panels[n // 32, k // 4, n % 16 * 4 + k % 4])
            assert (byte & 15 if n % 32 < 16 else byte >> 4) == int(codes[n, k])
