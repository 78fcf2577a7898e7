"""two_sided: output by output as the plain loop says, less error where outputs are correlated, and on other inputs."""

import pytest
import torch
from layer_inputs import SETTINGS, layer, real, statistics

from fairseq.modules.quantization.packed.config import LinearConfig
from fairseq.quantization.rounding import two_sided as module
from fairseq.quantization.rounding.gptq import _compensate, compensated, per_weight
from fairseq.quantization.rounding.round_weight import round_weight
from fairseq.quantization.rounding.second_moment import damped
from fairseq.quantization.rounding.statistics import OutputMoment
from fairseq.quantization.rounding.two_sided import DAMPING, two_sided


def moments(outputs, blocks=1, rank=4, samples=1e6):
    """What is behind the outputs sees ``rank`` of their directions above all, in each block."""
    generator = torch.Generator().manual_seed(9)
    sizes = [len(part) for part in torch.arange(outputs).tensor_split(blocks)]
    seen = [torch.randn(rank, size, generator=generator) for size in sizes]
    found = [a.T @ a + 0.05 * torch.eye(a.shape[1]) for a in seen]
    return OutputMoment(tuple(g / g.diagonal().mean() for g in found), samples)


def whole(moment):
    """G with its damping, (out, out), float64."""
    shares = [(DAMPING + len(g) / moment.samples) * g.diagonal().mean() for g in moment.blocks]
    return torch.block_diag(*(g.double() + s * torch.eye(len(g)) for g, s in zip(moment.blocks, shares, strict=True)))


def error(rounded, w, h, g, config):
    d = (real(rounded, config) - w).double()
    return float((g * (d @ h @ d.T)).sum())


def started(outputs=24, inputs=80, bits=3, **settings):
    config = LinearConfig(bits=bits, **(settings or {"method": "channel"}))
    w, x = layer(outputs, inputs)
    h = damped(statistics(x).second_moment, w)
    return w, h, compensated(w, h, config), config


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(("bits", "blocks"), [(2, 1), (3, 2), (4, 1)])
def test_the_error_falls_from_its_start(settings, bits, blocks):
    w, h, start, config = started(37, 75, bits, **settings)
    outputs = moments(37, blocks)
    rounded = two_sided(w, h, start, config, outputs)
    assert error(rounded, w, h, whole(outputs), config) < 0.8 * error(start, w, h, whole(outputs), config)
    assert torch.equal(rounded.scale, start.scale)
    assert torch.equal(rounded.zero_point, start.zero_point)


def test_groups_and_panels_give_what_one_output_and_one_column_after_the_other_do(monkeypatch):
    """In float64: the order of sums is another."""
    monkeypatch.setattr(module, "OUTPUTS", 1)
    monkeypatch.setattr(module, "INPUTS", 5)
    w, h, start, _ = started(11, 23)
    g = whole(moments(11))
    scale, zero_point = (per_weight(p, w.shape, None).double() for p in start[1:])
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    got = module._rounded(w.double(), g, upper, scale, zero_point, 7)

    order = torch.argsort(g.diagonal(), descending=True, stable=True).tolist()
    expected, change = torch.zeros(11, 23).double(), torch.zeros(11, 23).double()
    for place, row in enumerate(order):
        done, rest = order[:place], order[place:]
        target = w[row].double()
        if done:
            free = torch.linalg.solve(g[rest][:, rest], -g[rest][:, done] @ change[done])  # the best for those before
            target = target + free[0]
        left = target.clone()
        for column in range(23):
            s, z = scale[row, column], zero_point[row, column]
            integer = (left[column] / s + z).round().clamp(0, 7)
            missed = (left[column] - (integer - z) * s) / upper[column, column]
            left = left - missed * torch.where(torch.arange(23) >= column, upper[column], 0)
            expected[row, column] = integer
            change[row, column] = (integer - z) * s - w[row, column].double()
    assert torch.equal(got, expected)


@pytest.mark.parametrize("group", [1, 3, 8, 64])
def test_outputs_that_do_not_matter_to_one_another_are_rounded_as_by_gptq(monkeypatch, group):
    monkeypatch.setattr(module, "OUTPUTS", group)
    w, h, start, _ = started(24, 80)
    scale, zero_point = (per_weight(p, w.shape, None).double() for p in start[1:])
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    g = torch.diag(torch.rand(24, generator=torch.Generator().manual_seed(2)).double() + 0.1)
    got = module._rounded(w.double(), g, upper, scale, zero_point, 7)
    expected = _compensate(w.double().T, w[:, 0].double(), upper, scale.T, zero_point.T, 7)
    assert torch.equal(got, expected.T)


