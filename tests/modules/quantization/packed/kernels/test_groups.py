"""Native layers with groups of inputs and with inputs of fewer than 8 bits: the reference's bits on every level."""

import copy
import itertools
import pickle

import pytest
import torch
from packed_layers import make, rows_of

from fairseq.modules.quantization.packed import PackedLinear
from fairseq.modules.quantization.packed.input_grid import InputGrid
from fairseq.modules.quantization.packed.kernels import arguments, library, native, native_calls, reference
from fairseq.modules.quantization.scalar.tokens import quantize_static, quantize_tokens

pytestmark = pytest.mark.skipif(not native.levels(), reason=library.NOT_BUILT)
LEVELS = [native.level_names().index(name) for name in native.levels()]
SIZES = [(19, 70, 40), (33, 192, 65), (5, 300, 33), (1, 64, 31)]
"""Rows, inputs, outputs: the last group of 32, 48 or 112 inputs is shorter, and 128 are more than some layers have."""


def native_layer(level, x, layer):
    layer.use_native()
    return native_calls.run_linear(layer.prepared().linear, x, level)


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("level", LEVELS)
def test_layers_give_the_bits_of_the_reference(level, bits):
    for rows, inputs, outputs in SIZES:
        x = rows_of(rows, inputs)
        inputs_bits = itertools.product(("dynamic", "static"), (8, 7, 5, 4, 3, 2), (None, 32, 48, 112, 128))
        for activations, activation_bits, group in inputs_bits:
            layer = make(bits, "channel", activations, group, activation_bits=activation_bits, inputs=inputs,
                         outputs=outputs)  # fmt: skip
            expected = reference.integer(x, layer.weight_matrix, layer.bias, layer.input_grid)
            got = native_layer(level, x, layer)
            assert torch.equal(got, expected), (rows, inputs, outputs, activations, activation_bits, group)


