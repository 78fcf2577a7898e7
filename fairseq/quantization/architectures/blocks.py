"""What is known of each class of encoder blocks: its layers by role, its norms, and what else decides what it gives."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

Paths = Mapping[str, tuple[str, ...]]

SEPARATE = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "out_proj"}
PROJECTIONS: tuple[Paths, ...] = (
    {
        "query": ("attention.attention.query", "attention.q_proj", "attention.self.query", "self_attn.q_proj"),
        "key": ("attention.attention.key", "attention.k_proj", "attention.self.key", "self_attn.k_proj"),
        "value": ("attention.attention.value", "attention.v_proj", "attention.self.value", "self_attn.v_proj"),
        "output": ("attention.output.dense", "attention.o_proj", "self_attn.out_proj", "attention.projection_layer"),
    },
    {"qkv": ("attn.qkv",), "output": ("attn.proj",)},
    {"query": ("attn.q_proj",), "key": ("attn.k_proj",), "value": ("attn.v_proj",), "output": ("attn.proj",)},
    {role: (f"self_attention.{path}", f"attn.{path}") for role, path in SEPARATE.items()},
)
"""Role -> where a block has that layer, in one version or another: of transformers, of timm with one or three, and of
torchvision and OpenCLIP, see :mod:`~fairseq.quantization.architectures.separate`."""
PLAIN: Paths = {
    "fc1": ("intermediate.dense", "mlp.fc1", "mlp.c_fc", "mlp.0"),
    "fc2": ("output.dense", "mlp.fc2", "mlp.c_proj", "mlp.3"),
}
GATED: Paths = {
    "gate": ("mlp.gate_proj", "mlp.fc1_g"),
    "fc1": ("mlp.up_proj", "mlp.fc1_x"),
    "fc2": ("mlp.down_proj", "mlp.fc2"),
}
OTHERS: Paths = {"fc1": ("mlp.up_proj", "mlp.weights_in"), "fc2": ("mlp.down_proj", "mlp.weights_out")}
"""DINOv3 without a gate, and DINOv2's, which has both in one layer."""
MLPS = (GATED, PLAIN, OTHERS)
SPLIT: Paths = {**PROJECTIONS[0], **PLAIN}
"""Of the blocks that are equalized: three projections."""
APART: Paths = {**PROJECTIONS[3], **PLAIN}
"""The same of torchvision and OpenCLIP."""
FUSED: Paths = {**PROJECTIONS[1], **PLAIN}
"""The same of timm, with one projection for query, key and value."""


class BlockClass(NamedTuple):
    """One class of blocks: two branches that add to hidden states, attention and an MLP.

    Attributes:
        norms: the names of its two norms.
        paths: where the layers of those that are equalized are, by role: pre-norm blocks whose query, key and value
            read the first norm alone, and fc1 the second alone. None: a block of this class is not equalized.
        scales: the names of what multiplies the branches (LayerScale): modules, parameters or numbers.
        post_norm: whether the norms are of what the branches add, not of what they read.
        call: how the arguments of its forward become those of a native call; see ``engine/calls.py``.
    """

    norms: tuple[str, str] = ("layernorm_before", "layernorm_after")
    paths: Paths | None = SPLIT
    scales: tuple[str, str] | None = None
    post_norm: bool = False
    call: str = "images"


