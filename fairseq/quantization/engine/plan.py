"""FusedPlan: where an encoder block keeps what a native block needs, or why no native block computes what it does."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.nn import functional as F

from fairseq.modules.quantization.packed import PackedLinear
from fairseq.quantization.architectures.blocks import BLOCK_CLASSES, BlockPlan, block_plan, class_of

ATTENTIONS = ("eager", "sdpa")
"""Names of transformers' attention functions that a native block stands for."""
KNOWN_PARTS = (nn.Dropout, nn.Identity, nn.LayerNorm, nn.GELU, PackedLinear)
"""Classes that a block may hold beside those of its own file, and of transformers' activations."""


@dataclass(frozen=True)
class FusedPlan:
    """What a native block is made of.

    Attributes:
        block: paths of the layers and norms within the block, by role.
        epsilons: of the two norms.
        heads: number of heads.
        scaling: what products of queries and keys are multiplied by.
        attention: path of the module that has these two.
        classes: of all modules within the block, in their order.
    """

    block: BlockPlan
    epsilons: tuple[float, float]
    heads: int
    scaling: float
    attention: str
    classes: tuple[type, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of the query, key, value, output, fc1 and fc2 layers."""
        return tuple(self.block.layers.values())

    @property
    def norms(self) -> tuple[str, ...]:
        """Paths of the LayerNorm before attention and of the one after."""
        return tuple(self.block.norms)


def fused_plan(block: nn.Module, kind: type) -> FusedPlan | str:
    """How the native kernels run a block of class ``kind``, or why they cannot."""
    known = class_of(kind)
    if known is None or not known.native:
        return _another_class(kind)
    plan = block_plan(block, known)
    if plan is None:
        return "it lacks a layer, or its norms are not LayerNorms with weight and bias"
    layers = {role: block.get_submodule(path) for role, path in plan.layers.items()}
    for role, layer in layers.items():
        if not isinstance(layer, PackedLinear):
            return f"its {role} layer is not packed"
        if reason := layer.reason_not_native():
            return f"its {role} layer: {reason}"
    for path, part in block.named_modules():
        if path and not _is_known(part, kind):
            return f"its {path} is a {type(part).__qualname__}, whose code is not known"
    packed = cast(dict[str, PackedLinear], layers)
    readers = [packed[role] for role in ("query", "key", "value")]
    if len({layer.input_grid.key() for layer in readers}) > 1 or any(x.input_factor is not None for x in readers):
        return "its query, key and value layers round their input differently"
    norms = [cast(nn.LayerNorm, block.get_submodule(path)) for path in plan.norms]
    if any(type(norm) is not nn.LayerNorm for norm in norms):
        return "its norms are not plain LayerNorms"
    attention = attention_of(block)
    if attention is None:
        return "it has no attention module with num_attention_heads and scaling"
    heads, scaling = int(attention.num_attention_heads), float(attention.scaling)
    if getattr(attention, "is_causal", False):
        return "its attention is causal"
    if not scaling > 0:
        return f"its scaling is {scaling}"
    if packed["query"].out_features % heads:
        return f"its {packed['query'].out_features} columns do not divide into {heads} heads"
    if not _has_gelu(block):
        return "its activation is not the exact GELU"
    if reason := _other_attention(attention):
        return reason
    paths = {path: part for path, part in block.named_modules() if path}
    where = next(path for path, part in paths.items() if part is attention)
    return FusedPlan(plan, (norms[0].eps, norms[1].eps), heads, scaling, where, tuple(map(type, paths.values())))


def unfused_class(kind: type) -> Any:
    """The class of a block before it was fused; any other as it is."""
    return getattr(kind, "unfused", kind)


def attention_of(block: nn.Module) -> Any:
    """The module in a block that has heads and a scaling; None if there is not exactly one."""
    found = [m for m in block.modules() if hasattr(m, "num_attention_heads") and hasattr(m, "scaling")]
    return found[0] if len(found) == 1 else None


class AttentionFunction(NamedTuple):
    """What an attention module calls.

    Attributes:
        name: of the function of transformers that it asks for.
        registered: what is registered under that name now, or None.
        eager: what its own file calls "eager".
        torch: PyTorch's function, as it is now.
    """

    name: str | None
    registered: Any
    eager: Any
    torch: Any


def attention_function(attention: Any) -> AttentionFunction:
    """What an attention module calls, as it is now: any of it may have been replaced."""
    name = getattr(getattr(attention, "config", None), "_attn_implementation", None)
    registry = getattr(sys.modules.get("transformers.modeling_utils"), "ALL_ATTENTION_FUNCTIONS", None)
    eager = getattr(sys.modules.get(type(attention).__module__), "eager_attention_forward", None)
    registered = registry.get(name) if registry is not None else None
    return AttentionFunction(name, registered, eager, F.scaled_dot_product_attention)


def settings_of(block: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where the modules within a block keep what they were set to, besides what packed layers and norms hold."""
    parts = [
        part for part in block.modules() if part is not block and not isinstance(part, PackedLinear | nn.LayerNorm)
    ]
    return [(part.__dict__, name) for part in parts for name in part.__dict__ if name[0] != "_" and name != "training"]


def _other_attention(attention: Any) -> str | None:
    """Why an attention module computes something else than a softmax of scaled products, or None."""
    used = attention_function(attention)
    if used.name not in (None, *ATTENTIONS):
        return f"its attention function is {used.name!r}, not one of {', '.join(map(repr, ATTENTIONS))}"
    known = getattr(sys.modules.get("transformers.integrations.sdpa_attention"), "sdpa_attention_forward", None)
    if used.registered is not None and used.registered is not known:
        return f"its attention function {used.name!r} was replaced by {used.registered!r}"
    return None


def _is_known(part: nn.Module, kind: type) -> bool:
    """Whether a part of a block is of a class whose code was read: PyTorch's, or of the block's own file."""
    own = type(part)
    if own in KNOWN_PARTS:
        return True
    module = sys.modules.get(own.__module__)
    trusted = own.__module__ in (kind.__module__, "transformers.activations")
    return trusted and getattr(module, own.__qualname__, None) is own


def _another_class(kind: type) -> str:
    known = [name for name, known in BLOCK_CLASSES.items() if known.native]
    above = next((base for base in kind.__mro__[1:] if class_of(base)), None)
    which = f"{kind.__module__}.{kind.__qualname__}"
    if above is not None:
        return f"its class {which} is derived from {above.__qualname__}, and may compute something else"
    names = ", ".join(name.rpartition(".")[2] for name in known)
    return f"its class {which} is none that the native block computes ({names} of transformers)"


@torch.no_grad()
def _has_gelu(block: nn.Module) -> bool:
    """Whether the activation of the MLP is the exact GELU: as it computes, whatever its class."""
    names = ("activation_fn", "intermediate_act_fn")
    functions = [getattr(module, name) for module in block.modules() for name in names if hasattr(module, name)]
    x = torch.linspace(-6, 6, 97)
    return len(functions) == 1 and torch.allclose(functions[0](x), F.gelu(x), rtol=0, atol=1e-6)
