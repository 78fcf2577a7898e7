"""float_product: float32 products on x86 by oneDNN, where PyTorch takes MKL, which is half as fast on an AMD EPYC."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

ROWS = (512, 256, 128, 64, 32)
"""Rows that oneDNN multiplies at once. It keeps a program of some 0.7 MB for each shape, up to a thousand of them: so
there are few shapes. What is left over is torch.mm's, which is faster for a few rows, too."""


def float_product(x: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
    """(M, K) times (N, K) transposed, floating, without a gradient: (M, N), rounded as any sum of K products is.

    Of float32 on an x86 processor that is oneDNN's, which uses AVX-512 on any maker's processors, for all but the last
    31 rows. Those, thin matrices, all else, and all where ``torch.backends.mkldnn.enabled`` is False, are torch.mm's.

    Args:
        out: (M, N), of any strides, to be written; None for a new one.

    Raises:
        RuntimeError: a gradient is wanted.
    """
    if out is None:
        out = x.new_empty(len(x), len(w))
    start = 0
    floats = x.dtype == w.dtype == torch.float32 and x.device.type == w.device.type == "cpu"
    if floats and min(x.shape[1], len(w)) > 1 and len(x) >= ROWS[-1] and not _learns(x, w) and _by_onednn():
        if not (w.is_contiguous() or w.t().is_contiguous()):
            w = w.contiguous()  # a part of a larger matrix would take a thousand times as long
        for rows in ROWS:
            while len(x) - start >= rows:
                part = slice(start, start + rows)
                out[part] = torch.ops.mkldnn._linear_pointwise(x[part], w, None, "none", [], "")
                start += rows
    if start < len(x):
        torch.mm(x[start:], w.t(), out=out[start:])  # to which autocast does nothing
    return out


def _learns(*tensors: Tensor) -> bool:
    """Whether a gradient is wanted, which oneDNN's operator would lose without a word."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _by_onednn() -> bool:
    """Whether torch.mm would be MKL's, and oneDNN may be used."""
    return bool(torch.backends.mkldnn.enabled) and _has_both()


@functools.cache
def _has_both() -> bool:
    """Whether this PyTorch has MKL and oneDNN, and the operator of the latter, which has no public name."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
