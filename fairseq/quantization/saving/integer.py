"""Integer-only models in safetensors files: every constant as it is, weights of 2 to 4 bits packed.

Tensors are called "integer." and what the state dict calls them, so that no float model has one of that name. A weight
whose rows span less than 2**4 integers is ``weight_codes``, what it is above ``weight_low``, the least integer of each
row, packed as :mod:`~fairseq.modules.quantization.packed.packing` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from fairseq.modules.quantization.packed.packing import pack, packed_length, unpack
from fairseq.quantization.architectures.families import component_of, embedding_kind
from fairseq.quantization.architectures.recognition import family_of
from fairseq.quantization.integer_only.layers import IntegerLinear
from fairseq.quantization.integer_only.model import IntegerViT
from fairseq.quantization.integer_only.pretrained import as_pretrained
from fairseq.quantization.integer_only.reading import block_names
from fairseq.quantization.integer_only.structure import check_loaded, empty, present_name, structure
from fairseq.quantization.saving.contents import INTEGER_VERSION, Contents, kept_information

PREFIX = "integer."
GUARDS = {
    "cls_logits": ("cls_classifier.weight",), "logits": ("classifier.weight",),
    "image_embeds": ("visual_projection.weight",),
    "last_hidden_state": ("layernorm.weight", "vision_model.post_layernorm.weight"),
}  # fmt: skip
"""By output, weights of float models that give it, one of which each has; see ``pretrained.guards_of``."""
NARROW = (2, 3, 4)
CODES = {torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
         torch.float64: "F64"}  # fmt: skip


def description_of(model: IntegerViT, information: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The JSON description of an integer-only model."""
    said = structure(model)
    layers = {
        f"{PREFIX}{name}": {
            "bits": bits_of(layer.weight), "columns": layer.weight.shape[1], "method": "channel",
            "activations": said["activations"],
        }
        for name, layer in _linears(model).items()
    }  # fmt: skip
    return {
        "format_version": INTEGER_VERSION, "layers": layers, "integer": said,
        "information": kept_information(information),
    }  # fmt: skip


def guards_of(description: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of float weights that a model of this structure is made from, and has no numbers for."""
    outputs = description["integer"].get("head", {}).get("outputs", ("logits",))
    return next((names for output, names in GUARDS.items() if output in outputs), GUARDS["logits"])


def bits_of(weight: Tensor) -> int:
    """The bits that each integer of a weight takes in a file: 2 to 4 if every row spans so little, else 8."""
    span = int((weight.amax(-1).long() - weight.amin(-1).long()).max())
    return next((bits for bits in NARROW if span < 2**bits), 8)


def tensors_on_disk(model: IntegerViT, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """A state dict, or the model's, under its names on disk, on the CPU."""
    found = {name: t.detach().contiguous().cpu() for name, t in (state or model.state_dict()).items()}
    for name in _linears(model):
        weight = found[f"{name}.weight"]
        bits = bits_of(weight)
        if bits in NARROW:
            low = weight.amin(-1, keepdim=True)
            found[f"{name}.weight_codes"] = pack((found.pop(f"{name}.weight").short() - low).to(torch.uint8), bits)
            found[f"{name}.weight_low"] = low
    return {f"{PREFIX}{name}": tensor for name, tensor in found.items()}


def read(contents: Contents, like: nn.Module | None = None) -> IntegerViT:
    """The model in a file, on the CPU.

    Args:
        contents: of the file, whose checksums were compared.
        like: a float model of the architecture that it was made from, or None. The result has its config, and if it is
            of HuggingFace, its class.

    Raises:
        ValueError: what is in the file is no such model, or ``like`` is another one; the message names the tensor.
    """
    said = contents.integer
    assert said is not None
    if "head" not in said:
        contents = _with_present_names(contents)
    try:
        widths = _widths(contents)
        tensors = {
            name.removeprefix(PREFIX): entry for name, entry in contents.tensors.items() if name.startswith(PREFIX)
        }
        shapes: dict[str, tuple[int, ...]] = {name: entry.shape for name, entry in tensors.items()}
        for name, (bits, columns) in widths.items():
            if bits in NARROW:
                shapes[f"{name}.weight"] = _unpacked_shape(name, shapes, bits, columns)
        model = empty(said, shapes)
        if linears := _linears(model).keys() ^ widths.keys():
            raise ValueError(f"{PREFIX}{min(linears)} is a layer in one of its descriptions, and not in the other")
        _check_entries(model, widths, contents)
        model.load_state_dict(_state(contents, widths))
        check_loaded(model)
        if like is not None:
            check_like(model, like)
            as_pretrained(model, like)
    except ValueError as error:
        raise ValueError(f"{contents.files}: {error}") from None
    return model


def _with_present_names(contents: Contents) -> Contents:
    """The same with the names that parts of a head have now."""

    def renamed(entries: Mapping[str, Any]) -> dict[str, Any]:
        names = {name: PREFIX + present_name(name.removeprefix(PREFIX)) for name in entries if name.startswith(PREFIX)}
        return {names.get(name, name): entry for name, entry in entries.items()}

    return Contents({**contents.description, "layers": renamed(contents.parts)}, renamed(contents.tensors))


def check_like(model: IntegerViT, like: nn.Module) -> None:
    """ValueError unless the float model ``like`` has the sizes of what the integers were made from."""
    family = family_of(like)
    patches = [m for n, m in like.named_modules() if embedding_kind(n, family) == "patches"]
    poolings = [n for n, m in like.named_modules() if any(isinstance(c, nn.MultiheadAttention) for c in m.children())]
    apart = ("pooler", *poolings)  # a model that has such a part need not run it
    names = [n for n, _ in like.named_modules() if component_of(n, family) == "classifier"]
    heads = [like.get_submodule(n) for n in names if not any(part in n for part in apart)]
    sizes = _sizes_of_heads(model)
    if (len(patches), len(heads)) != (1, len(sizes)):
        raise ValueError(
            f"it is an integer-only model with {len(sizes)} layers behind its blocks, and {type(like).__name__} has "
            f"{len(patches)} patch embeddings and {len(heads)} classifiers that are known"
        )
    convolution = cast(nn.Conv2d, patches[0])
    here = {
        "blocks": len(model.blocks), "width": model.constants.shape[1], "classes": sizes,
        "patches": "x".join(map(str, model.patch)),
    }  # fmt: skip
    there = {
        "blocks": len(block_names(like)), "width": convolution.out_channels,
        "classes": sorted(cast(nn.Linear, head).out_features for head in heads),
        "patches": "x".join(map(str, convolution.kernel_size)),
    }  # fmt: skip
    for what, number in here.items():
        if there[what] != number:
            known, other = (", ".join(map(str, x)) if isinstance(x, list) else x for x in (number, there[what]))
            raise ValueError(f"it is an integer-only model with {what}={known}, and {type(like).__name__} has {other}")


def _sizes_of_heads(model: IntegerViT) -> list[int]:
    """The outputs of the layers of readouts, ascending."""
    layers = [getattr(readout, "linear", None) for readout in model.head.readouts.values()]
    return sorted(len(layer.weight) for layer in layers if layer is not None)


def _linears(model: IntegerViT) -> dict[str, IntegerLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, IntegerLinear)}


