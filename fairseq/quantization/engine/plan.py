"""FusedPlan: where an encoder block keeps what a native block needs, or why no native block computes what it does."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn
from torch.nn import functional as F

from fairseq.modules.quantization.packed import PackedLinear
from fairseq.modules.quantization.packed.kernels import arguments
from fairseq.quantization.architectures.blocks import class_of, layer_paths
from fairseq.quantization.architectures.separate import SeparateAttention
from fairseq.quantization.engine.reading import attention_of, read
from fairseq.quantization.engine.spec import BlockSpec, reason_not_plain

ATTENTIONS = ("eager", "sdpa")
"""Names of transformers' attention functions that a native block stands for."""
KNOWN_PARTS = (
    nn.Dropout, nn.Identity, nn.LayerNorm, nn.RMSNorm, nn.GELU, nn.ReLU, nn.SiLU, nn.Linear, nn.Sequential,
    PackedLinear, SeparateAttention,
)  # fmt: skip
"""Classes that a block may hold beside those of its own file, of transformers' activations and of timm's layers."""
OWN = ("training", "plan", "forward")
"""What modules hold, but are not set to; a forward of their own is looked for in each call."""
EACH_CALL = ("window_size", "shift_size")
"""What a block of Swin is set to by its calls; it is read in each of them."""


@dataclass(frozen=True)
class FusedPlan:
    """What a native block is made of.

    Attributes:
        roles: role -> path of that layer within the block.
        norms: names of its two norms.
        epsilons: of the two.
        heads: number of heads.
        scaling: what products of queries and keys are multiplied by.
        attention: path of the module that has these two.
        classes: of all modules within the block, in their order.
        plain: whether it is a block that a compiler can record; see ``reason_not_plain``.
        returns: 0 if the block returns hidden states alone; else the length of the tuple whose first item they are,
            and whose others are None. None until that was seen.
    """

    roles: dict[str, str]
    norms: tuple[str, str]
    epsilons: tuple[float, float]
    heads: int
    scaling: float
    attention: str
    classes: tuple[type, ...]
    plain: bool
    returns: int | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of the query, key, value, output, fc1 and fc2 layers, or of those that there are."""
        return tuple(self.roles.values())


def fused_plan(block: nn.Module, kind: type) -> FusedPlan | str:
    """How the native kernels run a block of class ``kind``, or why they cannot."""
    known = class_of(kind)
    if known is None:
        return _another_class(kind)
    roles = layer_paths(block)
    if roles is None:
        return "it lacks a layer of attention or of the MLP"
    if reason := _not_packed({role: block.get_submodule(path) for role, path in roles.items()}):
        return reason
    for path, part in block.named_modules():
        if path and not _is_known(part, kind):
            return f"its {path} is a {type(part).__qualname__}, whose code is not known"
    spec = read(block, known)
    if isinstance(spec, str):
        return spec
    if reason := _rounded_apart(spec):
        return reason
    attention = attention_of(block)
    if reason := _other_attention(attention):
        return reason
    paths = {path: part for path, part in block.named_modules() if path}
    where = next(path for path, part in paths.items() if part is attention)
    epsilons, classes = (spec.norm("norm1").epsilon, spec.norm("norm2").epsilon), tuple(map(type, paths.values()))
    plain = reason_not_plain(spec) is None and known.call in ("images", "clip")  # nothing is added to its products
    return FusedPlan(roles, known.norms, epsilons, spec.heads, spec.scaling, where, classes, plain)


def unfused_class(kind: type) -> Any:
    """The class of a block before it was fused; any other as it is."""
    return getattr(kind, "unfused", kind)


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
    """Where a block and the modules within it keep what they were set to, besides what packed layers hold."""
    parts = [part for part in block.modules() if not isinstance(part, PackedLinear)]
    return [(part.__dict__, name) for part in parts for name in part.__dict__ if name[0] != "_" and name not in OWN]


def _not_packed(layers: dict[str, nn.Module]) -> str | None:
    for role, layer in layers.items():
        if not isinstance(layer, PackedLinear):
            return f"its {role} layer is not packed"
        reason = layer.reason_not_native()
        if reason and layer.reason_not_triton():
            return f"its {role} layer: {reason}"
    return None


def _rounded_apart(spec: BlockSpec) -> str | None:
    """Why the input of layers that read one tensor is not rounded once, or None."""
    for roles in arguments.TOGETHER:
        layers: list[Any] = [spec.layers[role] for role in roles if role in spec.layers]
        if len(layers) < 2:
            continue
        named = f"its {', '.join(roles[:-1])} and {roles[-1]} layers"
        grids = {(layer.config.activations is None, layer.input_grid.key()) for layer in layers}
        if len(grids) > 1 or any(layer.input_factor is not None for layer in layers):
            return f"{named} round their input differently"
        if len({layer.config.group_size for layer in layers}) > 1:
            return f"{named} have groups of different sizes"
    return None


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
    """Whether a part of a block is of a class whose code was read: PyTorch's, timm's, or of the block's own file."""
    own = type(part)
    if own in KNOWN_PARTS:
        return True
    module = sys.modules.get(own.__module__)
    trusted = own.__module__ in (kind.__module__, "transformers.activations")
    others = {"timm.": "timm.layers.", "torchvision.": "torchvision.ops."}
    layers = tuple(parts for name, parts in others.items() if kind.__module__.startswith(name))
    return (trusted or own.__module__.startswith(layers)) and getattr(module, own.__qualname__, None) is own


def _another_class(kind: type) -> str:
    above = next((base for base in kind.__mro__[1:] if class_of(base)), None)
    which = f"{kind.__module__}.{kind.__qualname__}"
    if above is not None:
        return f"its class {which} is derived from {above.__qualname__}, and may compute something else"
    return f"its class {which} is none that the native block computes"
