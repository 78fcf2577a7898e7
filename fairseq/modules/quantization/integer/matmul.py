"""Products of integer matrices, on devices whose libraries multiply floats and bytes only, too."""

from __future__ import annotations

import torch
from torch import Tensor


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, exact: int64 (..., M, K) and (..., K, N) -> (..., M, N), of the same leading dimensions.

    PyTorch has no such product on CUDA: there it is a sum of outer products, K operations of integers.
    """
    return a @ b if a.device.type == "cpu" else outer_products(a, b)


def outer_products(a: Tensor, b: Tensor) -> Tensor:
    """:func:`matmul` on any device."""
    result = torch.zeros((*a.shape[:-1], b.shape[-1]), dtype=torch.int64, device=a.device)
    for k in range(a.shape[-1]):
        result.addcmul_(a[..., k, None], b[..., k, None, :])
    return result