def _widths(contents: Contents) -> dict[str, tuple[int, int]]:
    """Bits and columns of each weight, by the name of its layer."""
    found = {}
    for name, entry in contents.parts.items():
        if not name.startswith(PREFIX):
            raise ValueError(f"{name} must be the name of an integer layer, {PREFIX} in front")
        found[name.removeprefix(PREFIX)] = entry["bits"], entry["columns"]
    return found


def _unpacked_shape(name: str, shapes: Mapping[str, tuple[int, ...]], bits: int, columns: int) -> tuple[int, ...]:
    shape = shapes.get(f"{name}.weight_codes")
    if shape is None:
        raise ValueError(f"{PREFIX}{name}.weight_codes is missing")
    if len(shape) != 2 or shape[1] != packed_length(columns, bits):
        raise ValueError(f"{PREFIX}{name}.weight_codes of shape {shape} are not {columns} columns of {bits} bits")
    return shape[0], columns


def _check_entries(model: IntegerViT, widths: Mapping[str, tuple[int, int]], contents: Contents) -> None:
    """ValueError unless the tensors in the file are those of the model."""
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, tensor in model.state_dict().items():
        layer, _, last = name.rpartition(".")
        bits, columns = widths.get(layer, (8, 0))
        if last == "weight" and bits in NARROW:
            wanted[f"{name}_codes"] = torch.uint8, (len(tensor), packed_length(columns, bits))
            wanted[f"{name}_low"] = torch.int8, (len(tensor), 1)
        else:
            wanted[name] = tensor.dtype, tuple(tensor.shape)
    for name, (dtype, shape) in wanted.items():
        entry = contents.tensors.get(f"{PREFIX}{name}")
        if entry is None:
            raise ValueError(f"{PREFIX}{name} is missing")
        if (entry.dtype, entry.shape) != (CODES[dtype], shape):
            raise ValueError(
                f"{PREFIX}{name} must be {CODES[dtype]} of shape {shape}, got {entry.dtype} of shape {entry.shape}"
            )
    if more := contents.tensors.keys() - {f"{PREFIX}{name}" for name in wanted} - {*guards_of(contents.description)}:
        raise ValueError(f"an integer-only model has no {min(more)}")


def _state(contents: Contents, widths: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    found = contents.read(name for name in contents.tensors if name.startswith(PREFIX))
    state = {name.removeprefix(PREFIX): tensor for name, tensor in found.items()}
    for name, (bits, columns) in widths.items():
        if bits in NARROW:
            codes, low = state.pop(f"{name}.weight_codes"), state.pop(f"{name}.weight_low")
            weight = unpack(codes, bits, columns).short() + low
            if int(weight.max()) > 127:
                raise ValueError(f"{PREFIX}{name}.weight_codes are past what a byte holds")
            state[f"{name}.weight"] = weight.to(torch.int8)
    return state