@pytest.mark.parametrize("group", [32, 64, 96, 128])
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("level", LEVELS)
def test_weight_only_layers_are_within_the_rounding_of_their_sums(level, bits, group):
    for rows, inputs, outputs in SIZES:
        layer = make(bits, "channel", None, group, inputs=inputs, outputs=outputs)
        x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(1))
        halves, weight, bias = x.bfloat16().double(), layer.dequantize().double(), layer.bias.double()
        error = (native_layer(level, x, layer) - (halves @ weight.T + bias)).abs()
        # Each product with a code is exact; K sums, G products with a scale and G sums, and the bias round.
        roundings = inputs + 2 * -(-inputs // group) + 1
        size = halves.abs() @ weight.abs().T + bias.abs()
        assert bool((error <= roundings * torch.finfo(torch.float32).eps / 2 * 1.01 * size).all())


@pytest.mark.parametrize("level", LEVELS)
def test_weight_only_layers_add_their_groups_up_in_order(level):
    """One float32 after the other, in tiles of any number of rows: the bits of a layer for each group, added up."""
    layer = make(4, "channel", None, 64, inputs=160, outputs=40)
    integers, scale, zero, spans = layer.integers(), layer.scale, layer.zero_point, ((0, 64), (64, 128), (128, 160))
    groups = [
        PackedLinear.from_integers(
            integers[:, a:b], scale[:, g : g + 1], zero[:, g : g + 1], None, layer.config, "part"
        )
        for g, (a, b) in enumerate(spans)
    ]
    x = torch.randn(15, 160, generator=torch.Generator().manual_seed(2))
    for rows in range(1, 16):
        expected = torch.stack([native_layer(level, x[:rows, a:b].contiguous(), y) for (a, b), y in zip(spans, groups)])
        expected = (expected[0] + expected[1] + expected[2]) + layer.bias
        assert torch.equal(native_layer(level, x[:rows], layer), expected), rows


@pytest.mark.parametrize("level", LEVELS)
def test_the_largest_sums_of_a_group_are_exact(level):
    """128 inputs at an end of their range, codes and zero points at the ends of theirs."""
    config = make(8, "channel", "static", 128, inputs=256, outputs=32).config
    ends = torch.tensor([0, 255], dtype=torch.uint8)
    integers = ends.repeat_interleave(8).repeat(2)[:, None].expand(32, 256).contiguous()
    zero = ends.repeat(16)[:, None].expand(32, 2).contiguous()
    scale = torch.rand(32, 2, generator=torch.Generator().manual_seed(0)) + 0.5
    layer = PackedLinear.from_integers(integers, scale, zero, None, config, "ends", (-1.0, 1.0))
    for rows in range(1, 16):
        x = torch.where(torch.arange(rows) % 2 == 0, 5.0, -5.0)[:, None].expand(rows, 256).contiguous()
        expected = reference.integer(x, layer.weight_matrix, layer.bias, layer.input_grid)
        assert torch.equal(native_layer(level, x, layer), expected)


@pytest.mark.parametrize("settings", [("dynamic", 4), ("dynamic", 8), ("static", 4), (None, 8)], ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_what_is_not_finite_stays_in_its_row(level, settings):
    activations, bits = settings
    layer = make(4, "channel", activations, 32, activation_bits=bits, inputs=200, outputs=40)
    x = torch.randn(40, 200, generator=torch.Generator().manual_seed(0))
    clean = native_layer(level, x, layer)
    wrong = torch.tensor([0, 13, 14, 31, 39])
    numbers = torch.tensor([torch.nan, torch.nan, -torch.nan, torch.nan, torch.nan])
    if activations != "static":  # where what is infinite becomes the end of the range
        numbers[1], numbers[2] = torch.inf, -torch.inf
    x[wrong, torch.tensor([0, 31, 32, 199, 100])] = numbers
    got = native_layer(level, x, layer)
    assert not got[wrong].isfinite().any()
    others = torch.ones(40, dtype=torch.bool).scatter_(0, wrong, False)
    assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("level", LEVELS)
def test_rows_become_the_integers_of_the_definition(level, bits):
    x = rows_of(19, 171)
    x = torch.cat([x, 3e38 * x[:1].add(1), 3e38 * torch.tensor([[1.0, -1.0, 0.0]]).repeat(1, 57)])
    dynamic = make(8, "channel", "dynamic", 48, activation_bits=bits, inputs=171)
    static = make(8, "channel", "static", 48, activation_bits=bits, inputs=171)
    for layer in (dynamic, static):
        grid = layer.input_grid
        fixed = (grid.scale, grid.zero_point) if layer is static else None
        q, scale = quantize_tokens(x, bits) if fixed is None else quantize_static(x, *fixed, bits)
        layer.use_native()
        got, scales, sums = native_calls.quantize(x, layer.prepared(), level)
        assert torch.equal(got, q.to(torch.int8))
        assert torch.equal(scales, scale[:, 0])
        assert torch.equal(sums, torch.stack([part.sum(1) for part in q.split(48, 1)], 1).to(torch.int32))


@pytest.mark.parametrize("level", LEVELS)
def test_ranges_that_are_nearly_as_good_are_told_apart(level):
    """Tenths lie in the middle between two integers so often that in 31 of these rows another rounding would decide."""
    bits = 2
    x = torch.randint(-12, 13, (40_000, 8), generator=torch.Generator().manual_seed(0)) * 0.1
    layer = make(8, "channel", "dynamic", activation_bits=bits, inputs=8)
    q, scale = quantize_tokens(x, bits)
    layer.use_native()
    got, scales, _ = native_calls.quantize(x, layer.prepared(), level)
    assert torch.equal(scales, scale[:, 0])
    assert torch.equal(got, q.to(torch.int8))


def test_threads_and_residuals_change_nothing(monkeypatch):
    layer, x = make(4, "channel", "dynamic", 64, activation_bits=6, inputs=320, outputs=100), rows_of(500, 320)
    layer.use_native()
    residual = torch.randn(500, 100)
    expected = reference.integer(x, layer.weight_matrix, layer.bias, layer.input_grid)
    for level, threads in itertools.product(LEVELS, (1, 3)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        linear = layer.prepared().linear
        assert torch.equal(native_calls.run_linear(linear, x, level), expected)
        assert torch.equal(native_calls.run_linear(linear, x, level, residual=residual), residual + expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_layer_itself_runs_natively_and_takes_other_integers(bits):
    layer, other = (make(bits, "channel", "dynamic", 32, activation_bits=5, seed=seed) for seed in (0, 1))
    x = rows_of(19, layer.in_features).view(19, 1, -1)
    for inner in (layer, other):
        inner.use_native()
        assert inner.backend == "native"
        rows = reference.integer(x[:, 0], inner.weight_matrix, inner.bias, InputGrid(5))
        assert torch.equal(inner(x)[:, 0], rows)
    layer.load_state_dict(other.state_dict())  # sums of the codes, too, which above 4 bits are kept
    for same in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert same.backend == "native"
        assert torch.equal(same(x), other(x))
    layer.use_native(False)
    assert torch.equal(layer(x), other(x))


def test_scales_may_come_in_any_order():
    """As calibration gives them, a column of groups after the other."""
    layer, x = make(4, "channel", "dynamic", 32), rows_of(19, 75)
    layer.use_native()
    expected = layer(x)
    scale, zero_point = (t.T.contiguous().T for t in (layer.scale, layer.zero_point))
    assert not scale.is_contiguous()
    other = PackedLinear.from_integers(layer.integers(), scale, zero_point, layer.bias, layer.config)
    other.use_native()
    assert torch.equal(other(x), expected)
    layer.load_state_dict({**layer.state_dict(), "scale": scale, "zero_point": zero_point}, assign=True)
    assert torch.equal(layer(x), expected)


def test_tensors_of_other_groups_are_refused():
    layer = make(8, "channel", "dynamic", 32)
    layer.use_native()
    parts, sizes = layer.parts(), layer.sizes()
    assert sizes[-2:] == (8, 32)
    arguments.Prepared(parts, sizes)
    for place, name in ((1, "sums"), (2, "scale"), (3, "zero_point")):
        changed = [part if i != place else part[:, :2].contiguous() for i, part in enumerate(parts)]
        with pytest.raises(ValueError, match=rf"{name} must be a contiguous .* of shape \(21, 3\)"):
            arguments.Prepared(tuple(changed), sizes)
    for more in ((0, 8, 40), (0, 8, -16), (0, 8, 144), (1, 8, 48)):
        with pytest.raises(ValueError, match=rf"a native layer has no group_size={more[-1]}, which is no multiple of"):
            arguments.Prepared(parts, (*sizes[:3], *more))
    for bits in (0, 1, 9):
        with pytest.raises(ValueError, match="bits must be"):
            arguments.Prepared(parts, (*sizes[:3], 0, bits, 32))


@pytest.mark.parametrize(("halves", "form"), [(0, "layer"), (1, "weight-only layer")])
def test_a_level_whose_groups_are_wrong_is_not_used(monkeypatch, halves, form):
    run, portable = native_calls.run_linear, native.level_number("portable")

    def wrong(linear, x, level, **keywords):  # the last group is lost
        if linear.group_size and linear.halves == halves and level == portable:
            x = x.clone()
            x[:, linear.inputs // linear.group_size * linear.group_size :] = 0
        return run(linear, x, level, **keywords)

    monkeypatch.setattr(native_calls, "run_linear", wrong)
    native.levels.cache_clear()
    try:
        with pytest.warns(UserWarning, match=f"for portable are not used: their {form} with groups at 8 bits differs"):
            assert "portable" not in native.levels()
    finally:
        native.levels.cache_clear()
