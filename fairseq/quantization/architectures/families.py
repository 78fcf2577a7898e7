"""The families of Vision Transformers, and which part of each is what by its name in memory; only ``plan`` asks."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from fairseq.quantization.architectures.layers import block_of, linear_layers

NEVER = r"(?!)"
"""Matches no name."""
HEARS = r"\.[^.]*(audio|speech)[^.]*$"
"""Names of modules for sounds, in models that also see."""
GENERIC = "generic"
"""The name of what the generic rule makes."""


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
OPEN_CLIP_ATTENTION = r"\.resblocks\.\d+\.attn\.(q|k|v|out)_proj$|\.attn_pool\.attn\.(q|k|v|out)_proj$"
OPEN_CLIP_MLP = r"\.resblocks\.\d+\.mlp\.c_(fc|proj)$"
PATCH_LINEAR = {r"\.patch_embedding$": "the model asks it for the dtype of its weight"}

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
    Family(
        "OWL-ViT",
        ("owlvit_vision_model", "owlv2_vision_model"),
        attention=CLIP_ATTENTION,
        mlp=CLIP_MLP,
        patches=CLIP_PATCHES,
        positions=CLIP_POSITIONS,
    ),
    Family(
        "SmolVLM",
        ("smolvlm_vision", "idefics3_vision"),
        attention=CLIP_ATTENTION,
        mlp=CLIP_MLP,
        patches=CLIP_PATCHES,
        positions=CLIP_POSITIONS,
    ),
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
    Family(
        "OpenCLIP",
        classes=("open_clip.transformer.VisionTransformer",),
        attention=OPEN_CLIP_ATTENTION,
        mlp=OPEN_CLIP_MLP,
        patches=r"\.conv1$",
        positions=NEVER,
    ),
    Family(
        "OpenCLIP",
        classes=("open_clip.model.CLIP", "open_clip.model.CustomTextCLIP"),
        attention=OPEN_CLIP_ATTENTION,
        mlp=OPEN_CLIP_MLP,
        kept={r"^\.(text\.)?transformer\.resblocks\.0\.mlp\.c_fc$": "the model asks it for the dtype of its weight"},
        text=r"^\.(text|transformer)\.",
        patches=r"\.conv1$",
        positions=NEVER,
    ),
    Family("VitDet", ("vitdet",), attention=r"\.attention\.(qkv|proj)$", mlp=MLP, positions=NEVER),
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
ENCODER_DECODER = "vision-encoder-decoder"


def family_of(model: nn.Module) -> Family:
    """The family of a model, by its config or class; of a model that holds such a one, by what it holds.

    Warns:
        UserWarning: it is of no known family, and the generic rule found layers: in repeated numbered blocks, those
            below a module called "attn..." or "attention..." are attention, others mlp; behind the blocks, classifier.
    """
    known = _known(model)
    if known is not None:
        # with blocks in wrappers, its layers may have names that the family does not know
        of_parts = replace(known, parts=_inner(model))  # such as OpenCLIP with a trunk of timm
        for family, tower in ((known, "vision"), (of_parts, "vision"), (known, None)):
            if {"attention", "mlp"} <= _components_by_name(model, family, tower).keys():
                return family
        return _by_rule(model) or known
    if getattr(getattr(model, "config", None), "model_type", None) == ENCODER_DECODER:
        return _encoder_decoder(model)
    towers = _towers(model)
    if towers is not None:
        return towers
    found = _components_by_name(model, VIT)
    if parts := _inner(model):
        return Family(type(model).__name__, classifier=VIT.classifier, parts=parts)
    if {"attention", "mlp"} <= found.keys() and not _overlooked(model, found):
        return VIT
    return _by_rule(model) or VIT


def _inner(model: nn.Module) -> tuple[tuple[str, Family, str], ...]:
    """The models of known families within a model, as its parts."""
    parts: dict[str, Family] = {}
    for name, module in model.named_modules():
        inner = _known(module) if name and not any(name.startswith(f"{prefix}.") for prefix in parts) else None
        if inner is not None:
            parts[name] = inner
    return tuple((prefix, inner, "vision") for prefix, inner in parts.items())


def _by_rule(model: nn.Module) -> Family | None:
    """The family that the generic rule makes for a model, with a warning; None if it finds no attention or no MLP."""
    family = _generic(model)
    counts = _components_by_name(model, family)
    if not {"attention", "mlp"} <= counts.keys():
        return None
    text = ", ".join(f"{len(names)} {component} ({names[0]}, ...)" for component, names in counts.items())
    warnings.warn(
        f"{type(model).__name__} is of no known family; by their names, its Linear layers are taken for {text}. "
        "Print the quantizer's report to see what was quantized",
        UserWarning,
        stacklevel=3,
    )
    return family


def _known(model: nn.Module) -> Family | None:
    """The row of :data:`FAMILIES` for a model, or None."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    names = {f"{c.__module__}.{c.__qualname__}" for c in type(model).__mro__}
    return next((f for f in FAMILIES if kind in f.model_types or names & set(f.classes)), None)


