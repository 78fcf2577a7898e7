"""The instruction sets of the compiled library: which run here and agree with the reference, and which is used."""

from __future__ import annotations

import functools
import os
import warnings
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq.modules.quantization.context import plain_context
from fairseq.modules.quantization.packed.kernels import arguments, functional, library, native_calls
from fairseq.modules.quantization.packed.panels import sums_of, to_panels
from fairseq.modules.quantization.packed.weight import PackedWeight, code_offset
from fairseq.modules.quantization.scalar.tokens import quantize_tokens

ENVIRONMENT = "FAIRSEQ_QUANTIZATION_LEVEL"


@functools.cache
def level_names() -> tuple[str, ...]:
    """The instruction sets that the library was compiled for, the slowest first: what it says itself."""
    names: list[str] = []
    while (loaded := library.load()) and (name := loaded.fairseq_level_name(len(names))) is not None:
        names.append(name.decode())
    return tuple(names)


class Level(NamedTuple):
    """An instruction set of the library.

    Attributes:
        name: as ``FAIRSEQ_QUANTIZATION_LEVEL`` takes it.
        runs_here: whether this processor has it, and the operating system allows it.
        problem: how it differs from the reference on small cases; None where it agrees, or does not run.
    """

    name: str
    runs_here: bool
    problem: str | None


def check_levels() -> tuple[Level, ...]:
    """The instruction sets that the library was compiled for, the slowest first, each checked; empty without it.

    Raises:
        ValueError: an environment variable is wrong, with which each of them would be found to fail.
    """
    native_calls.attention_is_exact()
    found = []
    for number, name in enumerate(level_names()):
        here = bool(library.loaded().fairseq_supports(number))
        found.append(Level(name, here, functional.aside(_disagreement, number) if here else None))
    return tuple(found)


@functools.cache
def levels() -> tuple[str, ...]:
    """The instruction sets that run here and agree with the reference, the slowest first; empty without the library.

    Raises:
        ValueError: see :func:`check_levels`.
    """
    here = [level for level in check_levels() if level.runs_here]
    for level in here:
        if level.problem:
            warnings.warn(f"the native kernels for {level.name} are not used: {level.problem}", stacklevel=2)
    return tuple(level.name for level in here if not level.problem)


@functools.cache
def _checked_level(wanted: str) -> int:
    if wanted not in levels():
        raise ValueError(f"level {wanted!r} does not run here; {', '.join(levels())} do")
    return level_names().index(wanted)


def level_number(level: str | None = None) -> int:
    """The number of ``level``, or of the fastest that runs here or that ``FAIRSEQ_QUANTIZATION_LEVEL`` names.

    Raises:
        ValueError: it does not run here.
        RuntimeError: the library was not built.
    """
    if not levels():
        raise RuntimeError(f"no native kernels: {library.NOT_BUILT}")
    return _checked_level(level or os.environ.get(ENVIRONMENT) or levels()[-1])


def check_environment() -> None:
    """ValueError where an environment variable of these kernels is wrong, for who would learn it after the work."""
    if levels():
        level_number()


def fast_halves(level: int) -> bool:
    """Whether products of bfloat16 are many times as fast as those of floats at a level."""
    return bool(library.loaded().fairseq_fast_halves(level))


def fast_floats(level: int) -> bool:
    """Whether a level has a product of floats of its own, as those of AVX-512 have."""
    return bool(library.loaded().fairseq_fast_floats(level))


def _disagreement(level: int) -> str | None:
    """How a level differs from the reference on small cases, or None; whatever the caller's context is."""
    try:
        with plain_context():
            return _compare(level)
    except (RuntimeError, ValueError, TypeError, MemoryError) as error:
        return f"they fail with {type(error).__name__}: {error}"


def _compare(level: int) -> str | None:
    random, real = torch.Generator().manual_seed(0), torch.float32
    for bits in (8, 4):
        low, high = (-128, 128) if bits == 8 else (0, 16)
        codes = torch.randint(low, high, (40, 70), generator=random).to(torch.int8)
        q = torch.randint(-128, 128, (19, 70), generator=random).to(torch.int8)
        codes[0], codes[1], q[0], q[1] = low, high - 1, 127, -128  # products that saturate in sums of 16 bits
        scale = torch.rand(40, generator=random, dtype=real) + 0.1
        zero = torch.full((40,), 2 ** (bits - 1), dtype=torch.uint8)
        parts = to_panels(codes, bits), sums_of(codes, bits), scale, zero
        layer = arguments.Prepared((*parts, *[None] * 5), (70, 40, bits))
        exact = q.to(torch.int64) @ codes.to(torch.int64).T
        if not torch.equal(native_calls.product(q, layer, level), exact.to(torch.int32)):
            return f"their integer product at {bits} bits differs from the reference's"
        x = torch.randn(19, 70, generator=random, dtype=real)
        rounded, token_scale = quantize_tokens(x)
        centred = codes.double() - (zero.double() - code_offset(bits))[:, None]
        expected = (rounded * token_scale).double() @ (centred * scale[:, None]).T
        if not torch.allclose(native_calls.run_linear(layer.linear, x, level).double(), expected, rtol=1e-4, atol=1e-3):
            return f"their layer at {bits} bits differs from the reference"
        layer, weight = arguments.Prepared((*parts, *[None] * 5), (70, 40, bits, 1)), centred * scale[:, None]
        halves = x.bfloat16().double()  # K products and their sums round, and the product with the scale
        error = (native_calls.run_linear(layer.linear, x, level) - halves @ weight.T).abs()
        if not bool((error <= 71 * torch.finfo(real).eps * (halves.abs() @ weight.T.abs())).all()):
            return f"their weight-only layer at {bits} bits differs from the reference"
        if problem := _compare_groups(level, bits, codes, x):
            return problem
    query, key, value = torch.randn(3, 2, 35, 40, generator=random, dtype=real)
    by_head = [t.view(2, 35, 2, 20).transpose(1, 2) for t in (query, key, value)]
    expected = F.scaled_dot_product_attention(*by_head).transpose(1, 2).reshape(2, 35, 40)
    if not torch.allclose(native_calls.attention(query, key, value, 2, 20**-0.5, level), expected, atol=0.03):
        return "their attention differs from the reference"
    return None


def _compare_groups(level: int, bits: int, codes: Tensor, x: Tensor) -> str | None:
    """The same of groups of 32 inputs, the last of them of 6: rounded to 4 bits, or to bfloat16."""
    scale = 0.1 + torch.arange(120, dtype=torch.float32).view(40, 3) / 120
    zero = torch.full((40, 3), 2 ** (bits - 1) - 1, dtype=torch.uint8)
    weight = PackedWeight(codes, scale, zero, bits, 70, 32, False).dequantize(torch.float64)
    rounded, token_scale = quantize_tokens(x, 4)
    for sizes, given in (((0, 4, 32), rounded * token_scale), ((1, 8, 32), x.bfloat16())):
        parts = to_panels(codes, bits), sums_of(codes, bits, 32), scale, zero, *[None] * 5
        got = native_calls.run_linear(arguments.Prepared(parts, (70, 40, bits, *sizes)).linear, x, level)
        if not torch.allclose(got.double(), given.double() @ weight.T, rtol=1e-4, atol=1e-3):
            form = "weight-only layer" if sizes[0] else "layer"
            return f"their {form} with groups at {bits} bits differs from the reference"
    return None
