"""FusedBlock: an encoder block that runs as one native call, or fused on a GPU, where that gives what layers give."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fairseq.modules.quantization.context import plain_context
from fairseq.modules.quantization.packed import PackedLinear, kernels
from fairseq.modules.quantization.packed.kernels import functional, native_calls, operators
from fairseq.quantization.architectures.forward import evaluating
from fairseq.quantization.engine import ahead
from fairseq.quantization.engine.calls import HARMLESS
from fairseq.quantization.engine.check import compare
from fairseq.quantization.engine.known_block import KnownBlock, has_known_code, remember_code
from fairseq.quantization.engine.plan import FusedPlan, fused_plan, unfused_class
from fairseq.quantization.engine.reading import heads_and_scaling
from fairseq.quantization.engine.runners import reason_not_runnable, runner_of
from fairseq.quantization.engine.spec import Call
from fairseq.quantization.engine.watching import any_watched

BLOCKS: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()
"""All fused blocks by their id: what a compiler only calls gets no module from it."""


class FusedBlock(nn.Module):
    """Put before the class of a block: its forward as one native call where that gives the same, else its own.

    It does on the CPU, in eval mode, while nobody looks into the block: with hooks on what is in it, with attentions
    asked for, or with arguments that its kind of :mod:`calls <fairseq.quantization.engine.calls>` does not know, the
    block runs layer by layer. On a GPU it runs as the kernels of
    :class:`~fairseq.quantization.engine.cuda_block.CudaBlock` under the same conditions. Parameters, buffers, their
    names and the state dict are those of the block as it was, and so is what it returns. The bits of an image's output
    depend neither on the rest of the batch nor, on the CPU, on the number of threads. Gradients are those of the
    layers, which run in the backward pass.
    """

    plan: FusedPlan
    _native: KnownBlock | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """(images, tokens, width) and what else the block takes -> what it returns, in the dtype of hidden states."""
        if not args and "hidden_states" in kwargs:
            args = (kwargs.pop("hidden_states"),)
        if not args or not isinstance(args[0], Tensor) or not functional.plain(args[0]):
            return super().forward(*args, **kwargs)
        if args[0].device.type == "cpu" and not torch.compiler.is_compiling():
            ready = ahead.taken(self, args[0], args[1:], kwargs)
            if ready is not None:
                return self._returned(ready)
        call = self._call(args, kwargs)
        if call is None:
            return super().forward(*args, **kwargs)
        x = args[0]
        if torch.compiler.is_compiling():
            return self._returned(self._run(x.detach(), call))
        if torch.is_grad_enabled():
            tuned = [parameter for parameter in cast(KnownBlock, self._native).parameters if parameter.requires_grad]
            if tuned or x.requires_grad:
                return self._returned(cast(Tensor, Recomputed.apply(self, call, args[1:], kwargs, x, *tuned)))
        if x.dtype == torch.float32 and x.device.type == "cpu":
            return self._returned(ahead.run(self, x.contiguous(), call, args[1:], kwargs))
        return self._returned(self._run(x, call))

    def by_layers(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The hidden states that :meth:`forward` gives for the same arguments, layer by layer."""
        output = super().forward(hidden_states, *args, **kwargs)
        return cast(Tensor, output[0] if isinstance(output, tuple) else output)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """What the native block is called with for such arguments; None if only the layers give what is asked for."""
        if self.training or functional.recording() or not _fits(args[0]):
            return None
        on_cpu = args[0].device.type == "cpu"
        if torch.compiler.is_compiling() and not on_cpu:
            return None  # on a GPU a compiler fuses the rest around the layers, which are operators
        if not (kernels.runs_native("auto") if on_cpu else kernels.choose(args[0].device).name == "triton"):
            return None
        x, *others = args
        if torch.compiler.is_compiling():
            if functional.compiled_with_gradient(x, *self.parameters()):
                return None  # of which the native block has none in a graph
            asked = [*others, *(value for key, value in kwargs.items() if key not in HARMLESS)]
            plain = not any(value is not None and value is not False for value in asked)
            return Call(x.shape[0], x.shape[1], x.shape[0] * x.shape[1]) if plain and self._fits_in_a_graph() else None
        if torch.is_grad_enabled() and _needs_gradient((others, kwargs)):
            return None  # of which the recomputed layers give none
        if self._native is None or not self._native.holds():
            with plain_context():
                self._native = known_block_of(self)
            self.plan = self.plan if self._native is None else self._native.plan
        if self._native is None or self._native.device != x.device or any_watched(self._native.inner):
            return None
        return self._native.call(x, tuple(others), kwargs)

    def _fits_in_a_graph(self) -> bool:
        """Whether the block still is what its plan says, as far as a compiler that records this can follow."""
        plan, inner = self.plan, [module for module in self.modules() if module is not self]
        if not plan.plain:
            return False
        layers = [cast(PackedLinear, self.get_submodule(path)) for path in plan.layers]
        if any(layer.config.activations is None for layer in layers) and native_calls.attention_is_exact():
            return False
        attention = cast(Any, self.get_submodule(plan.attention))
        set_as_planned = heads_and_scaling(attention, layers[0].out_features) == (plan.heads, plan.scaling)
        epsilons = tuple([cast(nn.LayerNorm, self.get_submodule(path)).eps for path in plan.norms])
        known = len(inner) == len(plan.classes) and all(type(m) is kind for m, kind in zip(inner, plan.classes))
        in_panels = all(layer.panels is not None for layer in layers)
        seen = plan.returns is not None and not any_watched(inner)
        fits = known and set_as_planned and epsilons == plan.epsilons and in_panels and seen
        implementation = getattr(getattr(attention, "config", None), "_attn_implementation", None)
        return fits and _has_known_code(id(self), implementation)

    def _returned(self, hidden_states: Tensor) -> Any:
        """As the class of the block returns them."""
        length = self.plan.returns
        return (hidden_states, *[None] * (length - 1)) if length else hidden_states

    def _run(self, hidden_states: Tensor, call: Call) -> Tensor:
        if hidden_states.device.type != "cpu":
            return cast(KnownBlock, self._native).run(hidden_states, call)
        x = hidden_states.to(torch.float32).contiguous()
        if torch.compiler.is_compiling():
            y = self._operator(x)
        else:
            assert self._native is not None
            y = self._native.run(x, call)
        return y.to(hidden_states.dtype)

    def _operator(self, x: Tensor) -> Tensor:
        plan = self.plan
        layers = [cast(PackedLinear, self.get_submodule(path)) for path in plan.layers]
        norms = [cast(nn.LayerNorm, self.get_submodule(path)) for path in plan.norms]
        return operators.native_block(
            x,
            [part for layer in layers for part in layer.parts()],
            [size for layer in layers for size in layer.sizes()],
            [tensor.detach().to(torch.float32) for norm in norms for tensor in (norm.weight, norm.bias)],
            plan.epsilons,
            plan.scaling,
            plan.heads,
        )

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new, (unfused_class(type(self)),), {**self.__dict__, "_native": None}  # pointers


