"""Packed layers of odd sizes for the tests, and inputs for them."""

import torch
from torch import nn

from fairseq.modules.quantization.packed import LinearConfig, PackedLinear

OUT, IN = 21, 75
"""The last group of 32 or 40 inputs is shorter than the others, and no width is a multiple of anything."""
GRIDS = [("tensor", None), ("channel", None), ("channel", 32), ("histogram", None), ("histogram", 40)]
"""Method and group_size."""
INPUTS = [("dynamic", 8), ("dynamic", 4), ("static", 8), ("static", 5), (None, 8)]
"""activations and activation_bits."""
RANGE = (-1.7, 3.2)


def float_linear(inputs=IN, outputs=OUT, bias=True, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias, dtype=dtype).eval()


def make(bits=8, method="channel", activations="dynamic", group_size=None, symmetric=False, **more):
    """A packed layer called encoder.query; ``more``: further settings, input_range, input_factor, and what float_linear
    takes.
    """
    settings = {key: more.pop(key) for key in ("weight_storage", "backend", "activation_bits") if key in more}
    input_range = more.pop("input_range", RANGE if activations == "static" else None)
    factor = more.pop("input_factor", None)
    config = LinearConfig(bits, method, activations, group_size, symmetric, **settings)
    layer = PackedLinear.from_float(float_linear(**more), config, "encoder.query", input_range)
    if factor is None:
        return layer
    tensors = layer.integers(), layer.scale, layer.zero_point, layer.bias
    return PackedLinear.from_integers(*tensors, config, "encoder.query", input_range, factor)


def tokens(*shape, seed=1, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rows_of(rows, inputs, seed=0):
    """Rows off centre, of which some are zeros, all alike, tiny, huge, halves of integers, or have one large number."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=generator) * (3 * torch.rand(rows, 1, generator=generator))
    x += torch.randn(rows, 1, generator=generator)
    if rows > 8:
        x[0], x[1], x[2, 5 % inputs] = 0, 1.7, 50
        x[3], x[4], x[5], x[6] = x[3] * 1e-38, x[4] * 1e37, (x[5] * 4).round() / 2, x[6].abs()
        x[7] = -x[7].abs()
    return x