_MODELS = "transformers.models"
_NORM12, _LAYER_NORM12 = ("norm1", "norm2"), ("layer_norm1", "layer_norm2")
_LN12 = ("ln_1", "ln_2")
_LAMBDAS, _SCALES, _GAMMAS = ("lambda_1", "lambda_2"), ("layer_scale1", "layer_scale2"), ("gamma_1", "gamma_2")
BLOCK_CLASSES: dict[str, BlockClass] = {
    f"{_MODELS}.vit.modeling_vit.ViTLayer": BlockClass(),
    f"{_MODELS}.deit.modeling_deit.DeiTLayer": BlockClass(),
    f"{_MODELS}.vit_mae.modeling_vit_mae.ViTMAELayer": BlockClass(),
    f"{_MODELS}.vit_msn.modeling_vit_msn.ViTMSNLayer": BlockClass(),
    f"{_MODELS}.dpt.modeling_dpt.DPTViTLayer": BlockClass(),
    f"{_MODELS}.yolos.modeling_yolos.YolosLayer": BlockClass(),
    f"{_MODELS}.vitpose_backbone.modeling_vitpose_backbone.VitPoseBackboneLayer": BlockClass(),
    f"{_MODELS}.internvl.modeling_internvl.InternVLVisionLayer": BlockClass(scales=_LAMBDAS),
    f"{_MODELS}.beit.modeling_beit.BeitLayer": BlockClass(scales=_LAMBDAS, call="beit"),
    f"{_MODELS}.data2vec.modeling_data2vec_vision.Data2VecVisionLayer": BlockClass(
        paths=None, scales=_LAMBDAS, call="beit"
    ),
    f"{_MODELS}.swin.modeling_swin.SwinLayer": BlockClass(call="windows"),
    f"{_MODELS}.swinv2.modeling_swinv2.Swinv2Layer": BlockClass(paths=None, post_norm=True, call="windows"),
    f"{_MODELS}.dinov2.modeling_dinov2.Dinov2Layer": BlockClass(_NORM12, scales=_SCALES),
    f"{_MODELS}.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersLayer": BlockClass(
        _NORM12, scales=_SCALES
    ),
    f"{_MODELS}.dinov3_vit.modeling_dinov3_vit.DINOv3ViTLayer": BlockClass(_NORM12, None, _SCALES, call="dinov3"),
    f"{_MODELS}.clip.modeling_clip.CLIPEncoderLayer": BlockClass(_LAYER_NORM12, call="clip"),
    f"{_MODELS}.owlvit.modeling_owlvit.OwlViTEncoderLayer": BlockClass(_LAYER_NORM12, call="clip"),
    f"{_MODELS}.owlv2.modeling_owlv2.Owlv2EncoderLayer": BlockClass(_LAYER_NORM12, call="clip"),
    f"{_MODELS}.smolvlm.modeling_smolvlm.SmolVLMEncoderLayer": BlockClass(_LAYER_NORM12),
    f"{_MODELS}.idefics3.modeling_idefics3.Idefics3EncoderLayer": BlockClass(_LAYER_NORM12),
    f"{_MODELS}.siglip.modeling_siglip.SiglipEncoderLayer": BlockClass(_LAYER_NORM12),
    f"{_MODELS}.siglip2.modeling_siglip2.Siglip2EncoderLayer": BlockClass(_LAYER_NORM12),
    "torchvision.models.vision_transformer.EncoderBlock": BlockClass(_LN12, APART, call="alone"),
    "open_clip.transformer.ResidualAttentionBlock": BlockClass(_LN12, APART, ("ls_1", "ls_2"), call="alone"),
    "timm.models.vision_transformer.Block": BlockClass(_NORM12, FUSED, ("ls1", "ls2")),
    "timm.models.beit.Block": BlockClass(_NORM12, None, _GAMMAS, call="timm_beit"),
    "timm.models.eva.EvaBlock": BlockClass(_NORM12, None, _GAMMAS, call="eva"),
}
"""By the full name of the class, for the classes that were read; a subclass is another class."""


@dataclass(frozen=True)
class BlockPlan:
    """Where a block of a known class has what equalization needs.

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


def layer_paths(block: nn.Module) -> dict[str, str] | None:
    """Role ("query", "key", "value" or "qkv", "output", "fc1", "gate", "fc2") -> path of that layer, or None."""
    inside = {path for path, _ in block.named_modules()}
    halves = [next(filter(None, (_found(paths, inside) for paths in known)), None) for known in (PROJECTIONS, MLPS)]
    return {**halves[0], **halves[1]} if halves[0] and halves[1] else None


def block_plan(block: nn.Module, kind: BlockClass | None) -> BlockPlan | None:
    """The plan of a block of class ``kind``; None if it is not equalized, lacks a layer, or a LayerNorm with bias."""
    if kind is None or kind.paths is None:
        return None
    found = _found(kind.paths, {path for path, _ in block.named_modules()})
    norms: list[Any] = [getattr(block, name, None) for name in kind.norms]
    if found is None or not all(isinstance(norm, nn.LayerNorm) for norm in norms):
        return None
    if any(norm._parameters.get(name) is None for norm in norms for name in ("weight", "bias")):  # none, or computed
        return None
    first = tuple(role for role in found if role in ("query", "key", "value", "qkv"))
    return BlockPlan(kind, found, dict(zip(kind.norms, (first, ("fc1",)))))


def _found(paths: Paths, inside: set[str]) -> dict[str, str] | None:
    """The path of each role within a block; None if one is not there."""
    found = {role: next((path for path in places if path in inside), None) for role, places in paths.items()}
    return {role: path for role, path in found.items() if path is not None} if all(found.values()) else None
