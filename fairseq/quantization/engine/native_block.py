"""NativeBlock: what the native kernels take for an encoder block as its parts are now."""

from __future__ import annotations

import sys
import weakref
from typing import Any, cast

import torch
from torch import Tensor, nn

from fairseq.modules.quantization.packed import PackedLinear
from fairseq.modules.quantization.packed.kernels import arguments, native, native_calls, structures
from fairseq.quantization.engine.known_block import KnownBlock
from fairseq.quantization.engine.plan import FusedPlan
from fairseq.quantization.engine.spec import NORMS, BlockSpec, Call


class NativeBlock(KnownBlock):
    """The native block of an encoder block as its parts are now, on the CPU.

    Attributes:
        block: what the kernels take.
        halves: whether a layer rounds its input to bfloat16.
        follower: the encoder block that was called with what this one returned, or None.
        most: how many blocks run in one call that begins with this one.
        unused: how often in a row not all of them were called.
    """

    def __init__(self, block: nn.Module, plan: FusedPlan):
        super().__init__(block, plan)
        self.follower: weakref.ref[nn.Module] | None = None
        self.most, self.unused = sys.maxsize, 0
        prepared = {role: cast(PackedLinear, layer).prepared() for role, layer in self.spec.layers.items()}
        self.block = _translated(self.spec, prepared)
        self.halves = any(layer.linear.halves for layer in prepared.values())
        self.versions += [pair for layer in prepared.values() for pair in layer.versions]

    def call(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """What a call of the block gives besides hidden states; None if only the layers can run it."""
        if self.halves and native_calls.attention_is_exact():
            return None
        return super().call(x, args, kwargs)

    def run(self, x: Tensor, call: Call) -> Tensor:
        """Hidden states, float32 (images, tokens, width) -> the block's output."""
        return native_calls.run_blocks([self.block], x, [self.translated(call)], native.level_number())[0]

    def translated(self, call: Call) -> structures.Call:
        """The call as the kernels take it."""
        rotation = None if call.cos is None or call.sin is None else (call.cos, call.sin)
        return arguments.make_call(
            call.images, call.tokens, call.row_count, call.rows, rotation, call.neighbours, call.bias, call.mask,
            self.spec.heads, self.spec.head_size,
        )  # fmt: skip


def _translated(spec: BlockSpec, prepared: dict[str, arguments.Prepared]) -> structures.Block:
    """The spec as the kernels take it."""
    if spec.query_bias is not None:
        prepared = {**prepared, "query": prepared["query"].with_bias(_float(spec.query_bias))}
    norms = {role: spec.norm(role) for role in NORMS}
    return arguments.make_block(
        prepared,
        {role: (norm.kind, _float(norm.weight), _float(norm.bias), norm.epsilon) for role, norm in norms.items()},
        spec.heads,
        spec.scaling,
        spec.activation,
        spec.gating,
        (_float(spec.scale1), _float(spec.scale2)),
        _float(spec.head_scale),
    )


def _float(tensor: Tensor | None) -> Any:
    """float32 and contiguous; None for None."""
    return None if tensor is None else tensor.detach().to(torch.float32).contiguous()
