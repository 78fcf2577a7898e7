"""Rounding: less output error than nearest on real correlations, never more, and single steps cannot improve it."""

import pytest
import torch
from bounds import sum_error

from fairseq.modules.quantization.packed.config import LinearConfig
from fairseq.modules.quantization.scalar.weights import observe_weight, weight_to_int, weight_to_real
from fairseq.quantization.config import resolve_rounding
from fairseq.quantization.rounding.gptq import (
    Statistics,
    damped,
    drift_corrected,
    grid_used,
    inverse_factor,
    round_weight,
)

SETTINGS = [
    {"method": "tensor"}, {"method": "channel"}, {"method": "histogram"}, {"method": "channel", "group_size": 32},
    {"method": "histogram", "symmetric": True}, {"method": "tensor", "symmetric": True},
]  # fmt: skip


def layer(outputs=24, inputs=80, tokens=400, seed=0):
    """A weight and inputs that are correlated, of unequal size and not centred, as a transformer's are."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(outputs, inputs, generator=generator) * torch.rand(outputs, 1, generator=generator)
    mix = torch.randn(12, inputs, generator=generator)
    x = torch.randn(tokens, 12, generator=generator) @ mix + 0.3 * torch.randn(tokens, inputs, generator=generator)
    return w, x * (1 + 3 * torch.rand(inputs, generator=generator)) + 0.5


def statistics(x):
    return Statistics(x.T @ x / len(x), x.mean(0))


def drifted(x, exact):
    """Statistics of inputs ``x`` that were ``exact`` in the float model."""
    drift = exact - x
    return statistics(x)._replace(drift=drift.T @ x / len(x), drift_mean=drift.mean(0), samples=float(len(x)))


def noisy(exact, share, seed=1):
    """What layers before make of their rounding: an error that is correlated with the inputs, and some that is not."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(exact.shape[1], exact.shape[1], generator=generator) / exact.shape[1] ** 0.5
    return exact + share * (exact @ mix + exact.std() * torch.randn(exact.shape, generator=generator))


def real(rounded, config):
    return weight_to_real(*rounded, config.group_size)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_gptq_errs_less_at_the_output_and_more_in_the_weight(settings, bits):
    config = LinearConfig(bits=bits, **settings)
    w, x = layer()
    got, plain = (real(round_weight(w, s, config), config) for s in (statistics(x), None))
    output = [(x @ (r - w).T).square().sum().item() for r in (got, plain)]
    weight = [(r - w).square().sum().item() for r in (got, plain)]
    assert output[0] < 0.7 * output[1]
    if settings["method"] == "histogram":  # the other two start from a wider range
        assert weight[0] > weight[1]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_no_single_step_lowers_the_error(settings):
    config = LinearConfig(bits=3, **settings)
    w, x = layer(6, 64)
    rounded = round_weight(w, statistics(x), config)
    h = damped(statistics(x).second_moment, w)

    def error(q):
        d = (weight_to_real(q, *rounded[1:], config.group_size) - w).double()
        return ((d @ h) * d).sum(1)

    base = error(rounded.integers)
    improved = 0
    for column in range(w.shape[1]):
        for step in (-1, 1):
            q = rounded.integers.to(torch.int16)
            q[:, column] = (q[:, column] + step).clamp(0, 7)
            improved += int((error(q.to(torch.uint8)) < base * (1 - sum_error(w.shape[1], 1.0))).sum())
    assert improved <= 0.02 * w.numel()  # two sweeps leave next to nothing


