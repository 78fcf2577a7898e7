#!/usr/bin/env python3
"""Check an installation: every integer-only layer and every emulation kernel against its float twin, a line each.

    python examples/vision_transformer/test_ibert.py

CPU only, a few seconds, no model and no network. Exit code 1 if a check fails.
"""

from __future__ import annotations

import argparse
import math
import sys
import traceback
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq.modules.quantization.integer import (
    IntGELU,
    IntLayerNorm,
    IntSoftmax,
    QuantAct,
    QuantEmbedding,
    QuantLinear,
    functional,
)
from fairseq.modules.quantization.scalar import ops
from fairseq.modules.quantization.scalar.modules import ActivationQuantizer, IntConv2d, IntEmbedding, IntLinear

Check = Callable[[], tuple[float, float]]
"""Returns the largest error and the bound that it must keep."""


def quantized(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """``x`` as integers times a scaling factor, the way the layers take it."""
    act = QuantAct(bits, quant_mode="symmetric").train()
    y, scale = act(x)
    return y, scale


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).detach().abs().max())


def check_kernel(bits: int, method: str) -> tuple[float, float]:
    """An emulation kernel: no value is further off than half a step (with "histogram", unless it was clipped)."""
    w = torch.randn(64, 96)
    got, scale, zero_point = getattr(ops, f"emulate_int{bits}_{method}")(w)
    low, high = ops.representable_range(scale, zero_point, bits)
    step = scale.max().item()
    inside = w.clamp(low.view(-1, 1), high.view(-1, 1)) if method == "histogram" else w
    return error(got, inside), step * 0.5001


def check_quant_act() -> tuple[float, float]:
    x = torch.randn(32, 48)
    y, scale = quantized(x)
    return error(y, x), float(scale) * 0.5001


def check_quant_linear() -> tuple[float, float]:
    """Exact, given the integers: the float product of the quantized input and weight."""
    linear, layer = nn.Linear(48, 24), QuantLinear(8, per_channel=True, quant_mode="symmetric")
    layer.set_param(linear)
    x, scale = quantized(torch.randn(32, 48))
    y, out_scale = layer(x, scale)
    weight = layer.weight_integer.double() * layer.fc_scaling_factor.view(-1, 1)
    return error(y, F.linear(x.double(), weight, linear.bias.double())), float(out_scale.max()) * 0.5001


def check_quant_embedding() -> tuple[float, float]:
    embedding, layer = nn.Embedding(20, 16), QuantEmbedding(8, quant_mode="symmetric")
    layer.set_param(embedding)
    ids = torch.arange(20)
    y, scale = layer(ids)
    return error(y, embedding(ids)), float(scale) * 0.5001


def check_gelu(degree: int, bound: float) -> tuple[float, float]:
    x, scale = quantized(torch.linspace(-8, 8, 5001), 16)
    y, _ = IntGELU("symmetric", degree=degree)(x, scale)
    return error(y, F.gelu(x.double())), bound


def check_exp() -> tuple[float, float]:
    scale = 2.0**-12
    q = torch.arange(-12 * 4096, 1)
    got, out_scale = functional.exp(q, scale)
    return error(got * out_scale, torch.exp(q * scale)), 0.00194


def check_softmax() -> tuple[float, float]:
    x, scale = quantized(4 * torch.randn(64, 197), 16)
    y, _ = IntSoftmax(8, "symmetric")(x, scale)
    return error(y, F.softmax(x.double(), -1)), 2.0**-8


def check_isqrt() -> tuple[float, float]:
    n = torch.randint(0, 2**62, (500,))
    exact = torch.tensor([math.isqrt(int(v)) for v in n])
    return error(functional.isqrt(n), exact), 0.0


def check_layernorm() -> tuple[float, float]:
    norm, layer = nn.LayerNorm(192), IntLayerNorm(22, quant_mode="symmetric")
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    layer.set_param(norm)
    x, scale = quantized(3 * torch.randn(64, 192), 22)
    y, out_scale = layer(x, scale)
    return error(y, norm.double()(x.double())), float(out_scale) / 2 + 1e-4


def check_layer(layer: nn.Module, x: Tensor) -> tuple[float, float]:
    """A trainable layer in eval mode: exactly the float layer with the quantized weight."""
    twin = {IntLinear: nn.Linear, IntConv2d: nn.Conv2d, IntEmbedding: nn.Embedding}[type(layer)]
    layer.eval()
    y = layer(x).detach()
    with torch.no_grad():
        layer.weight.copy_(layer.quantized_weight())
        return error(y, twin.forward(layer, x)), 0.0


def check_activation_quantizer() -> tuple[float, float]:
    module, x = nn.Linear(16, 16).eval(), torch.randn(64, 16)
    exact = module(x).detach()
    ActivationQuantizer(module, bits=8, method="tensor", clamp_threshold=None)
    return error(module(x).detach(), exact), float(module.activation_scale) * 0.5001


CHECKS: dict[str, Check] = {
    **{
        f"emulate_int{bits}_{method}": lambda bits=bits, method=method: check_kernel(bits, method)
        for bits in (8, 4)
        for method in ops.METHODS
    },
    "IntLinear": lambda: check_layer(IntLinear(16, 8), torch.randn(4, 16)),
    "IntConv2d": lambda: check_layer(IntConv2d(3, 8, 3, padding=1), torch.randn(2, 3, 8, 8)),
    "IntEmbedding": lambda: check_layer(IntEmbedding(10, 8), torch.arange(10)),
    "ActivationQuantizer": check_activation_quantizer,
    "QuantAct": check_quant_act,
    "QuantLinear": check_quant_linear,
    "QuantEmbedding": check_quant_embedding,
    "IntGELU, degree 2": lambda: check_gelu(2, 0.0182),
    "IntGELU, degree 4": lambda: check_gelu(4, 0.0094),
    "i-exp": check_exp,
    "IntSoftmax": check_softmax,
    "i-sqrt": check_isqrt,
    "IntLayerNorm": check_layernorm,
}


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    failed = 0
    for name, check in CHECKS.items():
        try:
            worst, bound = check()
        except Exception:  # a broken installation can raise anything; the other checks still run
            failed += 1
            print(f"✗ {name:<24} raised\n{traceback.format_exc()}")
            continue
        good = worst <= bound
        failed += not good
        print(f"{'✓' if good else '✗'} {name:<24} max error {worst:.2e}, at most {bound:.2e}")
    print(f"{len(CHECKS) - failed} of {len(CHECKS)} checks passed, torch {torch.__version__}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
