"""Weights with inputs as a transformer's layers have them, what rounding before makes of these, and statistics."""

import torch

from fairseq.modules.quantization.scalar.weights import weight_to_real
from fairseq.quantization.rounding.round_weight import round_weight
from fairseq.quantization.rounding.statistics import Statistics

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


def errors_after_drift(roundings, config):
    """For each rounding the squared error of the output on tokens that it has seen, and on others, after drift."""
    w, exact = layer(tokens=4000)
    x = noisy(exact, 0.1)
    half = len(x) // 2
    data = drifted(x[:half], exact[:half])
    weights = [real(round_weight(w, data, config, rounding), config) for rounding in roundings]
    parts = slice(None, half), slice(half, None)
    return [[float((x[part] @ got.T - exact[part] @ w.T).square().sum()) for part in parts] for got in weights]