class Recomputed(torch.autograd.Function):
    """A fused block with gradients: the backward pass runs its layers, and differentiates those."""

    @staticmethod
    def forward(
        ctx: Any, block: FusedBlock, call: Call, args: tuple[Any, ...], kwargs: Any, x: Tensor, *tuned: Tensor
    ) -> Tensor:
        ctx.block, ctx.arguments = block, (args, kwargs)
        ctx.save_for_backward(x, *tuned)
        return block._run(x, call)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        hidden_states, *tuned = ctx.saved_tensors
        x = hidden_states.detach().requires_grad_()
        # in the mode of the forward pass, whatever the model is in by now; which computed in float32
        with torch.enable_grad(), evaluating(ctx.block), torch.autocast(x.device.type, enabled=False):
            args, kwargs = ctx.arguments
            output = ctx.block.by_layers(x, *args, **kwargs)
        found = torch.autograd.grad(output, [x, *tuned], gradient, allow_unused=True)
        return None, None, None, None, *found


def _has_known_code(number: int, implementation: str | None) -> bool:
    """Of the block with that id, when a compiler asks; again for another ``implementation`` of its attention."""
    block = BLOCKS.get(number)
    return block is not None and has_known_code(block)


_has_known_code._dynamo_marked_constant = True  # type: ignore[attr-defined]  # it takes what this returns


def _fits(x: Tensor) -> bool:
    """Whether these are hidden states that a native block takes."""
    if forward_ad.unpack_dual(x).tangent is not None:  # no derivative of the native block is known forwards
        return False
    known = x.device.type in ("cpu", "cuda") and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return known and x.ndim == 3


def _needs_gradient(value: Any) -> bool:
    """Whether a tensor in some arguments has a gradient."""
    if isinstance(value, Tensor):
        return value.requires_grad
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return any(map(_needs_gradient, items))


def known_block_of(block: nn.Module) -> KnownBlock | None:
    """None where a part no longer fits or is elsewhere, or what would run was seen to differ from such layers."""
    plan = fused_plan(block, unfused_class(type(block)))
    if isinstance(plan, str) or reason_not_runnable(block, plan):
        return None
    finding = compare(block, plan)
    if finding.reason:
        return None
    remember_code(block)
    return runner_of(block, replace(plan, returns=finding.returns))


@functools.cache
def fused_class(kind: type) -> Any:
    """The class of a fused block of a ``kind``."""
    return type(
        f"Fused{kind.__name__}",
        (FusedBlock, kind),
        {"__module__": __name__, "__doc__": FusedBlock.__doc__, "unfused": kind},
    )


def _new(kind: type) -> Any:
    """An empty fused block of a kind, for pickle and copy, which know no class made on the fly."""
    fused = fused_class(kind)
    block = fused.__new__(fused)
    BLOCKS[id(block)] = block
    return block
