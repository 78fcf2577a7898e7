"""gptq: less output error than nearest on real correlations, never more, and single steps cannot improve it."""

import pytest
import torch
from bounds import sum_error
from layer_inputs import SETTINGS, layer, real, statistics

from fairseq.modules.quantization.packed.config import LinearConfig
from fairseq.modules.quantization.scalar.weights import weight_to_real
from fairseq.quantization.rounding.round_weight import round_weight
from fairseq.quantization.rounding.second_moment import damped
from fairseq.quantization.rounding.statistics import Statistics


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_gptq_errs_less_at_the_output_and_more_in_the_weight(settings, bits):
    config = LinearConfig(bits=bits, **settings)
    w, x = layer()
    got, plain = (real(round_weight(w, statistics(x), config, rounding), config) for rounding in ("gptq", "nearest"))
    output = [(x @ (r - w).T).square().sum().item() for r in (got, plain)]
    weight = [(r - w).square().sum().item() for r in (got, plain)]
    assert output[0] < 0.7 * output[1]
    if settings["method"] == "histogram":  # the other two start from a wider range
        assert weight[0] > weight[1]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_no_single_step_lowers_the_error(settings):
    config = LinearConfig(bits=3, **settings)
    w, x = layer(6, 64)
    rounded = round_weight(w, statistics(x), config, "gptq")
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
    got = round_weight(w, Statistics(h, x.mean(0)), config, "gptq")
    searched = LinearConfig(bits=4, method="histogram" if method == "channel" else method)
    plain = round_weight(w, None, searched)
    matrix = damped(h, w)
    changes = [(real(r, config) - w).double() for r in (got, plain)]
    errors = [((d @ matrix) * d).sum().item() for d in changes]
    assert torch.isfinite(real(got, config)).all()
    magnitude = max(((d.abs() @ matrix.abs()) * d.abs()).sum().item() for d in changes)
    assert errors[0] <= errors[1] + sum_error(2 * w.shape[1], magnitude)  # which it compares in float32
