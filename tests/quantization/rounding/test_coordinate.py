"""coordinate: the error falls from its start, also at the output of other inputs, and scales are least squares."""

import pytest
import torch
from bounds import sum_error
from layer_inputs import SETTINGS, errors_after_drift, layer, real, statistics

from fairseq.modules.quantization.packed.config import LinearConfig
from fairseq.quantization.rounding import coordinate as module
from fairseq.quantization.rounding.coordinate import _refit, coordinate, in_turns
from fairseq.quantization.rounding.gptq import compensated, descend, per_weight
from fairseq.quantization.rounding.second_moment import damped


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("bits", [2, 3])
def test_the_error_falls_from_its_start(settings, bits):
    config = LinearConfig(bits=bits, **settings)
    w, x = layer()
    h = damped(statistics(x).second_moment, w)
    start = compensated(w, h, config)
    rounded = in_turns(w, h, config, start)
    changes = [(real(r, config) - w).double() for r in (rounded, start)]
    errors = [((d @ h) * d).sum(1) for d in changes]
    magnitude = ((changes[1].abs() @ h.abs()) * changes[1].abs()).sum(1)
    assert errors[0].sum() < (0.97 if config.group_size else 1) * errors[1].sum()
    if config.method != "tensor":  # no output channel loses
        assert (errors[0] <= errors[1] + sum_error(2 * w.shape[1], magnitude.max().item())).all()
    assert torch.equal(rounded.zero_point, start.zero_point)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("bits", [2, 3])
def test_it_comes_nearer_to_the_float_output_on_other_inputs_too(settings, bits):
    config = LinearConfig(bits=bits, **settings)
    for least, other in zip(*errors_after_drift(("coordinate", "gptaq"), config), strict=True):
        assert least < 0.95 * other


@pytest.mark.parametrize("settings", [{"method": "histogram"}, {"method": "histogram", "group_size": 32}], ids=str)
def test_the_scales_are_least_squares(settings):
    """Of 80 inputs in groups of 32 the last group is shorter; one group is all zero points, and keeps its scale."""
    config = LinearConfig(bits=3, **settings)
    w, x = layer(6)
    h = damped(statistics(x).second_moment, w)
    start = compensated(w, h, config)
    units = start.integers.float() - per_weight(start.zero_point, w.shape, config.group_size)
    units[0, :32] = 0
    scale = _refit(h.float(), (h @ w.T.double()).float(), units.T, start.scale, config).view(6, -1)
    root = torch.linalg.cholesky(h).T  # |root d|^2 = d H d
    size = config.group_size or 80
    for channel in range(1 if config.group_size is None else 0, 6):
        columns = torch.zeros(80, scale.shape[1], dtype=torch.float64)
        for group in range(scale.shape[1]):
            columns[group * size : (group + 1) * size, group] = units[channel, group * size : (group + 1) * size]
        used = columns.abs().sum(0) > 0
        best = torch.linalg.lstsq(root @ columns[:, used], (root @ w[channel].double())[:, None]).solution[:, 0]
        assert (best > 0).all()
        torch.testing.assert_close(scale[channel, used].double(), best, rtol=1e-4, atol=0)
        assert torch.equal(scale[channel, ~used], start.scale.view(6, -1)[channel, ~used])


def test_a_wide_layer_has_one_round(monkeypatch):
    w, x = layer()
    config = LinearConfig(bits=3, method="channel")
    counts = []
    for most in (w.numel(), w.numel() - 1):
        monkeypatch.setattr(module, "WIDE", most)
        done = []
        monkeypatch.setattr(module, "descend", lambda *given, done=done: (done.append(1), descend(*given))[1])
        coordinate(w, statistics(x), config)
        counts.append(len(done))
    assert counts[0] > 1
    assert counts[1] == 1


@pytest.mark.parametrize("kind", ["dead inputs", "all dead", "one token"])
def test_whatever_the_inputs_the_weight_stays_finite(kind):
    w, x = layer(8, 40)
    x = {"dead inputs": x * (torch.arange(40) > 10), "all dead": 0 * x, "one token": 1e-6 * x[:1]}[kind]
    config = LinearConfig(bits=2, method="channel")
    rounded = coordinate(w, statistics(x), config)
    assert torch.isfinite(real(rounded, config)).all()
    assert (rounded.scale > 0).all()
