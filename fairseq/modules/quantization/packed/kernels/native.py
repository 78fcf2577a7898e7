"""The compiled library: how it is loaded, and its functions on tensors, each checked before a pointer is passed."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import itertools
import os
import sysconfig
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from ctypes import POINTER, c_char_p, c_double, c_int, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from fairseq.modules.quantization.context import plain_context
from fairseq.modules.quantization.packed.kernels import memory
from fairseq.modules.quantization.packed.kernels.structures import (
    ACTIVATIONS,
    BLOCK_NORMS,
    GATINGS,
    LAYERS,
    NORMS,
    SIGNATURES,
    STAGES,
    Block,
    Call,
    IntegerBlock,
    IntegerModel,
    IntegerNorm,
    Linear,
    Norm,
    Patches,
)
from fairseq.modules.quantization.packed.panels import WIDTH, is_narrow, panels_shape, sums_of, to_panels
from fairseq.modules.quantization.packed.weight import code_offset
from fairseq.modules.quantization.scalar.tokens import quantize_tokens

ENVIRONMENT = "FAIRSEQ_QUANTIZATION_LEVEL"
LIBRARY = "FAIRSEQ_QUANTIZATION_LIBRARY"
"""Names another build of the library, such as one with a sanitizer."""
ATTENTION = "FAIRSEQ_QUANTIZATION_ATTENTION"
"""The precision of attention in native blocks: "bfloat16", or "float32", whose bits are the same on every processor."""
PRECISIONS = ("bfloat16", "float32")
NOT_BUILT = "they were not built; install a C++ compiler (gcc or clang) and reinstall fairseq"
Parts = tuple[Tensor | None, ...]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library, or None where it was not built or does not load; torch is imported before it.

    torch's OpenMP is in the process by then, and the loader takes it for this library, too: one pool of threads.
    """
    chosen = os.environ.get(LIBRARY)
    file = Path(chosen) if chosen else Path(__file__).with_name("_native" + sysconfig.get_config_var("EXT_SUFFIX"))
    try:
        loaded = ctypes.CDLL(str(file))
        for name, arguments in SIGNATURES.items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = arguments, c_int
        loaded.fairseq_level_name.restype = c_char_p
        kinds = (Linear, Block, Call, Patches, IntegerBlock, IntegerModel)
        if [loaded.fairseq_size(i) for i in range(len(kinds))] != [ctypes.sizeof(kind) for kind in kinds]:
            raise OSError(f"{file} was built from another version of its sources; reinstall fairseq")
    except (OSError, AttributeError) as error:
        if chosen:
            raise
        if file.exists():
            warnings.warn(f"the native kernels do not load: {error}", stacklevel=2)
        return None
    return loaded


@functools.cache
def level_names() -> tuple[str, ...]:
    """The instruction sets that the library was compiled for, the slowest first: what it says itself."""
    names: list[str] = []
    while (loaded := library()) and (name := loaded.fairseq_level_name(len(names))) is not None:
        names.append(name.decode())
    return tuple(names)


@functools.cache
def levels() -> tuple[str, ...]:
    """The instruction sets that run here and agree with the reference, the slowest first; empty without the library."""
    here = [level for level in range(len(level_names())) if _library().fairseq_supports(level)]
    wrong = {level: problem for level in here if (problem := _disagreement(level))}
    for level, problem in wrong.items():
        warnings.warn(f"the native kernels for {level_names()[level]} are not used: {problem}", stacklevel=2)
    return tuple(level_names()[level] for level in here if level not in wrong)


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
        raise RuntimeError(f"no native kernels: {NOT_BUILT}")
    return _checked_level(level or os.environ.get(ENVIRONMENT) or levels()[-1])


class _Recorder(threading.local):
    """Where this thread's calls add the time that they take, or None."""

    stages: Any = None


_recorder = _Recorder()


