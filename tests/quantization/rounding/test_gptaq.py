"""gptaq: each layer makes up for the error of those before, also on inputs that it has not seen."""

import pytest
import torch
from layer_inputs import SETTINGS, drifted, errors_after_drift, layer, noisy, real, statistics

from fairseq.modules.quantization.packed.config import LinearConfig
from fairseq.quantization.rounding.gptaq import drift_corrected
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
    config = LinearConfig(bits=5, method="channel")
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
