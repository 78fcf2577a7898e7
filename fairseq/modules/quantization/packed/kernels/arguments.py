"""The tensors of layers, blocks and calls as the compiled library takes them: checked, and pointed to."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fairseq.modules.quantization.packed.kernels.structures import (
    ACTIVATIONS,
    BLOCK_NORMS,
    GATINGS,
    LAYERS,
    NORMS,
    Block,
    Call,
    Linear,
    Norm,
)
from fairseq.modules.quantization.packed.panels import GROUP, is_narrow, panels_shape
from fairseq.modules.quantization.packed.weight import code_offset
from fairseq.modules.quantization.scalar.ops import check_bits
from fairseq.modules.quantization.scalar.weights import MAX_GROUP

Parts = tuple[Tensor | None, ...]
NormParts = tuple[str, Tensor | None, Tensor | None, float]
"""Kind, one of :data:`~.structures.NORMS`; weight and bias, float32 of the row's width, or None; epsilon."""
FEWEST = 8
"""Columns of a part where one layer gives queries, keys and values: a vector of 16 lanes holds two parts at most."""
TOGETHER = (("query", "key", "value"), ("gate", "fc1"))
"""Layers of a block whose input is rounded once for all of them."""


def reason_not_grouped(group_size: int, halves: bool) -> str | None:
    """Why there can be no groups of so many inputs, rounded to bfloat16 if ``halves``, else to integers, or None.

    A group is a whole number of what a panel is filled up to, and of 64 bytes of bfloat16, which a tile takes at once.
    Its sums of integers are exact in float32.
    """
    step = 2 * GROUP if halves else GROUP
    if 0 < group_size <= MAX_GROUP and group_size % step == 0:
        return None
    return f"group_size={group_size}, which is no multiple of {step} up to {MAX_GROUP}"