@contextlib.contextmanager
def profile() -> Iterator[dict[str, float]]:
    """Collects where the time of this thread's native calls goes: stage -> seconds, added up over their threads.

    Filled when the context ends. Looking at the clock makes the calls a few percent slower.
    """
    seconds: dict[str, float] = {}
    before, _recorder.stages = _recorder.stages, (c_double * len(STAGES))()
    try:
        yield seconds
    finally:
        seconds.update(zip(STAGES, _recorder.stages, strict=True))
        _recorder.stages = before


class Prepared:
    """A layer's tensors as the kernels take them, and the :class:`Linear` that points to them.

    Args:
        parts: panels, uint8 of ``panels_shape(out_features, in_features, bits)``; sums, int32 (out_features,), of each
            output's codes, or None below 5 bits; scale, float32 (1,) or (out_features,); zero_point, uint8, the shape
            of ``scale``; bias, (out_features,); factor, (in_features,); and of a static range input_scale (1,),
            input_zero_point (1,) and correction, (out_features,). The last five may be None.
        sizes: in_features, out_features, bits, and 1 if the input is rounded to bfloat16, 0 or nothing if to integers.

    Raises:
        ValueError: another dtype, shape, device or stride, the message names the tensor; or a static range for an input
            that is rounded to bfloat16.
    """

    def __init__(self, parts: Parts, sizes: Sequence[int]):
        self.parts = parts
        panels, sums, scale, zero_point, bias, factor, input_scale, input_zero_point, correction = parts
        inputs, outputs, bits, halves = (*sizes, 0)[:4]
        if panels is None or scale is None or zero_point is None or (sums is None) != is_narrow(bits):
            raise ValueError("a native layer needs panels, sums above 4 bits, a scale and a zero point")
        if halves and input_scale is not None:
            raise ValueError("an input that is rounded to bfloat16 has no static range")
        given = (bias, factor, correction)
        bias, factor, correction = (None if t is None else t.to(torch.float32) for t in given)
        copies = [t for t in given if t is not None and (t.dtype != torch.float32 or correction is not None)]
        copies += [t for t in (input_scale, input_zero_point) if t is not None]
        self.versions = [(t, version(t)) for t in copies]
        if correction is not None:
            bias = correction if bias is None else bias + correction
        scales = (1,) if scale.numel() == 1 else (outputs,)
        _check("panels", panels, torch.uint8, panels_shape(outputs, inputs, bits))
        if sums is not None:
            _check("sums", sums, torch.int32, (outputs,))
        _check("scale", scale, torch.float32, scales)
        _check("zero_point", zero_point, torch.uint8, scales)
        if bias is not None:
            _check("bias", bias, torch.float32, (outputs,))
        if factor is not None:
            _check("factor", factor, torch.float32, (inputs,))
        self.tensors = panels, sums, scale, zero_point, bias, factor
        self.pointers = _pointers(parts)
        fixed = (0.0, 0) if input_scale is None or input_zero_point is None else (input_scale, input_zero_point)
        self.linear = Linear(
            *(_pointer(tensor) for tensor in self.tensors), inputs, outputs, is_narrow(bits), code_offset(bits),
            scales != (1,), float(fixed[0]), int(fixed[1]), halves,
        )  # fmt: skip
        self.linear.kept = self.tensors

    def with_bias(self, bias: Tensor) -> Prepared:
        """The same with ``bias``, float32 (outputs,), added to the results of a layer that has no bias itself.

        Raises:
            ValueError: the layer has one.
        """
        if self.parts[4] is not None:
            raise ValueError("the layer has a bias already")
        _check("bias", bias, torch.float32, (self.linear.outputs,))
        correction = self.tensors[4]  # of a static range
        bias = bias if correction is None else correction + bias
        result = copy.copy(self)
        result.linear = Linear.from_buffer_copy(self.linear)
        result.linear.bias, result.linear.kept = bias.data_ptr(), (*self.tensors, bias)
        return result

    def is_of(self, parts: Parts) -> bool:
        """Whether the layer has these very tensors, in the same memory, and those that were copied are unchanged.

        A copied one that is changed behind PyTorch's back, through ``.data``, is not noticed.
        """
        same = all(mine is its for mine, its in zip(self.parts, parts, strict=True))
        return same and self.pointers == _pointers(parts) and all(version(t) == number for t, number in self.versions)


