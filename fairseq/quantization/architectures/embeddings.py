"""Which embeddings a model has, and how they are going to be held."""

from __future__ import annotations

from torch import nn

from fairseq.modules.quantization.packed.patches import reason_not_packable
from fairseq.modules.quantization.scalar.modules.replace import reason_not_quantizable
from fairseq.quantization.architectures.families import Family, embedding_kind, tower_of
from fairseq.quantization.config import LayerConfig, QuantizationConfig

TABLE = LayerConfig(bits=8, method="channel", activations=None)
"""How position embeddings are held: they are few, and every token reads them."""


def find_embeddings(model: nn.Module, family: Family, config: QuantizationConfig) -> dict[str, LayerConfig | str]:
    """For each embedding by name, module or parameter, its settings or why it stays; {} unless they are asked for.

    Raises:
        ValueError: they are asked for and there is none.
    """
    if not config.quantize_embeddings:
        return {}
    found: dict[str, LayerConfig | str] = {}
    tables = {name: p for name, p in model.named_parameters() if p.ndim == 3}
    for name, part in (*model.named_modules(), *tables.items()):
        kind = embedding_kind(name, family)
        wanted = nn.Conv2d if kind == "patches" else (nn.Embedding, nn.Parameter)
        if kind is not None and isinstance(part, wanted) and config.selects_tower(tower_of(name, family)):
            found[name] = _decide(name, part, config)
    if not found:
        raise ValueError(
            f"quantize_embeddings=True, and this model ({family.name}) has no patch embedding and no position "
            "embeddings that are known; leave it at False"
        )
    return found


def _decide(name: str, part: nn.Module | nn.Parameter, config: QuantizationConfig) -> LayerConfig | str:
    if why := config.left_out(name):
        return why
    if isinstance(part, nn.Parameter):
        return TABLE if len(part) == 1 else f"its shape {tuple(part.shape)} is not (1, rows, columns)"
    if reason := reason_not_quantizable(part):
        return reason
    if isinstance(part, nn.Conv2d):
        return reason_not_packable(part) or config.for_layer(name)
    return TABLE
