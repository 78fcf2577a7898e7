"""The families of Vision Transformers, and which part of each is what by its name in memory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

NEVER = r"(?!)"
"""Matches no name."""


@dataclass(frozen=True)
class Family:
    r"""How one family of models calls its layers; all patterns are searched in "." + the name of a layer.

    A family has the names of all versions of transformers that are supported. Names on disk differ again; they are
    not looked at.

    Attributes:
        name: how messages and the guide call it.
        model_types: values of ``config.model_type`` that belong to it.
        classes: full names of the classes, their subclasses included, for models without such a config.
        attention, mlp, classifier: patterns of the components.
        kept: pattern of layers that are never swapped -> why, in words.
        text: pattern of the layers of the text tower; all others are of the vision tower.
        patches: pattern of the convolution that embeds patches.
        positions: pattern of tables of position embeddings, modules or parameters.
        parts: (prefix, family, tower) of models within this one; the patterns above hold outside of them.
        any_size: whether they resize their position embeddings to each picture, whatever the config says.
        found: whether the generic rule made it.
    """

    name: str
    model_types: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    attention: str = NEVER
    mlp: str = NEVER
    classifier: str = NEVER
    kept: Mapping[str, str] = field(default_factory=dict)
    text: str = NEVER
    patches: str = r"\.patch_embeddings\.projection$"
    positions: str = r"\.embeddings\.position_embeddings$"
    parts: tuple[tuple[str, Family, str], ...] = ()
    any_size: bool = False
    found: bool = False

    @property
    def by_rule(self) -> bool:
        """Whether the generic rule found layers of its vision tower."""
        return self.found or any(inner.by_rule for _, inner, tower in self.parts if tower == "vision")

    @property
    def towers(self) -> tuple[str, ...]:
        """ "vision", and "text" where there is one."""
        text = self.text != NEVER or any(tower == "text" for _, _, tower in self.parts)
        return ("vision", "text") if text else ("vision",)


# transformers up to 5.8 | 5.9 and later
ATTENTION = (
    r"\.attention\.attention\.(query|key|value)$|\.attention\.output\.dense$"
    r"|\.attention\.(q|k|v|o)_proj$"
)
MLP = r"\.\d+\.intermediate\.dense$|\.\d+\.output\.dense$|\.mlp\.fc[12]$"
SWIN_ATTENTION = rf"\.attention\.self\.(query|key|value)$|{ATTENTION}"
SWIN_MLP = rf"{MLP}|\.downsample\.reduction$"
GATED_MLP = r"\.mlp\.weights_(in|out)$|\.mlp\.(gate|up|down)_proj$"
CLIP_ATTENTION = r"\.self_attn\.(q|k|v|out)_proj$"
CLIP_MLP = r"\.encoder\.layers\.\d+\.mlp\.fc[12]$"
CLIP_PATCHES, CLIP_POSITIONS = r"\.patch_embedding$", r"\.embeddings\.position_embedding$"
HEAD = r"\.classifier$"
MULTIHEAD = {
    r"\.head\.attention\.out_proj$": "part of an nn.MultiheadAttention, which reads its weight and never calls it"
}
POSITION_MLP = {
    r"\.continuous_position_bias_mlp\.\d+$": "makes the relative position bias, from a table that no picture changes"
}
DECODER_EMBED = {r"\.decoder_embed$": "makes the tokens of a decoder that only pretraining runs"}
PATCH_LINEAR = {r"\.patch_embedding$": "the model asks it for the dtype of its weight"}

CLIP_TOWER = Family("CLIP", (), (), CLIP_ATTENTION, CLIP_MLP, patches=CLIP_PATCHES, positions=CLIP_POSITIONS)
OPEN_CLIP_TOWER = Family(
    "OpenCLIP",
    classes=("open_clip.transformer.VisionTransformer",),
    attention=r"\.resblocks\.\d+\.attn\.(q|k|v|out)_proj$|\.attn_pool\.attn\.(q|k|v|out)_proj$",
    mlp=r"\.resblocks\.\d+\.mlp\.c_(fc|proj)$",
    patches=r"\.conv1$",
    positions=NEVER,
)

FAMILIES = (
    Family(
        "ViT",
        ("vit",),
        attention=ATTENTION,
        mlp=MLP,
        classifier=r"\.(cls_|distillation_)?classifier$|\.pooler\.dense$",
    ),
    Family(
        "DeiT",
        ("deit",),
        attention=ATTENTION,
        mlp=MLP,
        classifier=r"\.(cls_|distillation_)?classifier$|\.pooler\.dense$",
    ),
    Family("BEiT", ("beit",), attention=ATTENTION, mlp=MLP, classifier=r"\.classifier$|\.lm_head$"),
    Family("Swin", ("swin",), attention=SWIN_ATTENTION, mlp=SWIN_MLP, classifier=HEAD),
    Family("SwinV2", ("swinv2",), attention=SWIN_ATTENTION, mlp=SWIN_MLP, classifier=HEAD, kept=POSITION_MLP),
    Family(
        "DINOv2",
        ("dinov2", "dinov2_with_registers"),
        attention=ATTENTION,
        mlp=f"{MLP}|{GATED_MLP}",
        classifier=HEAD,
        any_size=True,
    ),
    Family(
        "DINOv3",
        ("dinov3_vit",),
        attention=ATTENTION,
        mlp=GATED_MLP,
        classifier=HEAD,
        patches=r"\.patch_embeddings$",
        any_size=True,
    ),
    Family(
        "ViT-MAE",
        ("vit_mae",),
        attention=ATTENTION,
        mlp=MLP,
        classifier=r"\.decoder_pred$",
        kept=DECODER_EMBED,
        positions=r"\.embeddings\.position_embeddings$|\.decoder_pos_embed$",
    ),
    Family("ViT-MSN", ("vit_msn",), attention=ATTENTION, mlp=MLP, classifier=HEAD),
    Family(
        "CLIP",
        ("clip", "clip_vision_model"),
        attention=CLIP_ATTENTION,
        mlp=CLIP_MLP,
        classifier=r"\.classifier$|\.(visual|text)_projection$",
        text=r"\.text_model\.|\.text_projection$",
        patches=CLIP_PATCHES,
        positions=CLIP_POSITIONS,
    ),
    Family(
        "SigLIP",
        ("siglip", "siglip_vision_model"),
        attention=CLIP_ATTENTION,
        mlp=CLIP_MLP,
        classifier=r"\.classifier$|\.head\.mlp\.fc[12]$|\.text_model\.head$",
        kept=MULTIHEAD,
        text=r"\.text_model\.",
        patches=CLIP_PATCHES,
        positions=CLIP_POSITIONS,
    ),
    Family(
        "SigLIP 2",
        ("siglip2", "siglip2_vision_model"),
        attention=CLIP_ATTENTION,
        mlp=CLIP_MLP,
        classifier=r"\.classifier$|\.head\.mlp\.fc[12]$|\.text_model\.head$",
        kept=MULTIHEAD | PATCH_LINEAR,
        text=r"\.text_model\.",
        patches=CLIP_PATCHES,
        positions=CLIP_POSITIONS,
        any_size=True,
    ),
    replace(CLIP_TOWER, name="OWL-ViT", model_types=("owlvit_vision_model", "owlv2_vision_model")),
    replace(CLIP_TOWER, name="SmolVLM", model_types=("smolvlm_vision", "idefics3_vision")),
    Family("InternVL", ("internvl_vision",), attention=rf"{ATTENTION}|\.attention\.projection_layer$", mlp=MLP),
    Family(
        "Qwen-VL",
        classes=(  # whose config has, in transformers 4.57, the model type of the whole
            "transformers.models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel",
            "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel",
            "transformers.models.qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionModel",
        ),
        attention=r"\.attn\.(qkv|proj)$",
        mlp=r"\.blocks\.\d+\.mlp\.(fc[12]|linear_fc[12]|(gate|up|down)_proj)$",
        classifier=r"\.merger\.(mlp\.\d+|linear_fc[12])$|\.deepstack_merger_list\.\d+\.linear_fc[12]$",
        patches=r"\.patch_embed\.proj$",
        positions=NEVER,
    ),
    Family(
        "SegFormer",
        ("segformer",),
        attention=SWIN_ATTENTION,
        mlp=r"\.mlp\.(dense|fc)[12]$",
        classifier=r"\.classifier$|\.decode_head\.linear_(c|projections)\.\d+\.proj$",
        patches=NEVER,
        positions=NEVER,
    ),
    Family(
        "YOLOS",
        ("yolos",),
        attention=ATTENTION,
        mlp=MLP,
        classifier=r"\.(class_labels_classifier|bbox_predictor)\.layers\.\d+$",
        positions=NEVER,
    ),
    Family(
        "SAM",
        ("sam_vision_model",),
        attention=r"\.attn\.(qkv|proj)$",
        mlp=r"\.layers\.\d+\.mlp\.lin[12]$",
        patches=r"\.patch_embed\.projection$",
        positions=NEVER,
    ),
    Family(
        "torchvision",
        classes=("torchvision.models.vision_transformer.VisionTransformer",),
        attention=r"\.self_attention\.(q|k|v|out)_proj$",
        mlp=r"\.mlp\.(0|3|linear_[12])$",
        classifier=r"\.heads\.(pre_logits|head)$",
        patches=r"\.conv_proj$",
        positions=r"\.pos_embedding$",
    ),
    OPEN_CLIP_TOWER,
    replace(
        OPEN_CLIP_TOWER,
        classes=("open_clip.model.CLIP", "open_clip.model.CustomTextCLIP"),
        kept={r"^\.(text\.)?transformer\.resblocks\.0\.mlp\.c_fc$": "the model asks it for the dtype of its weight"},
        text=r"^\.(text|transformer)\.",
    ),
    Family(
        "VitDet",
        ("vitdet",),
        attention=r"\.attention\.(qkv|proj)$",
        mlp=MLP,
        patches=r"\.embeddings\.projection$",
        positions=NEVER,
    ),
    Family(
        "timm",
        classes=("timm.models.vision_transformer.VisionTransformer", "timm.models.beit.Beit", "timm.models.eva.Eva"),
        attention=r"\.attn\.(qkv|[qkv]_proj|proj)$",
        mlp=r"\.blocks\.\d+\.mlp\.fc[12](_[gx])?$",
        classifier=r"\.head(_dist)?$|\.attn_pool\.(q|kv|proj|mlp\.fc[12])$",
        patches=r"\.patch_embed\.proj$",
        positions=r"\.pos_embed$",
    ),
)
VIT = FAMILIES[0]


def _part(name: str, family: Family) -> tuple[str, Family, str] | None:
    """Of a layer within a part: its name there, the part's family, and its tower."""
    for prefix, inner, tower in family.parts:
        if name.startswith(f"{prefix}."):
            return name.removeprefix(f"{prefix}."), inner, tower
    return None


