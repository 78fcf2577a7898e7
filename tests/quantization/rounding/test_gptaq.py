"""gptaq: each layer makes up for the error of those before, also on inputs that it has not seen."""

import pytest
import torch
from layer_inputs import SETTINGS, drifted, errors_after_drift, layer, noisy, real, statistics

from fairseq.modules.quantization.packed.config import LinearConfig
from fairseq.quantization.rounding.gptaq import LEAST_RIDGE, MOST_RIDGE, drift_corrected, shrinkage_between
from fairseq.quantization.rounding.round_weight import round_weight
from fairseq.quantization.rounding.second_moment import damped


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_gptaq_comes_nearer_to_the_float_output_on_other_inputs_too(settings):
    config = LinearConfig(bits=4, **settings)
    for nearest, gptq, gptaq in zip(*errors_after_drift(("nearest", "gptq", "gptaq"), config), strict=True):
        assert gptaq < 0.8 * gptq < 0.8 * nearest


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


def test_the_correction_is_least_squares_and_shrinks_with_the_samples():
    w, exact = layer(6, 40, 2000)
    x = noisy(exact, 0.1)
    data = drifted(x.double(), exact.double())
    expected = torch.linalg.lstsq(x.double(), exact.double() @ w.double().T).solution.T
    moves = []
    for samples in (1e12, 1000.0, 10.0, 0.1):
        got = drift_corrected(w.double(), data._replace(samples=samples), 1.0)
        moves.append((got - w).norm().item())
        if samples == 1e12:
            h = data.second_moment  # with D added to H, its inverse changes by |D| / |H's least eigenvalue|
            added = (damped(h, w.double(), w.shape[1] / samples) - h).diagonal().max() / torch.linalg.eigvalsh(h)[0]
            assert (got - expected).norm() <= added * (expected - w).norm()
    assert moves == sorted(moves, reverse=True)
    assert moves[-1] < 0.01 * moves[0]


def in_halves(x, exact):
    """Statistics as of calibration: of all tokens, and of both halves of them."""
    half = len(x) // 2
    return drifted(x, exact)._replace(halves=(drifted(x[:half], exact[:half]), drifted(x[half:], exact[half:])))


@pytest.mark.parametrize("share", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("tokens", [60, 400, 4000])
def test_shrinkage_is_what_serves_the_other_half_best(share, tokens):
    """Found by running: each half's correction on the other half's tokens, for each damping and share of a grid."""
    w, exact = layer(8, 40, tokens)
    x = noisy(exact, share)
    data = in_halves(x, exact)
    found = shrinkage_between(w, data.halves)
    parts = [(x[: tokens // 2], exact[: tokens // 2]), (x[tokens // 2 :], exact[tokens // 2 :])]

    def error(ridge, taken):
        total = 0.0
        for half, (a, b) in zip(data.halves, reversed(parts), strict=True):
            h = damped(half.second_moment, w, ridge * w.shape[1] / half.samples).float()
            change = torch.linalg.solve(h, (w @ half.drift).T).T
            total += float((a @ (w + taken * change).T - b @ w.T).square().sum()) / len(a)
        return total

    ridges = [4.0**power for power in range(-3, 6)]
    assert (ridges[0], ridges[-1]) == (LEAST_RIDGE, MOST_RIDGE)
    least = min(error(ridge, taken / 20) for ridge in ridges for taken in range(21))
    assert error(*found) <= 1.01 * least


def test_few_tokens_and_much_noise_are_damped_more():
    generator = torch.Generator().manual_seed(0)
    x, mix, noise = (torch.randn(*shape, generator=generator) for shape in ((80, 40), (40, 6), (80, 6)))
    lost = x @ mix / 5 + 3 * noise
    one, other = (
        statistics(a)._replace(missing=b.T @ a / len(a), samples=float(len(a)))
        for a, b in zip(x.split(40), lost.split(40), strict=True)
    )
    assert shrinkage_between(torch.ones(6, 40), (one, other)).ridge > 1


def test_what_does_not_repeat_is_not_made_up_for():
    """The other half wants the opposite: nothing is taken; and where both want the same, nearly all is."""
    w, exact = layer(6, 40, 4000)
    data = in_halves(noisy(exact, 0.1), exact)
    one, other = data.halves
    against = other._replace(second_moment=one.second_moment, drift=-one.drift)
    assert shrinkage_between(w, (one, against)).share == 0
    assert torch.equal(drift_corrected(w, data._replace(halves=(one, against))), w)
    assert shrinkage_between(w, (one, other)).share > 0.9


def test_few_tokens_do_less_harm_on_others_with_halves():
    """32 tokens, 80 inputs, and an error that is noise for the most part."""
    errors = []
    for seed in range(8):
        w, exact = layer(24, 80, 4032, seed)
        x = noisy(exact, 0.5, seed + 100)
        data = in_halves(x[:32], exact[:32])
        errors.append([
            float((x[32:] @ drift_corrected(w, given, 1.0).T - exact[32:] @ w.T).square().sum())
            for given in (data, data._replace(halves=None))
        ])  # fmt: skip
    with_halves, without = torch.tensor(errors).log().mean(0).tolist()
    assert with_halves < without
