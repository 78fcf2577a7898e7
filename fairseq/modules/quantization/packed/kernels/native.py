"""The compiled library: how it is loaded, and its functions on tensors, each checked before a pointer is passed."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq.modules.quantization.packed.panels import is_narrow, panels_shape
from fairseq.modules.quantization.packed.weight import code_offset

LEVELS = ("portable", "avx2", "avxvnni", "avx512vnni", "avx512bf16")
"""Instruction sets that the library is compiled for, the slowest first."""

ENVIRONMENT = "FAIRSEQ_QUANTIZATION_LEVEL"
STAGES = ("LayerNorm, quantize", "integer products", "scale, bias, GELU, add", "attention", "quantize", "unpack", "wait")
"""Where the time of a call goes, in the order of the C enumeration ``Stage``."""


class Linear(Structure):
    """One Linear, as ``struct Linear`` of csrc/api.h; ``tensors`` keeps alive what it points to."""

    _fields_ = (
        ("panels", c_void_p), ("sums", c_void_p), ("scale", c_void_p), ("zero", c_void_p), ("bias", c_void_p),
        ("factor", c_void_p), ("inputs", c_int64), ("outputs", c_int64), ("narrow", c_int32),
        ("zero_offset", c_int32), ("scale_step", c_int32), ("input_scale", c_float), ("input_zero", c_int32),
    )  # fmt: skip
    tensors: tuple[Tensor | None, ...]


class Block(Structure):
    """An encoder block, as ``struct Block`` of csrc/api.h."""

    _fields_ = (
        *((name, Linear) for name in ("query", "key", "value", "output", "fc1", "fc2")),
        *((name, c_void_p) for name in ("norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias")),
        *((name, c_float) for name in ("norm1_epsilon", "norm2_epsilon", "scaling")),
        *((name, c_int64) for name in ("width", "heads", "head_size", "mlp")),
    )
    tensors: tuple[Any, ...]


SIGNATURES: dict[str, tuple[Any, ...]] = {
    "fairseq_levels": (),
    "fairseq_gelu": (c_int, c_void_p, c_int64, c_void_p),
    "fairseq_layer_norm": (c_int, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_float, c_void_p),
    "fairseq_quantize": (c_int, POINTER(Linear), c_void_p, c_int64, c_void_p, c_void_p, c_void_p),
    "fairseq_product": (c_int, POINTER(Linear), c_void_p, c_int64, c_void_p),
    "fairseq_linear": (
        c_int, POINTER(Linear), c_void_p, c_int64, c_int, c_void_p, c_void_p, c_int, POINTER(c_double),
    ),
    "fairseq_attention": (
        c_int, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int64, c_int64, c_float, c_void_p, c_int,
    ),
    "fairseq_block": (
        c_int, POINTER(Block), c_void_p, c_int64, c_int64, c_void_p, c_int, c_int64, POINTER(c_double),
    ),
}  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library, or None where it was not built or does not load; torch is imported before it.

    torch's OpenMP is in the process by then, and the loader takes it for this library, too: one pool of threads.
    """
    for file in sorted(Path(__file__).parent.glob("_native*.so")):
        try:
            loaded = ctypes.CDLL(str(file))
        except OSError:
            continue
        for name, arguments in SIGNATURES.items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = arguments, c_int
        loaded.fairseq_level_name.restype = c_char_p
        return loaded
    return None


@functools.cache
def levels() -> tuple[str, ...]:
    """The instruction sets that run here, the slowest first; empty without the library."""
    loaded = library()
    mask = loaded.fairseq_levels() if loaded else 0
    return tuple(name for bit, name in enumerate(LEVELS) if mask >> bit & 1)


def level_number(level: str | None = None) -> int:
    """The number of ``level``, or of the fastest that runs here or that ``FAIRSEQ_QUANTIZATION_LEVEL`` names.

    Raises:
        ValueError: it does not run here.
        RuntimeError: the library was not built.
    """
    if not levels():
        raise RuntimeError(
            "the native kernels were not built; install a C++ compiler (gcc or clang) and reinstall fairseq"
        )
    wanted = level or os.environ.get(ENVIRONMENT) or levels()[-1]
    if wanted not in levels():
        raise ValueError(f"level {wanted!r} does not run here; {', '.join(levels())} do")
    return LEVELS.index(wanted)


