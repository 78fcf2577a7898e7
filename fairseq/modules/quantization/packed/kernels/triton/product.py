"""The product of int8 activations and weights of a byte each, with all that follows it up to the next layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fairseq.modules.quantization.packed.kernels.triton.functions import (
    INFINITE,
    activated,
    magnitude_bits,
    saturated,
)
from fairseq.modules.quantization.packed.kernels.triton.quantize import Rows, empty_rows
from fairseq.modules.quantization.packed.kernels.triton.tiles import Tile
from fairseq.modules.quantization.packed.weight import code_offset

GROUP = tl.constexpr(8)
"""Row tiles that are worked on together, so that they read the same weights from the cache."""


@triton.jit
def sums_of_products(
    a, w, M, N, K, first_row, first_column,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """int32 (BM, BN)."""
    sums = tl.zeros((BM, BN), tl.int32)
    if DESCRIPTORS:
        for start in range(0, K, BK):
            left, right = a.load([first_row, start]), w.load([first_column, start])
            sums = tl.dot(left, tl.trans(right), sums, out_dtype=tl.int32)
    else:
        rows, columns, step = first_row + tl.arange(0, BM), first_column + tl.arange(0, BN), tl.arange(0, BK)
        a_rows = a + rows.to(tl.int64)[:, None] * K
        w_rows = w + columns.to(tl.int64)[:, None] * K
        for start in range(0, K, BK):
            k = start + step
            if EVEN:
                left = tl.load(a_rows + k[None, :], mask=rows[:, None] < M, other=0)
                right = tl.load(w_rows + k[None, :], mask=columns[:, None] < N, other=0)
            else:
                left = tl.load(a_rows + k[None, :], mask=(rows[:, None] < M) & (k[None, :] < K), other=0)
                right = tl.load(w_rows + k[None, :], mask=(columns[:, None] < N) & (k[None, :] < K), other=0)
            sums = tl.dot(left, tl.trans(right), sums, out_dtype=tl.int32)
    return sums


@triton.jit
def product_kernel(
    a, w, token_scale, sums, scale, zero_point, bias, correction, residual, out, next_scale, next_zero, out_scale,
    out_sums, M, N, K,
    PARTS: tl.constexpr, ONE: tl.constexpr, CENTRED: tl.constexpr, OFFSET: tl.constexpr, BIAS: tl.constexpr,
    CORRECTION: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, NEXT: tl.constexpr, RAW: tl.constexpr,
    EVEN: tl.constexpr, DESCRIPTORS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """One program per tile of the output, (BM, BN)."""
    tile = tl.program_id(0)
    across, down = tl.cdiv(N, BN), tl.cdiv(M, BM)
    first = tile // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    first_row = (first + tile % (GROUP * across) % height) * BM
    column_tile = tile % (GROUP * across) // height
    first_column = column_tile * BN
    total = sums_of_products(a, w, M, N, K, first_row, first_column, BM, BN, BK, EVEN, DESCRIPTORS)
    rows, columns = first_row + tl.arange(0, BM), first_column + tl.arange(0, BN)
    in_rows, in_columns = rows < M, columns < N
    inside = in_rows[:, None] & in_columns[None, :]
    places = rows.to(tl.int64)[:, None] * N + columns[None, :]
    if RAW:
        tl.store(out + places, total, mask=inside)
    else:
        scale_places = columns * 0 if ONE else columns
        if not CENTRED:
            row_sums = tl.load(sums + rows, mask=in_rows, other=0)
            for part in tl.static_range(1, PARTS):
                row_sums += tl.load(sums + tl.cast(part, tl.int64) * M + rows, mask=in_rows, other=0)
            zero = tl.load(zero_point + scale_places, mask=in_columns, other=0).to(tl.int32) - OFFSET
            total -= row_sums[:, None] * zero[None, :]
        s = tl.load(token_scale + rows, mask=in_rows, other=0.0)
        y = total.to(tl.float32) * tl.load(scale + scale_places, mask=in_columns, other=0.0)[None, :] * s[:, None]
        if BIAS:
            b = tl.load(bias + columns, mask=in_columns, other=0.0).to(tl.float32)
            if CORRECTION:
                b = b + tl.load(correction + columns, mask=in_columns, other=0.0)
            y = y + b[None, :]
        elif CORRECTION:
            y = y + tl.load(correction + columns, mask=in_columns, other=0.0)[None, :]
        y = activated(y, ACTIVATION)
        if RESIDUAL:
            y = y + tl.load(residual + places, mask=inside, other=0.0).to(tl.float32)
        if NEXT:
            fixed = tl.load(next_scale)
            q = saturated(y, fixed, tl.load(next_zero))
            tl.store(out + places, q.to(tl.int8), mask=inside)
            q_sums = tl.sum(tl.where(inside, q, 0), 1)
            tl.store(out_sums + tl.cast(column_tile, tl.int64) * M + rows, q_sums, mask=in_rows)
            if column_tile == 0:  # a row that is not finite stays so
                finite = magnitude_bits(s) < INFINITE
                tl.store(out_scale + rows, tl.where(finite, fixed, float("nan")), mask=in_rows)
        else:
            tl.store(out + places, y.to(out.dtype.element_ty), mask=inside)


class Weight(NamedTuple):
    """A layer's weight as the product takes it; see :class:`~fairseq.modules.quantization.packed.weight.PackedWeight`.

    Attributes:
        codes: int8 (N, K).
        scale: float32 (N,) or (1,).
        zero_point: uint8, the shape of ``scale``.
        bits: 2 to 8.
        centred: whether the code 0 stands for 0 everywhere.
        bias: floating (N,), or None.
        correction: float32 (N,), added to the bias; or None.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int
    centred: bool
    bias: Tensor | None
    correction: Tensor | None


