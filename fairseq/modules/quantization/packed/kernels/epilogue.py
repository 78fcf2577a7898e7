"""The epilogue: from a layer's integer sums to its output, the one order of operations that every kernel follows."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def finish(
    accumulators: Iterable[Tensor],
    scale: Tensor,
    token_scale: Tensor,
    bias: Tensor | None,
    out: Tensor | None = None,
    term: Tensor | None = None,
) -> Tensor:
    """Scale the integer sums of a layer and add its bias: the definition, which no kernel departs from.

        y[m, n] = ((float(acc[m, n]) * s_w[n]) * s_x[m]) + b[n]
        acc[m, n] = sum over k of q_x[m, k] * (q_w[n, k] - z_w[n]), exact

    The conversion, the two products and the sum round once each, half to even, in the dtype of s_w. No two are fused:
    whether ``addcmul`` rounds once or twice depends on the compiler that built PyTorch, so it is not used. One scale
    for the whole weight takes the same place. With groups of columns g, in their order:

        t = float(acc_0) * s_w[n, 0], then t = t + (float(acc_g) * s_w[n, g])
        y[m, n] = (t * s_x[m]) + b[n]

    With a static input range q_x is not centred: b holds the correction for its zero point, see
    :meth:`~fairseq.modules.quantization.packed.input_grid.InputGrid.bias`. Without b nothing is added. Rounding y to
    the dtype of the layer's input comes after. So a model's bits do not depend on which kernels ran it: one unit in the
    last place here would send a rounding further on to its other side, and all that follows from it.

    Args:
        accumulators: acc of each group in order, (M, N), integers. Each is read before the next one is asked for.
        scale: s_w, float32 or float64, (1,), (N,) or (N, groups).
        token_scale: s_x, (M, 1), the dtype of ``scale``.
        bias: b, (N,), the dtype of ``scale``, or None.
        out: memory for the result, (M, N), the dtype of ``scale``; None for new memory, as what is recorded needs.
        term: memory for one group's term, the same, if there are several groups and ``out`` is given.

    Returns:
        y, (M, N), the dtype of ``scale``: ``out`` if it is given.
    """
    total: Tensor | None = None
    for accumulator, s in zip(accumulators, scale.unbind(1) if scale.ndim == 2 else (scale,), strict=True):
        if total is None:
            total = _product(accumulator, s, out)
        else:
            total = torch.add(total, _product(accumulator, s, term), out=out)
    assert total is not None
    total = torch.mul(total, token_scale, out=out)
    return total if bias is None else torch.add(total, bias, out=out)


def _product(accumulator: Tensor, scale: Tensor, out: Tensor | None) -> Tensor:
    """float(acc) * s_w."""
    real = accumulator.to(scale.dtype) if out is None else out.copy_(accumulator)
    return torch.mul(real, scale, out=out)
