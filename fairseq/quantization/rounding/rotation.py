"""rotated: a ViT whose hidden states are turned by an orthogonal matrix, so that no channel has more range than others.

With R orthogonal, R 1 = 1, a LayerNorm without gain and bias gives R LN(x) for R x: mean and variance are those of x.
So the gains and biases of the norms go into the layers that read them, R into all that writes hidden states, and its
inverse into all that reads them; the architecture stays as it is. (Ashkboos et al., QuaRot, 2024, section 4, for RMS
norms, which every R suits.)
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fairseq.quantization.architectures.blocks import block_plan, class_of
from fairseq.quantization.architectures.copies import copied
from fairseq.quantization.architectures.forward import call, evaluating

_MODELS = "transformers.models"


class Stream(NamedTuple):
    """Where a model keeps what writes its hidden states first, and what reads them last."""

    base: str
    heads: tuple[str, ...]
    tables: tuple[str, ...] = ("cls_token", "position_embeddings")


ROTATABLE = {
    f"{_MODELS}.vit.modeling_vit.ViTForImageClassification": Stream("vit", ("classifier",)),
    f"{_MODELS}.vit_msn.modeling_vit_msn.ViTMSNForImageClassification": Stream("vit", ("classifier",)),
    f"{_MODELS}.deit.modeling_deit.DeiTForImageClassification": Stream(
        "deit", ("classifier",), ("cls_token", "distillation_token", "position_embeddings")
    ),
    f"{_MODELS}.deit.modeling_deit.DeiTForImageClassificationWithTeacher": Stream(
        "deit",
        ("cls_classifier", "distillation_classifier"),
        ("cls_token", "distillation_token", "position_embeddings"),
    ),
}
"""By the full name of the class: nothing but its classifiers reads the last norm, and each block is pre-norm."""


@torch.no_grad()
def rotated(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of ``model`` with the same logits, up to the rounding of its dtype, and other hidden states.

    Args:
        model: in float; it stays as it is.
        seed: of the rotation.

    Raises:
        ValueError: another architecture than the plain ViTs of :data:`ROTATABLE`, a part of it that was exchanged, or
            logits that do not stay, as where a hook reads hidden states.
    """
    kind = type(model)
    name = f"{kind.__module__}.{kind.__qualname__}"
    stream = ROTATABLE.get(name)
    if stream is None or getattr(sys.modules.get(kind.__module__), kind.__qualname__, None) is not kind:
        known = ", ".join(name.rpartition(".")[2] for name in ROTATABLE)
        raise ValueError(f"rotate=True is for {known}, whose hidden states only their own layers read; got {kind}")
    result = copied(model)
    base: Any = getattr(result, stream.base)
    writers: list[nn.Module] = [base.embeddings.patch_embeddings.projection]
    readers = [("the last norm", base.layernorm, [getattr(result, head) for head in stream.heads])]
    for place, block in enumerate(base.layers if hasattr(base, "layers") else base.encoder.layer):
        plan = block_plan(block, class_of(type(block)))
        if plan is None:
            raise ValueError(f"rotate=True needs the blocks of a plain ViT; block {place} is a {type(block)}")
        layers = {role: block.get_submodule(path) for role, path in plan.layers.items()}
        readers += [
            (f"block {place}: {path}", cast(nn.LayerNorm, block.get_submodule(path)), [layers[role] for role in roles])
            for path, roles in plan.norms.items()
        ]
        writers += [layers["output"], layers["fc2"]]
    rotation = rotation_of(base.layernorm.weight.numel(), seed)
    for at, norm, consumers in readers:
        for consumer in consumers:
            if not isinstance(consumer, nn.Linear) or consumer.bias is None:
                raise ValueError(f"rotate=True: {at} is read by {consumer}, where a Linear with a bias is expected")
            wide = consumer.weight.double()
            consumer.bias.add_(wide @ norm.bias.double())
            consumer.weight.copy_(wide * norm.weight.double() @ rotation.T.to(wide.device))
        norm.weight.fill_(1)
        norm.bias.zero_()
    for writer in writers:
        weight, bias = cast(Tensor, writer.weight), cast(Tensor, writer.bias)
        turn = rotation.to(weight.device)
        weight.copy_((turn @ weight.double().flatten(1)).view_as(weight))
        bias.copy_(turn @ bias.double())
    for table in stream.tables:
        parameter = getattr(base.embeddings, table)
        parameter.copy_(parameter.double() @ rotation.T.to(parameter.device))
    _check_same(model, result)
    return result


def _check_same(model: nn.Module, result: nn.Module) -> None:
    """ValueError unless both give the same logits for noise: a hook or a module of another kind may do otherwise."""
    config: Any = model.config
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, config.num_channels, *_pair(config.image_size), generator=generator, device="cpu")
    outputs = []
    for each in (model, result):
        with evaluating(each):
            seen: Any = call(each, {"pixel_values": noise.to(parameter.device, parameter.dtype)})
        outputs.append(seen.logits.double())
    off = float(torch.linalg.vector_norm(outputs[1] - outputs[0]) / torch.linalg.vector_norm(outputs[0]))
    if not off <= min(1000 * torch.finfo(parameter.dtype).eps, 0.25):
        raise ValueError(f"rotate=True: the logits of {type(model)} change by {off:.2g} of their norm")


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def rotation_of(size: int, seed: int = 0) -> Tensor:
    """A random orthogonal matrix R with R 1 = 1: float64 (size, size).

    In a basis that begins with 1 / |1| it leaves that vector alone and turns the others by a random rotation.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(size, size, generator=generator, dtype=torch.float64, device="cpu")
    noise[:, 0] = 1
    basis = torch.linalg.qr(noise).Q
    inner = torch.eye(size, dtype=torch.float64, device="cpu")
    within = torch.randn(size - 1, size - 1, generator=generator, dtype=torch.float64, device="cpu")
    inner[1:, 1:] = torch.linalg.qr(within).Q
    return basis @ inner @ basis.T