class Prepared:
    """A layer's tensors as the kernels take them, and the :class:`Linear` that points to them.

    Args:
        parts: panels, uint8 of ``panels_shape(out_features, in_features, bits)``; sums, int32 (out_features,), of each
            output's codes, or None below 5 bits; scale, float32 (1,) or (out_features,); zero_point, uint8, the shape
            of ``scale``; bias, (out_features,); factor, (in_features,); and of a static range input_scale (1,),
            input_zero_point (1,) and correction, (out_features,). The last five may be None. With groups of inputs,
            sums, scale and zero_point are (out_features, groups).
        sizes: in_features, out_features, bits; 1 if the input is rounded to bfloat16, 0 if to integers; the bits of
            these; and the inputs of a group, 0 for none. The last three are 0, 8 and 0 where they are left out.

    Raises:
        ValueError: another dtype, shape, device or stride, the message names the tensor; sizes that there cannot be; or
            a static range for an input that is rounded to bfloat16.
    """

    def __init__(self, parts: Parts, sizes: Sequence[int]):
        self.parts = parts
        panels, sums, scale, zero_point, bias, factor, input_scale, input_zero_point, correction = parts
        inputs, outputs, bits, halves, input_bits, group = (*sizes, *(0, 8, 0)[len(sizes) - 3 :])
        check_bits(input_bits)
        if group and (reason := reason_not_grouped(group, bool(halves))):
            raise ValueError(f"a native layer has no {reason}")
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
        scales: tuple[int, ...] = (1,) if scale.numel() == 1 else (outputs,)
        if group:
            scales = (outputs, -(-inputs // group))
        check("panels", panels, torch.uint8, panels_shape(outputs, inputs, bits))
        if sums is not None:
            check("sums", sums, torch.int32, scales if group else (outputs,))
        check("scale", scale, torch.float32, scales)
        check("zero_point", zero_point, torch.uint8, scales)
        if bias is not None:
            check("bias", bias, torch.float32, (outputs,))
        if factor is not None:
            check("factor", factor, torch.float32, (inputs,))
        self.tensors = panels, sums, scale, zero_point, bias, factor
        self.pointers = _pointers(parts)
        fixed = (0.0, 0) if input_scale is None or input_zero_point is None else (input_scale, input_zero_point)
        self.linear = Linear(
            *(pointer(tensor) for tensor in self.tensors), inputs, outputs, is_narrow(bits), code_offset(bits),
            scales[-1] if group else scales != (1,), float(fixed[0]), int(fixed[1]), halves, input_bits, group,
        )  # fmt: skip
        self.linear.kept = self.tensors

    def with_bias(self, bias: Tensor) -> Prepared:
        """The same with ``bias``, float32 (outputs,), added to the results of a layer that has no bias itself.

        Raises:
            ValueError: the layer has one.
        """
        if self.parts[4] is not None:
            raise ValueError("the layer has a bias already")
        check("bias", bias, torch.float32, (self.linear.outputs,))
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
        ValueError: sizes that do not fit together, the message gives them; or layers that read one tensor, and do not
            all round it to the same integers, or to bfloat16, in the same groups.
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
        readers = [linears[name] for name in together if name in linears]
        inputs = {(linear.halves, linear.input_bits, linear.group_size) for linear in readers}
        if len(inputs) > 1:
            raise ValueError(
                f"the input of {', '.join(together)} is rounded once, to integers of so many bits or to bfloat16, in "
                f"groups of one size; got (bfloat16, bits, group_size) {sorted(inputs)}"
            )
    if not scaling > 0:
        raise ValueError(f"the scaling of attention must be positive, got {scaling}")
    size = inner // heads
    widths = dict.fromkeys(BLOCK_NORMS, width)
    widths |= {"query_norm": size, "key_norm": size, "attended_norm": inner, "hidden_norm": mlp}
    for name, (_, *parts, _) in norms.items():
        for part, tensor in zip(("weight", "bias"), parts, strict=True):
            if tensor is not None:
                check(f"{name}.{part}", tensor, torch.float32, (widths[name],))
    for name, scale, shape in zip(("scale1", "scale2", "head_scale"), (*scales, head_scale), (width, width, heads)):
        if scale is not None:
            check(name, scale, torch.float32, (shape,))
    block = Block(
        *(linears.get(name, Linear()) for name in LAYERS),
        *(norm_of(norms.get(name)) for name in BLOCK_NORMS),
        *(pointer(scale) for scale in (*scales, head_scale)),
        scaling, 3 if three else 1, ACTIVATIONS.index(activation), GATINGS.index(gating), width, heads, size, mlp,
    )  # fmt: skip
    block.kept = (*layers.values(), *norms.values(), *scales, head_scale)
    return block


def norm_of(parts: NormParts | None) -> Norm:
    """A norm as the library takes it; one that does nothing for None."""
    if parts is None:
        return Norm()
    kind, weight, bias, epsilon = parts
    return Norm(pointer(weight), pointer(bias), epsilon, NORMS.index(kind))


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
        check("rows", rows, torch.int32, (images * tokens,))
        _check_rows(rows, row_count)
    elif row_count != images * tokens:
        raise ValueError(f"{images} images of {tokens} tokens are {images * tokens} rows, not {row_count}")
    for name, table in zip(("cosines", "sines"), rotation or ()):
        check(name, table, torch.float32, (tokens, head_size))
    if bias is not None:
        check("bias", bias, torch.float32, (heads, tokens, tokens))
    if mask is not None:
        check("mask", mask, torch.float32, (len(mask), tokens, tokens))
    cosines, sines = rotation or (None, None)
    call = Call(
        images, tokens, row_count, pointer(rows), pointer(cosines), pointer(sines), pointer(bias), pointer(mask),
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


def follows(call: Call, first: Call) -> bool:
    """Whether a block that is called so can run right behind one that is called as ``first`` says, image by image."""
    alike = call.images == first.images and call.tokens == first.tokens
    return alike and not call.rows and not first.rows


_unknown = itertools.count(-1, -1)


def version(tensor: Tensor) -> int:
    """How often a tensor was written to; another number each time for an inference tensor, which does not know."""
    return next(_unknown) if tensor.is_inference() else tensor._version


def _pointers(tensors: Sequence[Tensor | None]) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def pointer(tensor: Tensor | None) -> int | None:
    """The address of a tensor's numbers, or None."""
    return None if tensor is None else tensor.data_ptr()


def check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """ValueError unless the tensor is dense, on the CPU, and of this dtype and shape."""
    if tensor.dtype != dtype or tensor.shape != shape or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be a contiguous {dtype} tensor of shape {shape} on the CPU, got {tensor.dtype} of shape "
            f"{tuple(tensor.shape)} and strides {tensor.stride()} on {tensor.device}"
        )
