"""NativeBlock: what the native kernels take for an encoder block as its parts are now."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from fairseq.modules.quantization.packed import PackedLinear
from fairseq.modules.quantization.packed.kernels import native
from fairseq.quantization.engine.plan import FusedPlan, attention_function, attention_of, settings_of, unfused_class


class NativeBlock:
    """The native block of an encoder block as its parts are now.

    Attributes:
        plan: where its parts are.
        inner: the modules within the encoder block.
        parameters: those whose values it has.
    """

    def __init__(self, block: nn.Module, plan: FusedPlan):
        self.plan = plan
        layers = [cast(PackedLinear, block.get_submodule(path)) for path in plan.layers]
        norms = [cast(nn.LayerNorm, block.get_submodule(path)) for path in plan.norms]
        self.parameters = [tensor for norm in norms for tensor in (norm.weight, norm.bias)]
        floats = [tensor.detach().to(torch.float32).contiguous() for tensor in self.parameters]
        prepared = [layer.prepared() for layer in layers]
        by_role = dict(zip(plan.block.layers, prepared, strict=True))
        pairs = {
            f"norm{i + 1}": ("layer", *floats[2 * i : 2 * i + 2], epsilon) for i, epsilon in enumerate(plan.epsilons)
        }
        self.block = native.make_block(by_role, pairs, plan.heads, plan.scaling)
        self.inner = [module for module in block.modules() if module is not block]
        self.classes = [(module, type(module)) for module in block.modules()]
        kinds = {*(kind for _, kind in self.classes), unfused_class(type(block))}
        self.code = [(kind, kind.__call__, kind.forward) for kind in kinds]
        self.attention = attention_of(block)
        self.attention_function = attention_function(self.attention)
        self.seen: list[tuple[dict[str, Any], str]] = [
            *((module._modules, name) for module in block.modules() for name in module._modules),
            *((layer._buffers, name) for layer in layers for name in PackedLinear.PARTS),
            *((norm._parameters, name) for norm in norms for name in ("weight", "bias")),
            *((norm.__dict__, "eps") for norm in norms),
            *settings_of(block),
        ]
        self.found = [holder[name] for holder, name in self.seen]
        self.addressed = [thing for thing in self.found if isinstance(thing, Tensor)]
        self.pointers = [tensor.data_ptr() for tensor in self.addressed]
        copied = [tensor for tensor in self.parameters if tensor.dtype != torch.float32]
        self.versions: list[tuple[Tensor, int]] = [(tensor, native.version(tensor)) for tensor in copied]
        self.versions += [pair for layer in prepared for pair in layer.versions]

    def run(self, x: Tensor) -> Tensor:
        """Hidden states, float32 (images, tokens, width) -> the block's output."""
        return native.run_block(self.block, x, native.level_number())

    def holds(self) -> bool:
        """Whether the block still has the same code, modules, tensors and settings; of copies, that they are unchanged.

        A copied tensor that is changed behind PyTorch's back, through ``.data``, is not noticed.
        """
        for (holder, name), found in zip(self.seen, self.found):
            if holder.get(name) is not found:
                return False
        for module, kind in self.classes:
            if type(module) is not kind:
                return False
        for kind, call, forward in self.code:
            if kind.__call__ is not call or kind.forward is not forward:
                return False
        if attention_function(self.attention) != self.attention_function:
            return False
        return self.pointers == [tensor.data_ptr() for tensor in self.addressed] and all(
            native.version(tensor) == number for tensor, number in self.versions
        )
