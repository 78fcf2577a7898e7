"""The compiled library's functions on tensors, each checked before a pointer is passed."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Sequence
from ctypes import POINTER, c_void_p

import torch
from torch import Tensor

from fairseq.modules.quantization.packed.kernels import arguments, library, memory
from fairseq.modules.quantization.packed.kernels.structures import (
    ACTIVATIONS,
    Block,
    Call,
    IntegerModel,
    IntegerNorm,
    Linear,
)

ATTENTION = "FAIRSEQ_QUANTIZATION_ATTENTION"
"""The precision of attention in native blocks: "bfloat16", or "float32", whose bits are the same on every processor."""
PRECISIONS = ("bfloat16", "float32")
ROWS_AT_ONCE, SLICE = 256, 224
"""Rows of images that one thread takes at once, and of an MLP at once: what stays in its cache."""


def attention_is_exact() -> bool:
    """Whether attention is in float32: what the environment variable ``FAIRSEQ_QUANTIZATION_ATTENTION`` says.

    No product is of bfloat16 then, so that layers which round their input to it run on other kernels.

    Raises:
        ValueError: it is neither of :data:`PRECISIONS`.
    """
    wanted = os.environ.get(ATTENTION) or PRECISIONS[0]
    if wanted not in PRECISIONS:
        raise ValueError(f"{ATTENTION} must be one of {', '.join(PRECISIONS)}; got {wanted!r}")
    return wanted == "float32"


def run_blocks(blocks: Sequence[Block], x: Tensor, calls: Sequence[Call], level: int) -> list[Tensor]:
    """The outputs of blocks, each of which takes what the one before gives: float32, the shape of x.

    Args:
        blocks: one at least, all of one width.
        x: hidden states of the first, float32 (..., width), as many rows as its call says.
        calls: of each block; those of several are of the same images and tokens, and not of windows.
        level: the number of an instruction set.

    Raises:
        ValueError: hidden states, blocks or tables of calls that do not fit together.
    """
    width, first = blocks[0].width, calls[0]
    if x.numel() != first.row_count * width:
        raise ValueError(f"the call is for {first.row_count} rows of {width}, got hidden states of {tuple(x.shape)}")
    arguments.check("hidden_states", x, torch.float32, (*x.shape[:-1], width))
    if any(block.width != width for block in blocks):
        raise ValueError(f"blocks one after the other must be of one width, got {[block.width for block in blocks]}")
    if len(blocks) > 1 and any(not arguments.follows(call, first) for call in calls):
        raise ValueError("blocks one after the other must be called for the same images, and not for windows")
    exact = attention_is_exact()
    for block, call in zip(blocks, calls, strict=True):
        if call.sizes not in (None, (block.heads, block.head_size)):
            raise ValueError(f"the call's tables are for (heads, head_size) {call.sizes}, not those of the block")
        call.exact = exact
    # In inference mode, too, tensors that know whether they were written to.
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext():
        outputs = [memory.empty(x.shape) for _ in blocks]
    if x.numel():
        count = len(blocks)
        library.check_memory(
            library.loaded().fairseq_blocks(
                level, (POINTER(Block) * count)(*map(ctypes.pointer, blocks)),
                (POINTER(Call) * count)(*map(ctypes.pointer, calls)), count, x.data_ptr(),
                (c_void_p * count)(*(output.data_ptr() for output in outputs)), torch.get_num_threads(),
                ROWS_AT_ONCE, SLICE, library.recorder.stages,
            )
        )  # fmt: skip
    return outputs


def run_block(block: Block, x: Tensor, level: int) -> Tensor:
    """The block's output for hidden states ``x``, float32 (images, tokens, width)."""
    return run_blocks([block], x, [arguments.make_call(*x.shape[:2])], level)[0]


def integers(model: IntegerModel, pixels: Tensor, level: int) -> Tensor:
    """The logits' integers of a model of integers alone, or its residual stream if it has no classifier.

    Args:
        model: see ``fairseq.quantization.integer_only.native_model``.
        pixels: uint8 (B, channels, height, width).
        level: the number of an instruction set.

    Returns:
        int32 (B, classes); or (B, tokens, width).

    Raises:
        ValueError: pixels of another dtype, shape or device, or not contiguous.
    """
    size = (model.channels, model.picture_height, model.picture_width)
    arguments.check("pixels", pixels, torch.uint8, (len(pixels), *size))
    outputs = (model.classifier.outputs,) if model.classifier.outputs else (model.tokens, model.width)
    logits = torch.empty(len(pixels), *outputs, dtype=torch.int32, device="cpu")
    if len(pixels):
        library.check_memory(
            library.loaded().fairseq_integers(
                level, model, pixels.data_ptr(), len(pixels), logits.data_ptr(), torch.get_num_threads(),
                ROWS_AT_ONCE, SLICE, library.recorder.stages,
            )
        )  # fmt: skip
    return logits


def integer_norm(norm: IntegerNorm, h: Tensor, level: int) -> Tensor:
    """A LayerNorm of integers over the last dimension: int32 or int64 of 22 bits (..., width) -> int32, the same."""
    rows = h.to(torch.int32).contiguous()
    out = torch.empty_like(rows)
    width = rows.shape[-1]
    library.loaded().fairseq_integer_norm(
        level, norm, rows.data_ptr(), rows.numel() // width, width, out.data_ptr(), torch.get_num_threads()
    )
    return out