def component_of(name: str, family: Family = VIT) -> str | None:
    """ "attention", "mlp", "classifier" (poolers and projections included), or None for another layer."""
    part = _part(name, family)
    if part is not None:
        return component_of(*part[:2])
    if kept_reason(name, family) is not None:
        return None
    for component in ("attention", "mlp", "classifier"):
        if re.search(getattr(family, component), f".{name}"):
            return component
    return None


def kept_reason(name: str, family: Family = VIT) -> str | None:
    """Why a layer is never swapped, or None."""
    part = _part(name, family)
    if part is not None:
        return kept_reason(*part[:2])
    return next((why for pattern, why in family.kept.items() if re.search(pattern, f".{name}")), None)


def tower_of(name: str, family: Family = VIT) -> str:
    """ "vision" or "text"."""
    part = _part(name, family)
    if part is not None:
        return part[2]
    return "text" if re.search(family.text, f".{name}") else "vision"


def embedding_kind(name: str, family: Family = VIT) -> str | None:
    """ "patches" or "positions" for a module or parameter that embeds them, else None."""
    part = _part(name, family)
    if part is not None:
        return embedding_kind(*part[:2])
    return next((kind for kind in ("patches", "positions") if re.search(getattr(family, kind), f".{name}")), None)


def takes_any_size(config: object) -> bool:
    """Whether models of this config take pictures of any height and width."""
    kind = getattr(config, "model_type", None)
    return any(family.any_size for family in FAMILIES if kind in family.model_types)
