"""What runs an encoder block where its parts are: the native block on the CPU, the kernels in Triton on a GPU."""

from __future__ import annotations

from typing import cast

from torch import nn

from fairseq.modules.quantization.packed import PackedLinear
from fairseq.quantization.engine.known_block import KnownBlock
from fairseq.quantization.engine.native_block import NativeBlock
from fairseq.quantization.engine.plan import FusedPlan


def reason_not_runnable(block: nn.Module, plan: FusedPlan) -> str | None:
    """Why nothing runs the block where its parts are now, or None."""
    devices = {tensor.device for tensor in (*block.parameters(), *block.buffers())}
    if len(devices) != 1:
        return "its parts are on several devices"
    (device,) = devices
    layers = [cast(PackedLinear, block.get_submodule(path)) for path in plan.layers]
    if device.type == "cuda":
        return next((f"its {layer.name}: {why}" for layer in layers if (why := layer.reason_not_triton())), None)
    if device.type != "cpu":
        return f"its parts are on {device}"
    return "its integers lie in rows" if any(layer.panels is None for layer in layers) else None


def runner_of(block: nn.Module, plan: FusedPlan) -> KnownBlock:
    """What runs a block for which there is no :func:`reason_not_runnable`.

    Raises:
        ValueError: it has a part that is not computed there; the message says which.
    """
    if cast(PackedLinear, block.get_submodule(plan.layers[0])).scale.device.type == "cpu":
        return NativeBlock(block, plan)
    from fairseq.quantization.engine.cuda_block import CudaBlock  # imports Triton

    return CudaBlock(block, plan)