def round_pixels(x: Tensor, start: Tensor, step: Tensor, level: int) -> Tensor | None:
    """(x - start) / step, rounded half to even and held to 0 ... 255; None where a number is NaN or Inf.

    Args:
        x: float32 (B, channels, height, width).
        start, step: float64 (channels,); computed in float64.

    Returns:
        uint8, the shape of x.
    """
    batch, channels, height, width = x.shape
    arguments.check("pixel_values", x, torch.float32, (batch, channels, height, width))
    arguments.check("start", start, torch.float64, (channels,))
    arguments.check("step", step, torch.float64, (channels,))
    pixels = torch.empty(x.shape, dtype=torch.uint8, device="cpu")
    found = library.loaded().fairseq_round_pixels(
        level, x.data_ptr(), batch, channels, height * width, start.data_ptr(), step.data_ptr(), pixels.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return None if found else pixels


def run_linear(
    linear: Linear, x: Tensor, level: int, activation: str | None = None, residual: Tensor | None = None
) -> Tensor:
    """y = x @ W.T + bias, or an activation of y, or residual + y: float32 (rows, in) -> (rows, out)."""
    arguments.check("x", x, torch.float32, (len(x), linear.inputs))
    shape = (len(x), linear.outputs)
    if residual is not None:
        arguments.check("residual", residual, torch.float32, shape)
    out = x.new_empty(shape)
    if out.numel():
        library.check_memory(
            library.loaded().fairseq_linear(
                level, linear, x.data_ptr(), len(x), -1 if activation is None else ACTIVATIONS.index(activation),
                arguments.pointer(residual), out.data_ptr(), torch.get_num_threads(), library.recorder.stages,
            )
        )  # fmt: skip
    return out


def activate(x: Tensor, activation: str, level: int) -> Tensor:
    """One of :data:`~.structures.ACTIVATIONS`, to 1e-5: float32 -> float32, the same shape."""
    arguments.check("x", x, torch.float32, tuple(x.shape))
    out = torch.empty_like(x)
    library.loaded().fairseq_activate(level, ACTIVATIONS.index(activation), x.data_ptr(), x.numel(), out.data_ptr())
    return out


def norm(x: Tensor, parts: arguments.NormParts, level: int) -> Tensor:
    """A norm over the last dimension: float32 (rows, width) -> the same."""
    rows, width = x.shape
    arguments.check("x", x, torch.float32, (rows, width))
    for name, tensor in zip(("weight", "bias"), parts[1:3]):
        if tensor is not None:
            arguments.check(name, tensor, torch.float32, (width,))
    out = torch.empty_like(x)
    library.loaded().fairseq_norm(level, arguments.norm_of(parts), x.data_ptr(), rows, width, out.data_ptr())
    return out


def quantize(x: Tensor, layer: arguments.Prepared, level: int) -> tuple[Tensor, Tensor, Tensor]:
    """The integers that a layer makes of its input: float32 (rows, in) -> int8 (rows, in), scales (rows,), and sums.

    The sums are int32 (rows,), or of each group of inputs, (rows, groups).

    Raises:
        ValueError: it makes none of it.
    """
    if layer.linear.halves:
        raise ValueError("a layer that rounds its input to bfloat16 makes no integers of it")
    arguments.check("x", x, torch.float32, (len(x), layer.linear.inputs))
    group = layer.linear.group_size
    of_groups = (len(x), -(-x.shape[1] // group)) if group else (len(x),)
    q, scales = torch.empty_like(x, dtype=torch.int8), x.new_empty(len(x))
    sums = x.new_empty(of_groups, dtype=torch.int32)
    pointers = (tensor.data_ptr() for tensor in (q, scales, sums))
    library.check_memory(library.loaded().fairseq_quantize(level, layer.linear, x.data_ptr(), len(x), *pointers))
    return q, scales, sums


def round_tokens(x: Tensor, bits: int, level: int) -> Tensor:
    """Rows rounded to ``bits`` bits, with a scale each, and back: float32 (rows, width) -> the same, NaN for one that
    holds NaN or Inf."""
    arguments.check("x", x, torch.float32, (len(x), x.shape[1]))
    out = torch.empty_like(x)
    library.check_memory(
        library.loaded().fairseq_round_tokens(
            level, bits, x.data_ptr(), *x.shape, out.data_ptr(), torch.get_num_threads()
        )
    )
    return out


def product(q: Tensor, layer: arguments.Prepared, level: int) -> Tensor:
    """int8 (rows, in) times a layer's codes, transposed: int32 (rows, out), exact."""
    arguments.check("q", q, torch.int8, (len(q), layer.linear.inputs))
    out = q.new_empty(len(q), layer.linear.outputs, dtype=torch.int32)
    library.check_memory(library.loaded().fairseq_product(level, layer.linear, q.data_ptr(), len(q), out.data_ptr()))
    return out


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, scaling: float, level: int) -> Tensor:
    """softmax(scaling * q @ k.T) @ v for each head: float32 (images, tokens, heads * size) three times -> the same.

    Products are of numbers rounded to bfloat16, summed in float32, or of float32; see :func:`attention_is_exact`. The
    softmax is in float32.
    """
    images, tokens, width = query.shape
    if heads < 1 or width % heads:
        raise ValueError(f"a width of {width} does not divide into {heads} heads")
    if not scaling > 0:
        raise ValueError(f"the scaling of attention must be positive, got {scaling}")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        arguments.check(name, tensor, torch.float32, (images, tokens, width))
    out = torch.empty_like(query)
    if out.numel():
        block = Block(heads=heads, head_size=width // heads, scaling=scaling)
        pointers = (tensor.data_ptr() for tensor in (query, key, value))
        call, threads = arguments.make_call(images, tokens), torch.get_num_threads()
        call.exact = attention_is_exact()
        library.check_memory(
            library.loaded().fairseq_attention(level, block, call, *pointers, width, out.data_ptr(), threads)
        )
    return out
