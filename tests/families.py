"""Tiny models with random weights of every supported family, and what they are called with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

BLOCK = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40,
}  # fmt: skip
PICTURE = {"image_size": 16, "patch_size": 4}
VIT = {**BLOCK, **PICTURE, "num_labels": 7}
SWIN = {
    "image_size": 16, "patch_size": 2, "embed_dim": 12, "depths": [2, 2], "num_heads": [2, 3], "window_size": 4,
    "num_labels": 7, "mlp_ratio": 2.0, "encoder_stride": 4,
}  # fmt: skip
TEXT = {**BLOCK, "vocab_size": 60, "max_position_embeddings": 10, "bos_token_id": 0, "eos_token_id": 59}
TOWERS = {"vision_config": {**BLOCK, **PICTURE}, "text_config": {**TEXT, "projection_size": 24}}
PICTURES, PROMPTS = 6, 4


def pictures(count: int = PICTURES, seed: int = 1) -> Tensor:
    """(count, 3, 16, 16)."""
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def prompts(length: int = 8) -> Tensor:
    """Token ids, (4, length), each row with the end of text in its last place."""
    ids = torch.randint(1, 59, (PROMPTS, length), generator=torch.Generator().manual_seed(2))
    ids[:, -1] = 59
    return ids


def _hf(model: str, config: str, settings: dict[str, Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        return getattr(transformers, model)(getattr(transformers, config)(**settings))

    return make


def _encoder_decoder() -> nn.Module:
    encoder = transformers.ViTConfig(**{k: v for k, v in VIT.items() if k != "num_labels"})
    decoder = transformers.BertConfig(
        **{**BLOCK, "vocab_size": 60, "max_position_embeddings": 10, "is_decoder": True, "add_cross_attention": True}
    )
    both = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    both.decoder_start_token_id, both.pad_token_id = 1, 0
    return transformers.VisionEncoderDecoderModel(both)


def _timm(name: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, **settings)

    return make


TIMM = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 7}

BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "vit": _hf("ViTForImageClassification", "ViTConfig", VIT),
    "vit-bare": _hf("ViTModel", "ViTConfig", VIT),
    "vit-masked": _hf("ViTForMaskedImageModeling", "ViTConfig", {**VIT, "encoder_stride": 4}),
    "deit": _hf("DeiTForImageClassification", "DeiTConfig", VIT),
    "deit-teacher": _hf("DeiTForImageClassificationWithTeacher", "DeiTConfig", VIT),
    "beit": _hf(
        "BeitForImageClassification",
        "BeitConfig",
        {**VIT, "layer_scale_init_value": 0.5, "use_relative_position_bias": True, "vocab_size": 30},
    ),
    "beit-shared-bias": _hf(
        "BeitForImageClassification",
        "BeitConfig",
        {**VIT, "layer_scale_init_value": 0.0, "use_shared_relative_position_bias": True, "vocab_size": 30},
    ),
    "swin": _hf("SwinForImageClassification", "SwinConfig", SWIN),
    "swinv2": _hf("Swinv2ForImageClassification", "Swinv2Config", SWIN),
    "dinov2": _hf("Dinov2ForImageClassification", "Dinov2Config", {**VIT, "mlp_ratio": 2, "layerscale_value": 0.7}),
    "dinov2-giant": _hf(
        "Dinov2Model", "Dinov2Config", {**VIT, "mlp_ratio": 2, "layerscale_value": 0.7, "use_swiglu_ffn": True}
    ),
    "dinov2-registers": _hf(
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        {**VIT, "mlp_ratio": 2, "layerscale_value": 0.7, "num_register_tokens": 3},
    ),
    "dinov3": _hf("DINOv3ViTModel", "DINOv3ViTConfig", {**VIT, "num_register_tokens": 3}),
    "dinov3-gated": _hf("DINOv3ViTModel", "DINOv3ViTConfig", {**VIT, "num_register_tokens": 3, "use_gated_mlp": True}),
    "vit-mae": _hf(
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        {**VIT, **{f"decoder_{key}": 2 if "num" in key else 16 for key in BLOCK}},
    ),
    "vit-mae-encoder": _hf("ViTMAEModel", "ViTMAEConfig", {**VIT, "mask_ratio": 0.0}),
    "vit-msn": _hf("ViTMSNForImageClassification", "ViTMSNConfig", VIT),
    "clip": _hf("CLIPModel", "CLIPConfig", {**TOWERS, "projection_dim": 20}),
    "clip-vision": _hf("CLIPVisionModel", "CLIPVisionConfig", {**BLOCK, **PICTURE}),
    "clip-vision-projection": _hf(
        "CLIPVisionModelWithProjection", "CLIPVisionConfig", {**BLOCK, **PICTURE, "projection_dim": 20}
    ),
    "clip-classifier": _hf("CLIPForImageClassification", "CLIPConfig", {**TOWERS, "num_labels": 7}),
    "siglip": _hf("SiglipModel", "SiglipConfig", TOWERS),
    "siglip-vision": _hf("SiglipVisionModel", "SiglipVisionConfig", {**BLOCK, **PICTURE}),
    "siglip-classifier": _hf("SiglipForImageClassification", "SiglipConfig", {**TOWERS, "num_labels": 7}),
    "siglip2": _hf(
        "Siglip2Model",
        "Siglip2Config",
        {**TOWERS, "vision_config": {**BLOCK, "patch_size": 4, "num_patches": 16}},
    ),
    "siglip2-vision": _hf("Siglip2VisionModel", "Siglip2VisionConfig", {**BLOCK, "patch_size": 4, "num_patches": 16}),
    "encoder-decoder": _encoder_decoder,
    "timm-vit": _timm("vit_tiny_patch16_224", **TIMM),
    "timm-deit": _timm("deit_tiny_distilled_patch16_224", **TIMM),
    "timm-beit": _timm("beit_base_patch16_224", **TIMM, init_values=0.5),
    "timm-eva": _timm("eva02_tiny_patch14_224", **TIMM),
}
NAMES = list(BUILDERS)
QUICK = (
    "vit", "deit-teacher", "beit", "swinv2", "dinov2-registers", "dinov3-gated", "vit-mae", "clip", "siglip",
    "siglip2-vision", "encoder-decoder", "timm-vit", "timm-eva",
)  # fmt: skip


def each(names: Iterable[str] = NAMES) -> list[Any]:
    """Those of ``QUICK`` each time, all of ``names`` with ``pytest -m matrix``; random_models.py draws from all."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.matrix) for name in names]


def build(name: str) -> nn.Module:
    """The model of that name, :func:`with_weights`, the same ones each time."""
    torch.manual_seed(0)
    return with_weights(BUILDERS[name]())


def with_weights(model: nn.Module) -> nn.Module:
    """The model, with random weights large enough to matter and biases that are not zero; in eval mode."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.ndim == 2 and parameter.requires_grad and "position" not in key:
                parameter.normal_(std=0.15)
            elif parameter.ndim == 1 and "norm" in key:
                parameter.uniform_(0.5, 1.5)
    return model.eval()


def shortened(model: nn.Module) -> nn.Module:
    """The model, left with the first of its blocks: a recorded graph takes seconds for each, and they are alike."""
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    del blocks[1:]
    model.config.num_hidden_layers = 1
    return model
