"""The same layer as a few pure operations, for tracing, compiling, exporting, and as the base of the CUDA kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq.modules.quantization.packed.input_grid import InputGrid
from fairseq.modules.quantization.packed.kernels.epilogue import finish
from fairseq.modules.quantization.packed.weight import PackedWeight

Product = Callable[[Tensor, Tensor], Tensor]
Result = TypeVar("Result")


def capturing() -> bool:
    """Whether the operations are being recorded, so that nothing may depend on values or write into shared memory."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def compiled_with_gradient(*tensors: Tensor) -> bool:
    """Whether torch.compile records operations of which a gradient is wanted; what is exported has none."""
    exported = torch.compiler._is_exporting_flag  # in 2.9 a compiler takes is_exporting() for True
    wanted = torch.compiler.is_compiling() and not exported and torch.is_grad_enabled()
    return wanted and any(tensor.requires_grad for tensor in tensors)


def recording() -> bool:
    """Whether operations are being recorded into a graph that must run without this library: a trace or ONNX."""
    return torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()  # type: ignore[attr-defined]


def observed() -> bool:
    """Whether operations go to something before their kernels: torch.func, FakeTensorMode or another dispatch mode."""
    return torch._C._functorch.maybe_current_level() is not None or torch._C._len_torch_dispatch_stack() > 0


def plain(*tensors: Tensor) -> bool:
    """Whether these are numbers in memory, and operations on them run as they are called; or a compiler records them.

    Fake tensors and other subclasses are not, and nothing is while operations are :func:`observed`.
    """
    if torch.compiler.is_compiling():
        return True
    return not observed() and all(
        type(t) in (Tensor, nn.Parameter) and not t.is_neg() and not torch._is_zerotensor(t) for t in tensors
    )


def aside(function: Callable[..., Result], *args: Any) -> Result:
    """What a function gives where operations run as they are called: in another thread if they do not in this one."""
    if not capturing() and not observed():
        return function(*args)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function, *args).result()


def integer(x: Tensor, weight: PackedWeight, bias: Tensor | None, grid: InputGrid, product: Product) -> Tensor:
    """(M, in) -> (M, out), dtype of ``x``; ``product`` is int8 (M, K), int8 (N, K) -> int32 (M, N).

    The bits of the reference, but for groups in a graph for ONNX, whose products are of floats.
    """
    compute = weight.scale.dtype
    rounded, token_scale = grid.quantize(x.to(compute))  # (M, in), (M, 1)
    if weight.group_size is not None and torch.onnx.is_in_onnx_export():
        # A product per group would be hundreds of nodes; a float product of the same values is one.
        return weight_only(grid.centre(rounded) * token_scale, weight, bias).to(x.dtype)
    accumulators = _accumulators(rounded, weight, product)
    return finish(accumulators, weight.scale, token_scale, grid.bias(bias, compute)).to(x.dtype)


def _accumulators(rounded: Tensor, weight: PackedWeight, product: Product) -> Iterator[Tensor]:
    """The sums of each group of columns, int32 (M, N); ``rounded``: integers, in a floating dtype."""
    q, codes, zero_point = rounded.to(torch.int8), weight.unpacked(), weight.code_zero_point()
    for group, (start, stop) in enumerate(weight.columns()):
        grouped = weight.scale.ndim == 2
        part, columns = (q[:, start:stop], codes[:, start:stop]) if grouped else (q, codes)
        accumulator = product(part, columns)  # (M, N)
        if not weight.centred:
            sums = rounded[:, start:stop].sum(-1, keepdim=True).to(torch.int32)
            accumulator = accumulator - sums * (zero_point[:, group] if grouped else zero_point)
        yield accumulator


def weight_only(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """x times the dequantized weight in the dtype of ``x``: (M, in) -> (M, out), in no defined order of sums."""
    w = _dequantize(weight, x.dtype)
    return F.linear(x, w, None if bias is None else bias.to(x.dtype)).to(x.dtype)  # autocast would change the dtype


def _dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The weight as real numbers, (out, in); while exporting to ONNX by its DequantizeLinear."""
    if not torch.onnx.is_in_onnx_export() or weight.group_size is not None:
        return weight.dequantize(dtype)
    codes, one = weight.unpacked(), weight.scale.numel() == 1
    scale, zero_point = weight.scale, weight.code_zero_point().to(torch.int8)
    if one:
        scale, zero_point = scale.reshape(()), zero_point.reshape(())
    result: Tensor = torch.onnx.ops.symbolic(
        "DequantizeLinear", (codes, scale, zero_point), {} if one else {"axis": 0}, dtype=scale.dtype, shape=codes.shape
    )
    return result.to(dtype)


def int_product(q: Tensor, codes: Tensor) -> Tensor:
    """torch._int_mm, or ONNX's MatMulInteger while exporting to ONNX."""
    if torch.onnx.is_in_onnx_export():
        shape = (q.shape[0], codes.shape[0])
        result: Tensor = torch.onnx.ops.symbolic("MatMulInteger", (q, codes.t()), dtype=torch.int32, shape=shape)
        return result
    if q.shape[1] == 1:  # torch 2.9 takes the strides of a single column for those of a row
        q, codes = F.pad(q, (0, 1)), F.pad(codes, (0, 1))
    return torch._int_mm(q, codes.t())