@pytest.mark.parametrize("kind", ["rank one", "one token", "dead inputs", "all dead", "identity"])
@pytest.mark.parametrize("method", ["tensor", "channel"])
def test_never_worse_than_nearest_whatever_the_inputs(kind, method):
    w, x = layer(8, 40)
    h = statistics(x).second_moment
    if kind == "rank one":
        h = torch.outer(x[0], x[0])
    elif kind == "one token":
        h = x[:1].T @ x[:1] * 1e-12
    elif kind == "dead inputs":
        h[:10], h[:, :10] = 0, 0
    elif kind == "all dead":
        h = torch.zeros_like(h)
    else:
        h = torch.eye(40)
    config = LinearConfig(bits=4, method=method)
    got = round_weight(w, Statistics(h, x.mean(0)), config)
    searched = LinearConfig(bits=4, method="histogram" if method == "channel" else method)
    plain = round_weight(w, None, searched)
    matrix = damped(h, w)
    changes = [(real(r, config) - w).double() for r in (got, plain)]
    errors = [((d @ matrix) * d).sum().item() for d in changes]
    assert torch.isfinite(real(got, config)).all()
    magnitude = max(((d.abs() @ matrix.abs()) * d.abs()).sum().item() for d in changes)
    assert errors[0] <= errors[1] + sum_error(2 * w.shape[1], magnitude)  # which it compares in float32


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_shapes_and_ranges_are_those_of_observe_weight(settings):
    config = LinearConfig(bits=4, **settings)
    w, x = layer()
    scale, zero_point = observe_weight(w, 4, config.method, config.group_size, config.symmetric)
    for data in (None, statistics(x)):
        rounded = round_weight(w, data, config)
        assert rounded.integers.shape == w.shape
        assert rounded.integers.dtype == torch.uint8
        assert int(rounded.integers.max()) <= 15
        assert (rounded.scale.shape, rounded.zero_point.shape) == (scale.shape, zero_point.shape)
        if config.symmetric:
            assert (rounded.zero_point == 8).all()
    plain = round_weight(w, None, config)
    assert torch.equal(plain.integers, weight_to_int(w, scale, zero_point, 4, config.group_size))


@pytest.mark.parametrize(
    ("method", "group_size", "granularity"),
    [
        ("tensor", None, "tensor"),
        ("channel", None, "channel"),
        ("histogram", None, "channel"),
        ("channel", 40, "group"),
    ],
)
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_what_is_said_of_the_grid_is_what_was_done(method, group_size, granularity, rounding):
    """Every row has outliers, which a range of least squared error at 2 bits leaves out."""
    w, x = layer()
    w[:, ::40] = 12 * w.std()
    config = LinearConfig(bits=2, method=method, group_size=group_size)
    rounded = round_weight(w, None if rounding == "nearest" else statistics(x), config, rounding)
    used = grid_used(config, rounding)
    assert used["granularity"] == granularity
    assert rounded.scale.numel() == {"tensor": 1, "channel": len(w), "group": 2 * len(w)}[granularity]
    full = observe_weight(w, 2, "channel", group_size)[0]
    exact = rounded.scale.numel() == full.numel() and torch.equal(rounded.scale, full)
    assert used["range_search"] == ("min-max" if exact else "least squared error")
    assert exact == (method == "channel" and rounding == "nearest")


def test_the_same_input_gives_the_same_integers_and_nothing_is_written():
    w, x = layer()
    data, before = statistics(x), w.clone()
    moment = data.second_moment.clone()
    first, second = (round_weight(w, data, LinearConfig(bits=4, method="channel")) for _ in range(2))
    assert torch.equal(first.integers, second.integers)
    assert torch.equal(w, before)
    assert torch.equal(data.second_moment, moment)


def test_the_damping_grows_until_it_can_be_factorized():
    w, x = layer()
    h = damped(statistics(x).second_moment, w)
    factor = inverse_factor(h - 3 * h.diagonal().mean() * torch.eye(len(h)))  # far from positive definite
    assert torch.isfinite(factor).all()
    assert (factor.diagonal() > 0).all()