FEWEST = 8
"""Columns of a part where one layer gives queries, keys and values: a vector of 16 lanes holds two parts at most."""
TOGETHER = (("query", "key", "value"), ("gate", "fc1"))
"""Layers of a block whose input is rounded once for all of them."""
NormParts = tuple[str, Tensor | None, Tensor | None, float]
"""Kind, one of :data:`~.structures.NORMS`; weight and bias, float32 of the row's width, or None; epsilon."""


def make_block(
    layers: Mapping[str, Prepared],
    norms: Mapping[str, NormParts],
    heads: int,
    scaling: float,
    activation: str = "gelu",
    gating: str = "none",
    scales: Sequence[Tensor | None] = (None, None),
    head_scale: Tensor | None = None,
) -> Block:
    """Check that the parts of an encoder block fit together, and point to them.

    Args:
        layers: by their names in :data:`~.structures.LAYERS`; without "key" and "value" the outputs of the query are
            those of all three, a third each. "gate" with ``gating="layer"``.
        norms: by their names in :data:`~.structures.BLOCK_NORMS`; one that is missing is none.
        heads: number of heads.
        scaling: what products of queries and keys are multiplied by.
        activation: one of :data:`~.structures.ACTIVATIONS`.
        gating: "none": act(fc1(x)); "layer": act(gate(x)) * fc1(x); "halves": act(g) * u of the halves of fc1(x).
        scales: LayerScale of attention and MLP, float32 (width,), or None.
        head_scale: in the place of ``scaling``, float32 (heads,), or None.

    Raises:
        ValueError: sizes that do not fit together, the message gives them; or layers that read one tensor, of which
            some round it to integers and others to bfloat16.
    """
    linears = {name: layer.linear for name, layer in layers.items()}
    three = "key" in linears
    query, fc2 = linears["query"], linears["fc2"]
    width, inner, mlp = query.inputs, query.outputs if three else query.outputs // 3, fc2.inputs
    first = (width, 2 * mlp if gating == "halves" else mlp)
    expected = {
        "query": (width, inner if three else 3 * inner),
        **({"key": (width, inner), "value": (width, inner)} if three else {}),
        "output": (inner, width), "fc1": first, **({"gate": first} if gating == "layer" else {}), "fc2": (mlp, width),
    }  # fmt: skip
    sizes = {name: (linear.inputs, linear.outputs) for name, linear in linears.items()}
    if sizes != expected or inner % heads:
        raise ValueError(f"an encoder block with {heads} heads has layers of (in, out) {expected}, got {sizes}")
    if not three and inner < FEWEST:
        raise ValueError(f"one layer for query, key and value has {FEWEST} columns of each at least, got {inner}")
    for together in TOGETHER:
        if len({linears[name].halves for name in together if name in linears}) > 1:
            raise ValueError(f"the input of {', '.join(together)} is rounded once, to integers or to bfloat16")
    if not scaling > 0:
        raise ValueError(f"the scaling of attention must be positive, got {scaling}")
    size = inner // heads
    widths = dict.fromkeys(BLOCK_NORMS, width)
    widths |= {"query_norm": size, "key_norm": size, "attended_norm": inner, "hidden_norm": mlp}
    for name, (_, *parts, _) in norms.items():
        for part, tensor in zip(("weight", "bias"), parts, strict=True):
            if tensor is not None:
                _check(f"{name}.{part}", tensor, torch.float32, (widths[name],))
    for name, scale, shape in zip(("scale1", "scale2", "head_scale"), (*scales, head_scale), (width, width, heads)):
        if scale is not None:
            _check(name, scale, torch.float32, (shape,))
    block = Block(
        *(linears.get(name, Linear()) for name in LAYERS),
        *(_norm(norms.get(name)) for name in BLOCK_NORMS),
        *(_pointer(scale) for scale in (*scales, head_scale)),
        scaling, 3 if three else 1, ACTIVATIONS.index(activation), GATINGS.index(gating), width, heads, size, mlp,
    )  # fmt: skip
    block.kept = (*layers.values(), *norms.values(), *scales, head_scale)
    return block


