"""A Linear weight as integers: per tensor, channel and group, affine and symmetric."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from fairseq.modules.quantization.scalar import ops, weights

WIDTHS = range(2, 9)
GRIDS = [("tensor", None), ("channel", None), ("channel", 32), ("histogram", None), ("histogram", 40)]


def some_weight(rows=6, columns=75, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@st.composite
def matrices(draw):
    """Weights of ragged widths: normal, one-sided, with an outlier or with rows of zeros; huge and tiny."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 90))
    w = some_weight(rows, columns, draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(["normal", "positive", "negative", "outlier", "zero row"]))
    if kind in ("positive", "negative"):
        w = w.abs() if kind == "positive" else -w.abs()
    elif kind != "normal":
        w[0] = 0
        w[0, -1] = 20.0 if kind == "outlier" else 0
    return w * draw(st.sampled_from([1.0, 1e30, 1e-30]))


def real(w, scale, zero_point, bits, group_size):
    return weights.weight_to_real(
        weights.weight_to_int(w, scale, zero_point, bits, group_size), scale, zero_point, group_size
    )


def row_errors(w, bits, method, group_size, symmetric):
    """The squared error of each row, in units of the largest weight."""
    got = real(w, *weights.observe_weight(w, bits, method, group_size, symmetric), bits, group_size)
    return ((got.double() - w.double()) / max(float(w.abs().max()), 1e-300)).square().sum(1)


# Groups.


@pytest.mark.parametrize(("columns", "group_size", "groups"), [(75, 32, 3), (64, 32, 2), (10, 32, 1), (129, 128, 2)])
def test_groups_are_split_and_joined(columns, group_size, groups):
    w = some_weight(4, columns)
    rows = weights.split_groups(w, group_size)
    assert rows.shape == (4 * groups, group_size)
    last = w[0, (groups - 1) * group_size :]  # of the first row
    assert torch.equal(rows[groups - 1, : len(last)], last)
    assert bool((rows.view(4, -1)[:, columns:] == 0).all())
    joined = weights.join_groups(rows, w.shape)
    assert torch.equal(joined, w)
    assert joined.is_contiguous()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", ["channel", "histogram"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_group_is_quantized_as_if_it_were_alone(bits, method, symmetric):
    """The last one, of 11 columns, too: what fills it up is 0, which every grid has."""
    w = some_weight()
    scale, zero_point = weights.observe_weight(w, bits, method, 32, symmetric)
    assert scale.shape == zero_point.shape == (6, 3)
    q = weights.weight_to_int(w, scale, zero_point, bits, 32)
    assert q.shape == w.shape
    for group, columns in enumerate((slice(0, 32), slice(32, 64), slice(64, 75))):
        part = w[:, columns]
        if method == "channel":
            alone = weights.observe_weight(part, bits, "channel", None, symmetric)
            assert torch.equal(scale[:, group], alone[0])
            assert torch.equal(zero_point[:, group], alone[1])
        own = scale[:, group], zero_point[:, group]
        assert torch.equal(q[:, columns], ops.quantize_to_int(part, *own, bits))
        expected = ops.dequantize(q[:, columns], *own)
        assert torch.equal(weights.weight_to_real(q, scale, zero_point, 32)[:, columns], expected)


def test_a_group_as_wide_as_the_row_gives_the_integers_of_no_groups():
    w = some_weight(columns=64)
    whole, grouped = (weights.observe_weight(w, 4, "channel", size) for size in (None, 64))
    assert grouped[0].shape == (6, 1)
    assert torch.equal(weights.weight_to_int(w, *whole, 4), weights.weight_to_int(w, *grouped, 4, 64))


@pytest.mark.parametrize("bits", [2, 4])
def test_groups_are_closer_than_channels_where_columns_differ(bits):
    w = some_weight(columns=96) * torch.logspace(0, 2, 96)
    assert bool((row_errors(w, bits, "channel", 32, False) < row_errors(w, bits, "channel", None, False)).all())


# What observe_weight returns.