def _encoder_decoder(model: nn.Module) -> Family:
    """A vision encoder of a known family, and a text decoder by the generic rule."""
    encoder, decoder = model.get_submodule("encoder"), model.get_submodule("decoder")
    parts = (("encoder", family_of(encoder), "vision"), ("decoder", _generic(decoder), "text"))
    return Family(ENCODER_DECODER, parts=parts, text=r"^\.enc_to_dec_proj$", classifier=r"^\.enc_to_dec_proj$")


def _towers(model: nn.Module) -> Family | None:
    """The family of a model with a vision and a text config, such as a language model that sees; None of others.

    A tower is what is built from such a config, by its own family, and the text tower ends with the output embeddings.
    What is in neither, such as a projector or a head, is of the vision tower; unless its name begins with "text". What
    hears is neither.
    """
    config = getattr(model, "config", None)
    vision, text, audio = (getattr(config, name, None) for name in ("vision_config", "text_config", "audio_config"))
    if vision is None or text is None:
        return None
    parts: dict[str, tuple[str, Family, str]] = {}
    for name, module in model.named_modules():
        if name and not any(name.startswith(f"{prefix}.") for prefix in parts):
            own = getattr(module, "config", None)
            if type(own) is type(vision) and linear_layers(module):
                parts[name] = (name, family_of(module), "vision")
            elif type(own) is type(text) and linear_layers(module):
                parts[name] = (name, _generic(module), "text")
            elif re.search(HEARS, f".{name}") or (audio is not None and type(own) is type(audio)):
                parts[name] = (name, Family("audio"), "text")
    if {tower for *_, tower in parts.values()} != {"vision", "text"}:
        return None
    rest = [name for name in linear_layers(model) if not any(name.startswith(f"{prefix}.") for prefix in parts)]
    rest = [name for name in rest if not re.search(HEARS, f".{name}")]
    outside = _generic(model, rest)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    words = [name for name in rest if model.get_submodule(name) is head or re.search(r"(^|\.)text[^.]*$", name)]
    blocks = rf"{outside.attention}|{outside.mlp}"
    return replace(
        outside,
        found=any(re.search(blocks, f".{name}") for name in rest),
        name=type(model).__name__,
        classifier=_one_of(name for name in rest if not re.search(blocks, f".{name}")),
        text=_one_of(words),
        parts=tuple(parts.values()),
    )


def _overlooked(model: nn.Module, found: Mapping[str, Sequence[str]]) -> bool:
    """Whether there are Linear layers in the blocks of a model beside those that were found by their names."""
    known = {name for names in found.values() for name in names}
    blocks = {block_of(name) for name in known} - {None}
    return any(block_of(name) in blocks and name not in known for name in linear_layers(model))


def _repeated(names: Sequence[str]) -> list[str]:
    """Those of the names that are in blocks, of which there are several side by side."""
    numbered = {block: re.sub(r"\.\d+$", "", f".{block}") for name in names if (block := block_of(name))}
    repeated = {block for block, stem in numbered.items() if list(numbered.values()).count(stem) > 1}
    return [name for name in names if block_of(name) in repeated]


def _generic(model: nn.Module, among: Sequence[str] | None = None) -> Family:
    """The generic rule, for one model or for layers ``among`` its own: a family whose patterns are lists of names."""
    linear = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    names = linear if among is None else [name for name in linear if name in among]
    inside = _repeated(names)
    attention = [name for name in inside if re.search(r"att(entio)?n", name.removeprefix(str(block_of(name))))]
    mlp = [name for name in inside if name not in attention]
    behind = names[names.index(inside[-1]) + 1 :] if inside else []
    return Family(
        GENERIC,
        attention=_one_of(attention),
        mlp=_one_of(mlp),
        classifier=_one_of(behind),
        patches=r"\.patch_embed",
        positions=r"\.embeddings\.position_embeddings?$",
        found=True,
    )


def _one_of(names: Iterable[str]) -> str:
    return "|".join(rf"^\.{re.escape(name)}$" for name in names) or NEVER


def _components_by_name(model: nn.Module, family: Family, tower: str | None = None) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in linear_layers(model):
        component = component_of(name, family)
        if component is not None and tower in (None, tower_of(name, family)):
            found.setdefault(component, []).append(name)
    return found


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
