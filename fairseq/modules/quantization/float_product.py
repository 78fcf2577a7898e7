"""float_product: float32 products on x86 by oneDNN, where PyTorch takes MKL, which is half as fast on an AMD EPYC."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def float_product(x: Tensor, w: Tensor) -> Tensor:
    """(M, K) times (N, K) transposed, floating, without a gradient: (M, N), rounded as any sum of K products is.

    Of float32 on an x86 processor the product is oneDNN's, which has AVX-512 on every make. All else is torch.mm's.
    """
    floats = x.dtype == w.dtype == torch.float32 and x.device.type == w.device.type == "cpu"
    if floats and min(*x.shape, *w.shape) > 1 and _by_onednn():
        if not (w.is_contiguous() or w.t().is_contiguous()):
            w = w.contiguous()  # a part of a larger matrix would take a thousand times as long
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
        return found
    return torch.mm(x, w.t(), out=x.new_empty(len(x), len(w)))  # to which autocast does nothing


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