@pytest.mark.parametrize(("method", "group_size"), GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_shapes_and_dtypes(method, group_size, dtype):
    scale, zero_point = weights.observe_weight(some_weight().to(dtype), 4, method, group_size)
    shape = (1,) if method == "tensor" else (6,) if group_size is None else (6, -(-75 // group_size))
    assert scale.shape == zero_point.shape == shape
    assert scale.dtype == torch.promote_types(dtype, torch.float32)
    assert zero_point.dtype == torch.int32


@pytest.mark.parametrize(("method", "observed"), [("tensor", "histogram"), ("channel", "channel")])
def test_without_groups_it_is_observe(method, observed):
    w = some_weight()
    w[0, 0] = 9  # "tensor" clips it, since one range for a layer is never its minimum and maximum
    expected = ops.observe(w, 4, observed)
    assert all(torch.equal(a, b) for a, b in zip(weights.observe_weight(w, 4, method), expected, strict=True))


def test_histogram_has_a_scale_per_channel():
    w = some_weight()
    scale, zero_point = weights.observe_weight(w, 4, "histogram")
    for row in range(6):
        alone = weights.observe_weight(w[row : row + 1], 4, "histogram")
        assert torch.equal(scale[row], alone[0][0])
        assert torch.equal(zero_point[row], alone[1][0])


@given(w=matrices(), bits=st.sampled_from(WIDTHS))
def test_symmetric_grids_of_a_tensor_are_centred(w, bits):
    _, zero_point = weights.observe_weight(w, bits, "tensor", symmetric=True)
    assert zero_point.tolist() == [2 ** (bits - 1)]


@pytest.mark.parametrize("group_size", [None, 32])
@given(w=matrices(), bits=st.sampled_from(WIDTHS))
def test_symmetric_grids_are_centred_and_hold_both_ends(group_size, w, bits):
    scale, zero_point = weights.observe_weight(w, bits, "channel", group_size, symmetric=True)
    assert bool((zero_point == 2 ** (bits - 1)).all())
    columns = torch.arange(w.shape[1]) // (group_size or w.shape[1])
    step = scale.reshape(len(w), -1)[:, columns].double()
    error = (real(w, scale, zero_point, bits, group_size).double() - w.double()).abs()
    # Every weight, so both ends; scale, w / scale and the product with scale, of up to 2**bits steps, are rounded.
    assert bool((error <= step * (0.5 + 4 * 2**bits * torch.finfo(torch.float32).eps)).all())


@pytest.mark.parametrize("bits", WIDTHS)
def test_symmetric_grid_exactly(bits):
    half = 2 ** (bits - 1)
    w = torch.tensor([[half - 1.0, -1.0], [1.0, -half], [half - 1.0, -half], [-half, -half]]) * 0.5
    scale, zero_point = weights.observe_weight(w, bits, "channel", symmetric=True)
    assert scale.tolist() == [0.5] * 4  # the smallest one that keeps both ends
    q = weights.weight_to_int(w, scale, zero_point, bits).int()
    assert (q - half).tolist() == (w * 2).int().tolist()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [None, 32])
@given(w=matrices(), bits=st.sampled_from(WIDTHS))
def test_histogram_is_never_worse_than_channel(symmetric, group_size, w, bits):
    clipped, full = (row_errors(w, bits, method, group_size, symmetric) for method in ("histogram", "channel"))
    # The search compares errors whose difference, scaling and square are each rounded in float32.
    assert bool((clipped <= full * (1 + 8 * torch.finfo(torch.float32).eps)).all())


@given(w=matrices(), bits=st.sampled_from(WIDTHS), grid=st.sampled_from(GRIDS), symmetric=st.booleans())
def test_zero_is_exact_and_integers_fit(w, bits, grid, symmetric):
    method, group_size = grid
    w[:, 0] = 0
    scale, zero_point = weights.observe_weight(w, bits, method, group_size, symmetric)
    q = weights.weight_to_int(w, scale, zero_point, bits, group_size)
    assert q.dtype == torch.uint8
    assert q.shape == w.shape
    assert int(q.max()) < 2**bits
    assert bool((weights.weight_to_real(q, scale, zero_point, group_size)[:, 0] == 0).all())


# Refusals.


@pytest.mark.parametrize("size", [24, 31, 33, 36, 136, 0, -32])
def test_other_group_sizes_are_refused(size):
    with pytest.raises(ValueError, match=f"from 32 to 128 in steps of 8, got {size}"):
        weights.check_group_size(size, "channel")


def test_group_sizes_of_another_kind_are_refused():
    for size in (32.0, "32", True):
        with pytest.raises(TypeError, match="group_size must be None or an int"):
            weights.check_group_size(size, "channel")
    with pytest.raises(ValueError, match="takes no group_size; use channel or histogram"):
        weights.observe_weight(some_weight(), 4, "tensor", 32)


def test_a_weight_that_is_not_finite_is_named():
    w = some_weight()
    w[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"query\.weight has 1 NaN or Inf"):
        weights.observe_weight(w, 4, "channel", name="query.weight")


def test_gradients_are_not_followed():
    w = some_weight().requires_grad_()
    scale, zero_point = weights.observe_weight(w, 4, "channel", 32)
    assert not scale.requires_grad
    assert not weights.weight_to_real(
        weights.weight_to_int(w, scale, zero_point, 4, 32), scale, zero_point, 32
    ).requires_grad