def test_outputs_that_nothing_feels_are_left():
    w, h, start, config = started()
    outputs = moments(24, 2)
    silent = outputs._replace(blocks=(torch.zeros_like(outputs.blocks[0]), outputs.blocks[1]))
    rounded = two_sided(w, h, start, config, silent)
    assert torch.equal(rounded.integers[:12], start.integers[:12])
    assert not torch.equal(rounded.integers[12:], start.integers[12:])


def test_the_model_errs_less_on_other_inputs_too():
    """What follows sees 4 directions of 24 outputs, and its gradients are from 50 tokens."""
    config = LinearConfig(bits=3, method="channel")
    w, x = layer(24, 80, 1000)
    behind = torch.randn(4, 24, generator=torch.Generator().manual_seed(1))
    probes = torch.randn(50, 4, generator=torch.Generator().manual_seed(2)) @ behind
    outputs = OutputMoment((probes.T @ probes / probes.square().sum() * 24,), 50.0)
    data = statistics(x[:500])._replace(drift=torch.zeros(80, 80), drift_mean=torch.zeros(80), samples=500.0)
    errors = []
    for rounding in ("gptaq", "coordinate"):
        for known in (None, outputs):
            got = real(round_weight(w, data._replace(outputs=known), config, rounding), config)
            errors.append(float((x[500:] @ (got - w).T @ behind.T).square().sum()))
    assert errors[1] < 0.6 * errors[0]
    assert errors[3] < 0.6 * errors[2]


def test_without_moments_and_at_eight_bits_nothing_changes():
    w, h, start, config = started()
    assert two_sided(w, h, start, config, None) is start
    w, h, start, config = started(bits=8)
    assert two_sided(w, h, start, config, moments(24)) is start


def test_what_does_not_help_is_left(monkeypatch):
    w, h, start, config = started()
    monkeypatch.setattr(module, "_rounded", lambda w, *others: torch.zeros_like(w))
    assert torch.equal(two_sided(w, h, start, config, moments(24)).integers, start.integers)


@pytest.mark.parametrize("kind", ["one direction", "one output", "dead inputs"])
def test_whatever_the_moments_the_weight_stays_finite(kind):
    w, h, start, config = started(1 if kind == "one output" else 24)
    g = torch.eye(len(w))
    if kind == "one direction":
        g = torch.ones(24, 24)
    if kind == "dead inputs":
        h = torch.eye(80).double() * 1e-30
    rounded = two_sided(w, h, start, config, OutputMoment((g,), 1.0))
    assert torch.isfinite(real(rounded, config)).all()
    assert rounded.integers.max() <= 7


def test_moments_of_rescaled_outputs_count_the_same_errors():
    outputs = moments(24, 2)
    factor = torch.rand(24, generator=torch.Generator().manual_seed(3)) + 0.5
    d = torch.randn(24, 80, generator=torch.Generator().manual_seed(4))
    before, after = (
        float((torch.block_diag(*m.blocks) * (e @ e.T)).sum())
        for m, e in ((outputs, d), (outputs.rescaled(factor), d * factor[:, None]))
    )
    assert after == pytest.approx(before, rel=1e-5)


def test_single_steps_take_more_off(monkeypatch):
    w, h, start, config = started()
    outputs, errors = moments(24), []
    for sweeps in (0, 2):
        monkeypatch.setattr(module, "SWEEPS", sweeps)
        errors.append(error(two_sided(w, h, start, config, outputs), w, h, whole(outputs), config))
    assert errors[1] < errors[0]


def test_few_samples_are_believed_less():
    """Gradients of 12 tokens, of 24 outputs that matter alike: taken for many they do harm."""
    w, h, start, config = started()
    g = torch.randn(12, 24, generator=torch.Generator().manual_seed(5))
    block = g.T @ g / 12
    errors = [
        error(two_sided(w, h, start, config, OutputMoment((block,), samples)), w, h, torch.eye(24).double(), config)
        for samples in (12.0, 1e9)
    ]
    assert errors[0] < 0.9 * errors[1]