def _norm(parts: NormParts | None) -> Norm:
    if parts is None:
        return Norm()
    kind, weight, bias, epsilon = parts
    return Norm(_pointer(weight), _pointer(bias), epsilon, NORMS.index(kind))


def make_call(
    images: int,
    tokens: int,
    row_count: int | None = None,
    rows: Tensor | None = None,
    rotation: tuple[Tensor, Tensor] | None = None,
    neighbours: bool = False,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    heads: int = 1,
    head_size: int = 1,
) -> Call:
    """What a block is called with, besides its hidden states; checked, and pointed to.

    Args:
        images, tokens: an image is what attends to itself: a window, where there are windows.
        row_count: rows of the hidden states; images * tokens if not given.
        rows: int32 (images * tokens,): the row of the hidden states that stands there, -1 for zeros after the norm.
        rotation: cosines and sines, float32 (tokens, head_size), of queries and keys.
        neighbours: whether columns 2 i and 2 i + 1 turn together, not i and i + head_size / 2.
        bias: float32 (heads, tokens, tokens), added to the scaled products.
        mask: float32 (masks, tokens, tokens), added, too: image i has mask i % masks.
        heads, head_size: of the block.

    Raises:
        ValueError: another dtype, shape or device, or rows that are not there.
    """
    if images < 0 or tokens < 1:
        raise ValueError(f"a call is of images of a token at least, got {images} of {tokens}")
    row_count = images * tokens if row_count is None else row_count
    if rows is not None:
        _check("rows", rows, torch.int32, (images * tokens,))
        _check_rows(rows, row_count)
    elif row_count != images * tokens:
        raise ValueError(f"{images} images of {tokens} tokens are {images * tokens} rows, not {row_count}")
    for name, table in zip(("cosines", "sines"), rotation or ()):
        _check(name, table, torch.float32, (tokens, head_size))
    if bias is not None:
        _check("bias", bias, torch.float32, (heads, tokens, tokens))
    if mask is not None:
        _check("mask", mask, torch.float32, (len(mask), tokens, tokens))
    cosines, sines = rotation or (None, None)
    call = Call(
        images, tokens, row_count, _pointer(rows), _pointer(cosines), _pointer(sines), _pointer(bias), _pointer(mask),
        0 if mask is None else len(mask), neighbours, 0,
    )  # fmt: skip
    call.kept = (rows, rotation, bias, mask)
    call.sizes = None if rotation is None and bias is None else (heads, head_size)
    return call


_placed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _check_rows(rows: Tensor, count: int) -> None:
    """ValueError unless each of ``count`` rows stands at one place; found out once for a table that stays as it is."""
    found = (count, None if rows.is_inference() else rows._version)
    if found[1] is not None and _placed.get(rows) == found:
        return
    standing = rows[rows != -1].sort().values
    if not torch.equal(standing, torch.arange(count, dtype=torch.int32)):
        raise ValueError(f"rows must be -1 or the numbers below {count}, each of them once")
    _placed[rows] = found


PATCH_STEP = 32
"""Numbers of a patch are filled up to a multiple of it, as csrc/api.h says."""
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
    _check("hidden_states", x, torch.float32, (*x.shape[:-1], width))
    if any(block.width != width for block in blocks):
        raise ValueError(f"blocks one after the other must be of one width, got {[block.width for block in blocks]}")
    if len(blocks) > 1 and any(not follows(call, first) for call in calls):
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
        _raise(
            _library().fairseq_blocks(
                level, (POINTER(Block) * count)(*map(ctypes.pointer, blocks)),
                (POINTER(Call) * count)(*map(ctypes.pointer, calls)), count, x.data_ptr(),
                (c_void_p * count)(*(output.data_ptr() for output in outputs)), torch.get_num_threads(),
                ROWS_AT_ONCE, SLICE, _recorder.stages,
            )
        )  # fmt: skip
    return outputs


