"""Layout: one weight in rows and in panels holds the same codes, and layers that share them go on sharing them."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fairseq.modules.quantization.packed import LinearConfig, PackedLinear
from fairseq.modules.quantization.packed.kernels import choose, native
from fairseq.modules.quantization.packed.layout import Layout
from fairseq.modules.quantization.packed.linear import use_native
from fairseq.modules.quantization.packed.packing import packed_length
from fairseq.modules.quantization.packed.panels import panels_shape
from fairseq.modules.quantization.packed.weight import pack_codes

pytestmark = pytest.mark.usefixtures("exact_int_mm")
OUT, IN = 37, 75
needs_native = pytest.mark.skipif(not native.levels(), reason="no native kernels: there was no C++ compiler")


def codes_of(bits, seed=0):
    low, high = (-128, 128) if bits == 8 else (0, 2**bits)
    return torch.randint(low, high, (OUT, IN), generator=torch.Generator().manual_seed(seed)).to(torch.int8)


@pytest.mark.parametrize("unpacked", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_rows_and_panels_hold_the_same_codes(bits, unpacked):
    codes = codes_of(bits)
    rows = Layout.of(codes, bits, unpacked)
    panels = rows.panels()
    assert (rows.in_panels(), panels.in_panels()) == (False, True)
    assert rows.codes.shape == (OUT, IN if unpacked or bits > 4 else packed_length(IN, bits))
    assert panels.codes.shape == panels_shape(OUT, IN, bits)
    assert (panels.sums is None) == (bits <= 4)
    assert panels.sums is None or torch.equal(panels.sums, codes.sum(1, dtype=torch.int32))
    back = panels.rows()
    assert torch.equal(back.codes, rows.codes)
    assert back[1:] == rows[1:]
    integers = codes.int() + (128 if bits == 8 else 0)
    for layout in (rows, panels, back):
        assert torch.equal(layout.unpacked(), codes)
        assert torch.equal(layout.integers().int(), integers)
        assert torch.equal(layout.saved(), pack_codes(codes, bits))
    assert rows.rows() is rows
    assert panels.panels() is panels


@pytest.mark.parametrize("unpacked", [False, True])
@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize("form", ["rows", "panels"])
def test_what_was_saved_is_loaded_into_the_layout_that_is_there(form, bits, unpacked):
    layout = getattr(Layout.of(codes_of(bits), bits, unpacked), form)()
    other = codes_of(bits, seed=1)
    loaded = layout.loaded(pack_codes(other, bits)).summed()
    assert torch.equal(loaded.unpacked(), other)
    assert loaded.codes.shape == layout.codes.shape
    assert loaded.in_panels() == layout.in_panels()
    assert (loaded.sums is None) == (layout.sums is None)
    assert loaded.sums is None or torch.equal(loaded.sums, other.sum(1, dtype=torch.int32))
    assert loaded[2:] == layout[2:]


def test_only_what_has_the_size_of_saved_codes_is_taken():
    layout = Layout.of(codes_of(4), 4, True)
    right = torch.zeros(OUT, packed_length(IN, 4), dtype=torch.uint8)
    assert layout.takes(right)
    assert not any(layout.takes(wrong) for wrong in (right[1:], right[:, 1:], right[None], right.float()))


@pytest.mark.parametrize("group_size", [None, 32])
def test_sums_follow_codes_that_were_written_to(group_size):
    layout = Layout.of(codes_of(8), 8, False, group_size).panels()
    other = codes_of(8, seed=1)
    layout.codes.copy_(Layout.of(other, 8, False).panels().codes)
    sums = other.sum(1) if group_size is None else torch.stack([part.sum(1) for part in other.split(group_size, 1)], 1)
    again = layout.rows().panels()
    for summed in (layout.summed(), again, again.loaded(layout.saved())):
        assert summed.sums.dtype == torch.int32
        assert torch.equal(summed.sums, sums)


# The layers that have them.


def twins(bits, weight_storage="packed"):
    """Three layers, of which the first two hold the same integers, as those of tied weights do."""
    torch.manual_seed(0)
    layers = [
        PackedLinear.from_float(nn.Linear(IN, OUT), LinearConfig(bits, "channel", weight_storage=weight_storage))
        for _ in range(3)
    ]
    for name in ("weight_codes", "scale", "zero_point"):
        setattr(layers[1], name, getattr(layers[0], name))
    return nn.ModuleList(layers)


@needs_native
@pytest.mark.parametrize(("bits", "weight_storage"), [(4, "packed"), (4, "unpacked"), (8, "packed")])
def test_integers_that_are_shared_stay_shared(bits, weight_storage):
    layers, x = twins(bits, weight_storage), torch.randn(3, IN)
    before, expected = [layer.integers() for layer in layers], [layer(x) for layer in layers]
    use_native(layers)
    outputs = [layer(x) for layer in layers]  # and so each has pointers, which no copy may take over
    for model in (layers, copy.deepcopy(layers), pickle.loads(pickle.dumps(layers))):
        assert model[0].panels is model[1].panels
        assert model[0].code_sums is model[1].code_sums
        assert model[2].panels is not model[1].panels
        assert all(map(torch.equal, (layer.integers() for layer in model), before))
        assert all(map(torch.equal, (layer(x) for layer in model), outputs))
    use_native(layers, use=False)
    assert layers[0].panels is None
    assert layers[0].weight_codes is layers[1].weight_codes
    assert layers[2].weight_codes is not layers[1].weight_codes
    assert all(map(torch.equal, (layer(x) for layer in layers), expected))


@needs_native
@pytest.mark.parametrize("bits", [4, 8])
def test_a_state_dict_is_loaded_into_panels_in_place(bits):
    layers, other = twins(bits), twins(bits)
    nn.init.zeros_(other[0].weight_codes)
    use_native(layers)
    held = layers[0].panels
    layers.load_state_dict(other.state_dict())
    assert layers[0].panels is layers[1].panels is held
    assert all(torch.equal(layer.integers(), its.integers()) for layer, its in zip(layers, other, strict=True))
    x = torch.randn(3, IN)
    exact = twins(bits)
    exact.load_state_dict(other.state_dict())
    use_native(exact)
    assert all(torch.equal(layer(x), its(x)) for layer, its in zip(layers, exact, strict=True))  # sums, too


@needs_native
def test_where_there_are_no_native_kernels_a_pickle_has_rows(monkeypatch):
    layer, x = twins(4)[0], torch.randn(3, IN)
    expected = layer(x)
    layer.use_native()
    file = pickle.dumps(layer)
    monkeypatch.setattr(native, "levels", lambda: ())
    other = pickle.loads(file)
    assert (other.panels, other.backend) == (None, choose(torch.device("cpu")).name)
    assert torch.equal(other(x), expected)


@needs_native
@pytest.mark.parametrize("bits", [4, 8])
def test_panels_are_of_the_cpu(bits):
    layer = twins(bits)[0]
    layer.use_native()
    shape = layer.panels.shape
    layer.to("meta")
    assert layer.panels is layer.code_sums is None
    assert layer.weight_codes.shape == Layout.of(codes_of(bits), bits, False).codes.shape
    layer.to_empty(device="cpu")
    assert layer.panels.shape == shape
    assert layer.backend == "native"