def make_linear(
    panels: Tensor,
    sums: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bias: Tensor | None,
    factor: Tensor | None,
    in_features: int,
    out_features: int,
    bits: int,
    input_scale: float = 0.0,
    input_zero: int = 0,
) -> Linear:
    """Check tensors and point to them.

    Args:
        panels: uint8, of ``panels_shape(out_features, in_features, bits)``.
        sums: int32 (out_features,), of each output's codes.
        scale: float32 (1,) or (out_features,).
        zero_point: uint8, the shape of ``scale``.
        bias: float32 (out_features,) or None; with a static range the correction is in it.
        factor: float32 (in_features,) or None.
        bits: 2 to 8.
        input_scale, input_zero: of a static range; 0 for a scale per row.

    Raises:
        ValueError: another dtype, shape, device or stride; the message names the tensor.
    """
    outputs, inputs = out_features, in_features
    scales = (1,) if scale.numel() == 1 else (outputs,)
    _check("panels", panels, torch.uint8, panels_shape(outputs, inputs, bits))
    _check("sums", sums, torch.int32, (outputs,))
    _check("scale", scale, torch.float32, scales)
    _check("zero_point", zero_point, torch.uint8, scales)
    if bias is not None:
        _check("bias", bias, torch.float32, (outputs,))
    if factor is not None:
        _check("factor", factor, torch.float32, (inputs,))
    linear = Linear(
        panels.data_ptr(), sums.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), _pointer(bias), _pointer(factor),
        inputs, outputs, is_narrow(bits), code_offset(bits), scales != (1,), input_scale, input_zero,
    )  # fmt: skip
    linear.tensors = panels, sums, scale, zero_point, bias, factor
    return linear


def make_block(
    linears: Sequence[Linear], norms: Sequence[Tensor], epsilons: Sequence[float], scaling: float, heads: int
) -> Block:
    """Check that the parts of an encoder block fit together, and point to them.

    Args:
        linears: query, key, value, output, fc1, fc2.
        norms: weight and bias of the LayerNorm before attention, and of the one after; float32 (width,).
        epsilons: of the two.
        scaling: what products of queries and keys are multiplied by.
        heads: number of heads.

    Raises:
        ValueError: sizes that do not fit together; the message gives them.
    """
    query, key, value, output, fc1, fc2 = linears
    width, inner, mlp = query.inputs, query.outputs, fc1.outputs
    sizes = [(linear.inputs, linear.outputs) for linear in linears]
    expected = [(width, inner)] * 3 + [(inner, width), (width, mlp), (mlp, width)]
    if sizes != expected or inner % heads:
        raise ValueError(f"an encoder block with {heads} heads has layers of (in, out) {expected}, got {sizes}")
    for name, norm in zip(("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"), norms, strict=True):
        _check(name, norm, torch.float32, (width,))
    pointers = (norm.data_ptr() for norm in norms)
    block = Block(*linears, *pointers, *epsilons, scaling, width, heads, inner // heads, mlp)
    block.tensors = (*(linear.tensors for linear in linears), *norms)
    return block


def run_block(block: Block, x: Tensor, level: int, stages: Any = None, slice_rows: int = 98) -> Tensor:
    """The block's output for hidden states ``x``, float32 (images, tokens, width)."""
    _check("hidden_states", x, torch.float32, (*x.shape[:2], block.width))
    out = torch.empty_like(x)
    if x.numel():
        loaded = library()
        assert loaded is not None
        _raise(
            loaded.fairseq_block(
                level, block, x.data_ptr(), x.shape[0], x.shape[1], out.data_ptr(), torch.get_num_threads(),
                slice_rows, stages,
            )
        )  # fmt: skip
    return out


def run_linear(
    linear: Linear, x: Tensor, level: int, gelu: bool = False, residual: Tensor | None = None, stages: Any = None
) -> Tensor:
    """y = x @ W.T + bias, or GELU of y, or residual + y: float32 (rows, in) -> (rows, out)."""
    _check("x", x, torch.float32, (len(x), linear.inputs))
    shape = (len(x), linear.outputs)
    if residual is not None:
        _check("residual", residual, torch.float32, shape)
    out = torch.empty(shape)
    if out.numel():
        loaded = library()
        assert loaded is not None
        _raise(
            loaded.fairseq_linear(
                level, linear, x.data_ptr(), len(x), gelu, _pointer(residual), out.data_ptr(), torch.get_num_threads(),
                stages,
            )
        )  # fmt: skip
    return out


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _raise(code: int) -> None:
    if code:
        raise MemoryError("the native kernels got no memory to work in")


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """ValueError unless the tensor is dense, on the CPU, and of this dtype and shape."""
    if tensor.dtype != dtype or tensor.shape != shape or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be a contiguous {dtype} tensor of shape {shape} on the CPU, got {tensor.dtype} of shape "
            f"{tuple(tensor.shape)} and strides {tensor.stride()} on {tensor.device}"
        )
