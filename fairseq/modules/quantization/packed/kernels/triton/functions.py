"""What several kernels share: division and rounding half to even, the largest magnitude of a row, activations."""

from __future__ import annotations

import triton
import triton.language as tl

EVEN = tl.constexpr(12582912.0)
"""1.5 * 2**23: the sum of this and a float32 below 2**22 in magnitude has no room for a fraction."""
EVEN_BITS = tl.constexpr(0x4B400000)
"""Its bits; those of a sum less these are the integer."""
INFINITE = tl.constexpr(0x7F800000)
"""The bits of float32's Inf; those of a NaN without its sign are more."""
TINY = tl.constexpr(1.1754943508222875e-38)
"""The smallest normal float32."""
TAIL = tl.constexpr(4.5)
"""Where the normal distribution is 0 or 1 to 4e-6, for GELU."""


@triton.jit
def divided(x, y):
    """x / y for float32 and a scalar y in [1e-30, 1e37], rounded as the division would be, in three operations.

    The quotient by the reciprocal is corrected by its exact remainder (Markstein, Computation of elementary functions
    on the IBM RISC System/6000 processor, 1990). A quotient that overflows or is of Inf becomes NaN.
    """
    inverse = tl.div_rn(1.0, y)
    q = x * inverse
    return tl.fma(tl.fma(-q, y, x), inverse, q)


@triton.jit
def rounded_bits(x):
    """float32 below 2**22 in magnitude -> int32, the nearest integer, half to even; of a NaN, any."""
    return (x + EVEN).to(tl.int32, bitcast=True) - EVEN_BITS


@triton.jit
def saturated(x, scale, zero_point):
    """float32 -> int32 from -128 to 127 on a fixed grid: x / scale rounded half to even, plus the zero point."""
    q = x * tl.div_rn(1.0, scale)
    q = tl.where(tl.abs(q) < 1024.0, divided(x, scale), q)  # beyond, both ends are far away
    q = tl.minimum(tl.maximum(q, -1024.0), 1024.0)
    return tl.minimum(tl.maximum(rounded_bits(q) + zero_point, -128), 127)


@triton.jit
def magnitude_bits(x):
    """The bits of abs(x) as int32, which order as the numbers do, NaN above all."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def normal_distribution(x):
    """float32 -> 1/2 + an odd polynomial of x cut off at 4.5: x times it is GELU to 6e-5 + 2e-6 abs(x)."""
    u = tl.minimum(tl.maximum(x, -TAIL), TAIL)
    t = u * u
    p = tl.full(t.shape, 3.037527174232224e-11, tl.float32)
    p = tl.fma(p, t, tl.full(t.shape, -3.31569638412077e-09, tl.float32))
    p = tl.fma(p, t, tl.full(t.shape, 1.591402138956255e-07, tl.float32))
    p = tl.fma(p, t, tl.full(t.shape, -4.452588655112777e-06, tl.float32))
    p = tl.fma(p, t, tl.full(t.shape, 8.143585728248581e-05, tl.float32))
    p = tl.fma(p, t, tl.full(t.shape, -0.0010376700665801764, tl.float32))
    p = tl.fma(p, t, tl.full(t.shape, 0.009585532359778881, tl.float32))
    p = tl.fma(p, t, tl.full(t.shape, -0.06598535180091858, tl.float32))
    p = tl.fma(p, t, tl.full(t.shape, 0.3987131416797638, tl.float32))
    return tl.fma(u, p, tl.full(t.shape, 0.5, tl.float32))


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """float32 -> float32; an activation by its name in ``BlockSpec``, or "none"."""
    if ACTIVATION == "gelu":
        x = x * normal_distribution(x)
    elif ACTIVATION == "quick_gelu":
        x = x / (1.0 + tl.exp(-1.702 * x))
    elif ACTIVATION == "gelu_tanh":
        x = x / (1.0 + tl.exp(-1.5957691216057308 * x * (1.0 + 0.044715 * x * x)))
    elif ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "relu":
        x = tl.where(x < 0.0, 0.0, x)  # NaN stays
    return x