def integers(model: IntegerModel, pixels: Tensor, level: int) -> Tensor:
    """The logits' integers of a model of integers alone, or its residual stream if it has no classifier.

    Args:
        model: see ``fairseq.quantization.integer_only.native``.
        pixels: uint8 (B, channels, height, width).
        level: the number of an instruction set.

    Returns:
        int32 (B, classes); or (B, tokens, width).

    Raises:
        ValueError: pixels of another dtype, shape or device, or not contiguous.
    """
    size = (model.channels, model.picture_height, model.picture_width)
    _check("pixels", pixels, torch.uint8, (len(pixels), *size))
    outputs = (model.classifier.outputs,) if model.classifier.outputs else (model.tokens, model.width)
    logits = torch.empty(len(pixels), *outputs, dtype=torch.int32, device="cpu")
    if len(pixels):
        _raise(
            _library().fairseq_integers(
                level, model, pixels.data_ptr(), len(pixels), logits.data_ptr(), torch.get_num_threads(),
                ROWS_AT_ONCE, SLICE, _recorder.stages,
            )
        )  # fmt: skip
    return logits


def integer_norm(norm: IntegerNorm, h: Tensor, level: int) -> Tensor:
    """A LayerNorm of integers over the last dimension: int32 or int64 of 22 bits (..., width) -> int32, the same."""
    rows = h.to(torch.int32).contiguous()
    out = torch.empty_like(rows)
    width = rows.shape[-1]
    _library().fairseq_integer_norm(
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
    _check("pixel_values", x, torch.float32, (batch, channels, height, width))
    _check("start", start, torch.float64, (channels,))
    _check("step", step, torch.float64, (channels,))
    pixels = torch.empty(x.shape, dtype=torch.uint8, device="cpu")
    found = _library().fairseq_round_pixels(
        level, x.data_ptr(), batch, channels, height * width, start.data_ptr(), step.data_ptr(), pixels.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return None if found else pixels


def follows(call: Call, first: Call) -> bool:
    """Whether a block that is called so can run right behind one that is called as ``first`` says, image by image."""
    alike = call.images == first.images and call.tokens == first.tokens
    return alike and not call.rows and not first.rows


def patch_panels(weight: Tensor) -> Tensor:
    """A convolution's weight, float32 (out, C, height, width), as its product reads it, bfloat16.

    (panels of 32 outputs, pairs of numbers, 32, 2): the numbers are the high parts of the weights, bfloat16(w), the low
    ones, bfloat16(w - high), and the high ones once more, each filled up with zeros to a multiple of 32.
    """
    rows = weight.detach().reshape(len(weight), -1)
    rows = F.pad(rows, (0, -rows.shape[1] % PATCH_STEP, 0, -len(rows) % WIDTH))
    high = rows.to(torch.bfloat16)
    numbers = torch.cat([high, (rows - high.to(rows.dtype)).to(torch.bfloat16), high], 1)
    return numbers.view(-1, WIDTH, numbers.shape[1] // 2, 2).transpose(1, 2).contiguous()


_patch_panels: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _kept_patch_panels(weight: Tensor) -> Tensor:
    """The panels of a weight, made anew when it was written to; a change through ``.data`` in place is not noticed."""
    key = (weight.data_ptr(), version(weight))
    kept = _patch_panels.get(weight)
    if kept is None or kept[0] != key:
        kept = _patch_panels[weight] = (key, patch_panels(weight))
    panels: Tensor = kept[1]
    return panels


def forget_patches(weight: Tensor) -> None:
    """Drop the panels of a convolution's weight, which may have other numbers without having been written to."""
    _patch_panels.pop(weight, None)


def run_patches(pixels: Tensor, weight: Tensor, bias: Tensor | None, level: int) -> Tensor:
    """A convolution over patches that do not overlap, as three products of bfloat16 that give nearly those of floats.

    The error is at most ``(3 * 2**-18 + 3 * K * 2**-24) * sum(abs(x * w))`` over the K numbers of a patch. An Inf makes
    NaN.

    Args:
        pixels: float32 (images, C, H, W); what does not fill a patch, at the right and at the bottom, is left out.
        weight: float32 (out, C, height, width).
        bias: float32 (out,) or None.
        level: the number of an instruction set.

    Returns:
        float32 (images, H // height, W // width, out).

    Raises:
        ValueError: another dtype, shape or stride, or pictures of less than a patch.
    """
    out, channels, patch_height, patch_width = weight.shape
    _check("weight", weight, torch.float32, (out, channels, patch_height, patch_width))
    _check("pixels", pixels, torch.float32, (len(pixels), channels, *pixels.shape[2:]))
    if bias is not None:
        _check("bias", bias, torch.float32, (out,))
    images, _, height, width = pixels.shape
    if height < patch_height or width < patch_width:
        raise ValueError(f"pictures of {height} x {width} have no patch of {patch_height} x {patch_width}")
    y = memory.empty((images, height // patch_height, width // patch_width, out))
    if y.numel():
        panels = _kept_patch_panels(weight)  # held by this name, whatever other threads do
        patches = Patches(
            panels.data_ptr(), _pointer(bias), channels, height, width, patch_height, patch_width, out
        )  # fmt: skip
        threads = torch.get_num_threads()
        _raise(_library().fairseq_patches(level, patches, pixels.data_ptr(), images, y.data_ptr(), threads))
    return y


def fast_halves(level: int) -> bool:
    """Whether products of bfloat16 are many times as fast as those of floats at a level."""
    return bool(_library().fairseq_fast_halves(level))


def run_block(block: Block, x: Tensor, level: int) -> Tensor:
    """The block's output for hidden states ``x``, float32 (images, tokens, width)."""
    return run_blocks([block], x, [make_call(*x.shape[:2])], level)[0]


def run_linear(
    linear: Linear, x: Tensor, level: int, activation: str | None = None, residual: Tensor | None = None
) -> Tensor:
    """y = x @ W.T + bias, or an activation of y, or residual + y: float32 (rows, in) -> (rows, out)."""
    _check("x", x, torch.float32, (len(x), linear.inputs))
    shape = (len(x), linear.outputs)
    if residual is not None:
        _check("residual", residual, torch.float32, shape)
    out = x.new_empty(shape)
    if out.numel():
        _raise(
            _library().fairseq_linear(
                level, linear, x.data_ptr(), len(x), -1 if activation is None else ACTIVATIONS.index(activation),
                _pointer(residual), out.data_ptr(), torch.get_num_threads(), _recorder.stages,
            )
        )  # fmt: skip
    return out


def activate(x: Tensor, activation: str, level: int) -> Tensor:
    """One of :data:`~.structures.ACTIVATIONS`, to 1e-5: float32 -> float32, the same shape."""
    _check("x", x, torch.float32, tuple(x.shape))
    out = torch.empty_like(x)
    _library().fairseq_activate(level, ACTIVATIONS.index(activation), x.data_ptr(), x.numel(), out.data_ptr())
    return out


def norm(x: Tensor, parts: NormParts, level: int) -> Tensor:
    """A norm over the last dimension: float32 (rows, width) -> the same."""
    rows, width = x.shape
    _check("x", x, torch.float32, (rows, width))
    for name, tensor in zip(("weight", "bias"), parts[1:3]):
        if tensor is not None:
            _check(name, tensor, torch.float32, (width,))
    out = torch.empty_like(x)
    _library().fairseq_norm(level, _norm(parts), x.data_ptr(), rows, width, out.data_ptr())
    return out


def quantize(x: Tensor, layer: Prepared, level: int) -> tuple[Tensor, Tensor, Tensor]:
    """The integers that a layer makes of its input: float32 (rows, in) -> int8 (rows, in), scales and sums (rows,).

    Raises:
        ValueError: it makes none of it.
    """
    if layer.linear.halves:
        raise ValueError("a layer that rounds its input to bfloat16 makes no integers of it")
    _check("x", x, torch.float32, (len(x), layer.linear.inputs))
    q, scales, sums = torch.empty_like(x, dtype=torch.int8), x.new_empty(len(x)), x.new_empty(len(x), dtype=torch.int32)
    pointers = (tensor.data_ptr() for tensor in (q, scales, sums))
    _raise(_library().fairseq_quantize(level, layer.linear, x.data_ptr(), len(x), *pointers))
    return q, scales, sums


def product(q: Tensor, layer: Prepared, level: int) -> Tensor:
    """int8 (rows, in) times a layer's codes, transposed: int32 (rows, out), exact."""
    _check("q", q, torch.int8, (len(q), layer.linear.inputs))
    out = q.new_empty(len(q), layer.linear.outputs, dtype=torch.int32)
    _raise(_library().fairseq_product(level, layer.linear, q.data_ptr(), len(q), out.data_ptr()))
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
        _check(name, tensor, torch.float32, (images, tokens, width))
    out = torch.empty_like(query)
    if out.numel():
        block = Block(heads=heads, head_size=width // heads, scaling=scaling)
        pointers = (tensor.data_ptr() for tensor in (query, key, value))
        call, threads = make_call(images, tokens), torch.get_num_threads()
        call.exact = attention_is_exact()
        _raise(_library().fairseq_attention(level, block, call, *pointers, width, out.data_ptr(), threads))
    return out


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
        codes[0], q[0] = low, 127  # the largest products, which saturate where sums are kept in 16 bits
        scale = torch.rand(40, generator=random, dtype=real) + 0.1
        zero = torch.full((40,), 2 ** (bits - 1), dtype=torch.uint8)
        parts = to_panels(codes, bits), sums_of(codes, bits), scale, zero
        layer = Prepared((*parts, *[None] * 5), (70, 40, bits))
        exact = q.to(torch.int64) @ codes.to(torch.int64).T
        if not torch.equal(product(q, layer, level), exact.to(torch.int32)):
            return f"their integer product at {bits} bits differs from the reference's"
        x = torch.randn(19, 70, generator=random, dtype=real)
        rounded, token_scale = quantize_tokens(x)
        centred = codes.double() - (zero.double() - code_offset(bits))[:, None]
        expected = (rounded * token_scale).double() @ (centred * scale[:, None]).T
        if not torch.allclose(run_linear(layer.linear, x, level).double(), expected, rtol=1e-4, atol=1e-3):
            return f"their layer at {bits} bits differs from the reference"
        layer, weight = Prepared((*parts, *[None] * 5), (70, 40, bits, 1)), centred * scale[:, None]
        halves = x.bfloat16().double()  # K products and their sums round, and the product with the scale
        error = (run_linear(layer.linear, x, level) - halves @ weight.T).abs()
        if not bool((error <= 71 * torch.finfo(real).eps * (halves.abs() @ weight.T.abs())).all()):
            return f"their weight-only layer at {bits} bits differs from the reference"
    query, key, value = torch.randn(3, 2, 35, 40, generator=random, dtype=real)
    by_head = [t.view(2, 35, 2, 20).transpose(1, 2) for t in (query, key, value)]
    expected = F.scaled_dot_product_attention(*by_head).transpose(1, 2).reshape(2, 35, 40)
    if not torch.allclose(attention(query, key, value, 2, 20**-0.5, level), expected, atol=0.03):
        return "their attention differs from the reference"
    return None


def _library() -> ctypes.CDLL:
    loaded = library()
    if loaded is None:
        raise RuntimeError(f"no native kernels: {NOT_BUILT}")
    return loaded


_unknown = itertools.count(-1, -1)


def version(tensor: Tensor) -> int:
    """How often a tensor was written to; another number each time for an inference tensor, which does not know."""
    return next(_unknown) if tensor.is_inference() else tensor._version


def _pointers(tensors: Sequence[Tensor | None]) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


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
