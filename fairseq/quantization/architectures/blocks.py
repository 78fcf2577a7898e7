"""What is known of each class of encoder blocks: its layers by role, and which layers read which of its norms."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

Paths = Mapping[str, tuple[str, ...]]

SPLIT: Paths = {
    "query": ("attention.attention.query", "attention.q_proj", "attention.self.query", "self_attn.q_proj"),
    "key": ("attention.attention.key", "attention.k_proj", "attention.self.key", "self_attn.k_proj"),
    "value": ("attention.attention.value", "attention.v_proj", "attention.self.value", "self_attn.v_proj"),
    "output": ("attention.output.dense", "attention.o_proj", "self_attn.out_proj"),
    "fc1": ("intermediate.dense", "mlp.fc1"),
    "fc2": ("output.dense", "mlp.fc2"),
}
"""Role -> where a block of transformers has that layer, in one version or another; three projections."""
FUSED: Paths = {"qkv": ("attn.qkv",), "output": ("attn.proj",), "fc1": ("mlp.fc1",), "fc2": ("mlp.fc2",)}
"""The same of timm, with one projection for query, key and value."""


class BlockClass(NamedTuple):
    """One class of pre-norm blocks: query, key and value read the first norm alone, fc1 the second alone.

    Attributes:
        norms: the names of the two LayerNorms.
        paths: where its layers are, by role.
        native: whether it computes what a native block computes: attention with a softmax and nothing added, an exact
            GELU, no scaled branches.
    """

    norms: tuple[str, str] = ("layernorm_before", "layernorm_after")
    paths: Paths = SPLIT
    native: bool = False


_MODELS = "transformers.models"
BLOCK_CLASSES: dict[str, BlockClass] = {
    f"{_MODELS}.vit.modeling_vit.ViTLayer": BlockClass(native=True),
    f"{_MODELS}.deit.modeling_deit.DeiTLayer": BlockClass(native=True),
    f"{_MODELS}.vit_mae.modeling_vit_mae.ViTMAELayer": BlockClass(native=True),
    f"{_MODELS}.vit_msn.modeling_vit_msn.ViTMSNLayer": BlockClass(native=True),
    f"{_MODELS}.beit.modeling_beit.BeitLayer": BlockClass(),
    f"{_MODELS}.swin.modeling_swin.SwinLayer": BlockClass(),
    f"{_MODELS}.dinov2.modeling_dinov2.Dinov2Layer": BlockClass(("norm1", "norm2")),
    f"{_MODELS}.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersLayer": BlockClass(
        ("norm1", "norm2")
    ),
    f"{_MODELS}.clip.modeling_clip.CLIPEncoderLayer": BlockClass(("layer_norm1", "layer_norm2")),
    f"{_MODELS}.siglip.modeling_siglip.SiglipEncoderLayer": BlockClass(("layer_norm1", "layer_norm2")),
    f"{_MODELS}.siglip2.modeling_siglip2.Siglip2EncoderLayer": BlockClass(("layer_norm1", "layer_norm2")),
    "timm.models.vision_transformer.Block": BlockClass(("norm1", "norm2"), FUSED),
}
"""By the full name of the class, for the classes that were read; a subclass is another class."""


@dataclass(frozen=True)
class BlockPlan:
    """Where a block of a known class has what equalization and the fused engine need.

    Attributes:
        kind: its class.
        layers: role ("query", "key", "value", "output", "fc1", "fc2", or "qkv" for the first three) -> path within it.
        norms: path of each LayerNorm -> the roles of the layers that read its output.
    """

    kind: BlockClass
    layers: Mapping[str, str]
    norms: Mapping[str, tuple[str, ...]]

    @property
    def value_feeds_output(self) -> bool:
        """Whether the output projection reads averages over tokens of what one layer, the value, gives."""
        return "value" in self.layers

    def role(self, path: str) -> str | None:
        """The role of the layer at ``path`` within the block, or None."""
        return next((role for role, place in self.layers.items() if place == path), None)


def class_of(kind: type) -> BlockClass | None:
    """What is known of a class of blocks: of this very class object, whatever others are called."""
    known = BLOCK_CLASSES.get(f"{kind.__module__}.{kind.__qualname__}")
    return known if getattr(sys.modules.get(kind.__module__), kind.__qualname__, None) is kind else None


def block_plan(block: nn.Module, kind: BlockClass | None) -> BlockPlan | None:
    """The plan of a block of class ``kind``; None if it lacks a layer, or a norm is not a LayerNorm with bias."""
    if kind is None:
        return None
    inside = {path for path, _ in block.named_modules()}
    layers = {role: next((p for p in paths if p in inside), None) for role, paths in kind.paths.items()}
    norms: list[Any] = [getattr(block, name, None) for name in kind.norms]
    if not all(isinstance(norm, nn.LayerNorm) for norm in norms):
        return None
    if any(norm._parameters.get(name) is None for norm in norms for name in ("weight", "bias")):  # none, or computed
        return None
    found = {role: path for role, path in layers.items() if path is not None}
    if len(found) < len(layers):
        return None
    first = tuple(role for role in found if role in ("query", "key", "value", "qkv"))
    return BlockPlan(kind, found, dict(zip(kind.norms, (first, ("fc1",)))))