def test_the_scales_of_the_inputs_do_not_matter():
    """Small integers, scales and a number of tokens that are powers of two: every sum is exact, in whatever order."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randint(-9, 10, (24, 80), generator=generator).float()
    x = torch.randint(-9, 10, (256, 80), generator=generator).float()
    r = torch.randint(-1, 3, (80,), generator=generator).float().exp2()
    h, scaled = damped(statistics(x).second_moment, w), damped(statistics(x * r).second_moment, w / r)
    assert torch.equal(scaled, h * torch.outer(r, r).double())


def test_the_factor_is_that_of_the_inverse():
    w, x = layer()
    h = damped(statistics(x).second_moment, w)
    factor = inverse_factor(h)
    assert torch.equal(factor, factor.triu())
    error = len(h) * sum_error(len(h), float(torch.linalg.cond(h)), h.dtype)  # Higham, 2002, section 14.3
    torch.testing.assert_close(factor.T @ factor @ h, torch.eye(len(h), dtype=h.dtype), atol=error, rtol=0)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_gptaq_comes_nearer_to_the_float_output_on_other_inputs_too(settings):
    config = LinearConfig(bits=4, **settings)
    w, exact = layer(tokens=4000)
    x = noisy(exact, 0.1)
    half = len(x) // 2
    data = drifted(x[:half], exact[:half])
    errors = {}
    for rounding in ("nearest", "gptq", "gptaq"):
        got = real(round_weight(w, data, config, rounding), config)
        errors[rounding] = [
            (x[part] @ got.T - exact[part] @ w.T).square().sum().item()
            for part in (slice(None, half), slice(half, None))
        ]
    for tokens in (0, 1):  # those that it has seen, and others
        assert errors["gptaq"][tokens] < 0.8 * errors["gptq"][tokens] < 0.8 * errors["nearest"][tokens]


@pytest.mark.parametrize("share", [0.0, 0.01, 1.0, 100.0])
@pytest.mark.parametrize("tokens", [2, 40, 4000])
def test_gptaq_never_errs_more_than_nearest(share, tokens):
    w, exact = layer(8, 40, tokens)
    x = noisy(exact, share)
    got, plain = (
        real(round_weight(w, drifted(x, exact), LinearConfig(bits=4, method="histogram"), rounding), LinearConfig())
        for rounding in ("gptaq", "nearest")
    )
    errors = [(x @ r.T - exact @ w.T).square().sum().item() for r in (got, plain)]
    assert errors[0] <= errors[1]


def test_without_a_drift_gptaq_is_gptq():
    w, x = layer()
    config = LinearConfig(bits=4, method="channel")
    expected = round_weight(w, statistics(x), config, "gptq").integers
    for data, rounding in ((drifted(x, x), "gptaq"), (statistics(x), "auto")):
        assert torch.equal(round_weight(w, data, config, rounding).integers, expected)


def test_the_correction_is_least_squares_and_shrinks_with_the_samples(monkeypatch):
    w, exact = layer(6, 40, 2000)
    x = noisy(exact, 0.1)
    data = drifted(x.double(), exact.double())
    monkeypatch.setattr("fairseq.quantization.rounding.gptq.CORRECTION", 1.0)
    expected = torch.linalg.lstsq(x.double(), exact.double() @ w.double().T).solution.T
    moves = []
    for samples in (1e12, 1000.0, 10.0, 0.1):
        got = drift_corrected(w.double(), data._replace(samples=samples))
        moves.append((got - w).norm().item())
        if samples == 1e12:
            h = data.second_moment  # with D added to H, its inverse changes by |D| / |H's least eigenvalue|
            added = (damped(h, w.double(), w.shape[1] / samples) - h).diagonal().max() / torch.linalg.eigvalsh(h)[0]
            assert (got - expected).norm() <= added * (expected - w).norm()
    assert moves == sorted(moves, reverse=True)
    assert moves[-1] < 0.01 * moves[0]


def test_auto_takes_what_the_data_allow():
    assert (resolve_rounding("auto", True), resolve_rounding("auto", False), resolve_rounding("nearest", True)) == (
        "gptaq",
        "nearest",
        "nearest",
    )


@pytest.mark.parametrize(
    ("rounding", "data", "message"),
    [
        ("best", None, "rounding must be one of 'auto', 'nearest', 'gptq', 'gptaq'; got 'best'"),
        ("gptq", None, "fc1: rounding='gptq' needs calibration images"),
        ("gptaq", statistics(torch.ones(2, 80)), "fc1: rounding='gptaq' needs statistics with the drift of its inputs"),
        ("auto", Statistics(torch.eye(3), torch.zeros(3)), r"fc1: the second moment must be of shape \(80, 80\)"),
        ("auto", Statistics(torch.full((80, 80), torch.nan), torch.zeros(80)), "fc1: the second moment of its inputs"),
    ],
)
def test_errors_name_the_layer(rounding, data, message):
    with pytest.raises(ValueError, match=message):
        round_weight(layer()[0], data, LinearConfig(), rounding, "fc1")