class Next(NamedTuple):
    """The static grid of the layer that takes the product: scale float32 (1,), zero_point int32 (1,)."""

    scale: Tensor
    zero_point: Tensor


def run(
    x: Rows, weight: Weight, tile: Tile, dtype: torch.dtype, activation: str = "none", residual: Tensor | None = None
) -> Tensor:
    """residual + activation(x @ W.T + bias), (M, N) as ``dtype``.

    Up to the bias it is what :func:`~..epilogue.finish` defines, to the bit; the rest is in float32, too, and rounds
    once to ``dtype``.

    Args:
        x: of K columns.
        tile: of the output.
        activation: see :func:`~.functions.activated`.
        residual: (M, N), contiguous, floating.
    """
    out = torch.empty(len(x.q), len(weight.codes), dtype=dtype, device=x.q.device)
    _launch(x, weight, tile, out, activation, residual)
    return out


def run_to_rows(x: Rows, weight: Weight, tile: Tile, activation: str, following: Next) -> Rows:
    """The same without a residual, as integers of the next layer's grid, 8 bits."""
    columns = len(weight.codes)
    out = empty_rows(len(x.q), columns, x.q.device, triton.cdiv(columns, tile.columns))
    _launch(x, weight, tile, out.q, activation, None, following, out)
    return out


def run_raw(q: Tensor, codes: Tensor, tile: Tile) -> Tensor:
    """int8 (M, K) times int8 (N, K), transposed: int32 (M, N), exact."""
    out = torch.empty(len(q), len(codes), dtype=torch.int32, device=q.device)
    _launch(Rows(q, q, q), Weight(codes, codes, codes, 8, True, None, None), tile, out, raw=True)
    return out


def _launch(
    x: Rows, weight: Weight, tile: Tile, out: Tensor, activation: str = "none", residual: Tensor | None = None,
    following: Next | None = None, next_rows: Rows | None = None, raw: bool = False,
) -> None:  # fmt: skip
    rows, inner = x.q.shape
    columns = len(weight.codes)
    if not rows or not columns:
        return
    a: Any = x.q
    w: Any = weight.codes
    descriptors = tile.descriptors and _describable(a) and _describable(w)
    if descriptors:
        from triton.tools.tensor_descriptor import TensorDescriptor

        a = TensorDescriptor.from_tensor(a, [tile.rows, tile.inner])
        w = TensorDescriptor.from_tensor(w, [tile.columns, tile.inner])
    following_scale, following_zero = (None, None) if following is None else following
    out_scale, out_sums = (None, None) if next_rows is None else next_rows[1:]
    grid = (triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),)
    product_kernel[grid](
        a, w, x.scale, x.sums, weight.scale, weight.zero_point, weight.bias, weight.correction, residual, out,
        following_scale, following_zero, out_scale, out_sums, rows, columns, inner,
        PARTS=1 if weight.centred else len(x.sums), ONE=weight.scale.numel() == 1, CENTRED=weight.centred,
        OFFSET=code_offset(weight.bits), BIAS=weight.bias is not None, CORRECTION=weight.correction is not None,
        ACTIVATION=activation, RESIDUAL=residual is not None, NEXT=following is not None, RAW=raw,
        EVEN=inner % tile.inner == 0, DESCRIPTORS=descriptors, BM=tile.rows, BN=tile.columns, BK=tile.inner,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
    )  # fmt: skip


def _describable(matrix: Tensor) -> bool:
    """Whether the copy engine reads a matrix of bytes: rows and beginning at multiples of 16."""
    return matrix.shape[1] % 16 == 0 and matrix.data_ptr() % 16 == 0
