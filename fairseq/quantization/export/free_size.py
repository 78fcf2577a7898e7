"""Files for pictures of any height and width: how a model is called for them, and on which sizes a file is verified."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fairseq.quantization.architectures.forward import vision_config
from fairseq.quantization.export.written import any_batch

MAX_PATCHES = 512
"""Along one side; at least two."""
FLAG = "interpolate_pos_encoding"
"""The argument of transformers' models that resizes position embeddings, and the method that does."""


def size_settings(model: nn.Module) -> dict[str, Any]:
    """What ``model`` is called with, beside its inputs, so that it takes pictures of any size."""
    return {FLAG: True} if FLAG in inspect.signature(type(model).forward).parameters else {}


def free_shapes(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, dict[int, Any]]:
    """The free dimensions of each input, for torch.export: the batch, and height and width of the pictures.

    Raises:
        ValueError: the size of a patch is unknown, the pictures are not of two whole patches or more, or the windows
            of the model depend on them.
    """
    shapes = {name: {0: any_batch()} for name in inputs}
    pictures = inputs.get("pixel_values")
    if pictures is None or pictures.ndim != 4:
        raise ValueError("free_size is for models that are called with pixel_values of shape (batch, channels, H, W)")
    if any(hasattr(part, "set_shift_and_window_size") for part in model.modules()):
        raise ValueError(
            f"free_size: {type(model).__name__} chooses its windows by the size of the pictures, which no file can"
        )
    for i, name in ((2, "height"), (3, "width")):
        patch, size = patch_size(model)[i - 2], pictures.shape[i]
        if size % patch or size < 2 * patch:
            raise ValueError(
                f"free_size needs a sample of whole patches, two or more: its {name} is {size}, a patch is {patch}"
            )
        patches = torch.export.Dim(f"{name}_in_patches", min=2, max=MAX_PATCHES)
        shapes["pixel_values"][i] = patch * patches
    return shapes


def patch_size(model: nn.Module) -> tuple[int, int]:
    """Height and width of a patch."""
    for holder in (vision_config(model), getattr(model, "patch_embed", None)):  # of transformers, of timm
        size = getattr(holder, "patch_size", None)
        if isinstance(size, int):
            return size, size
        if size is not None:
            return tuple(size)
    raise ValueError(f"free_size needs a patch_size in the configuration, which {type(model).__name__} lacks")


def other_sizes(wrapper: nn.Module, model: nn.Module, inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The inputs with larger pictures that are not square, and one of them with half of the height.

    Raises:
        ValueError: the model does not take them.
    """
    pictures, (down, right) = inputs["pixel_values"], patch_size(model)
    height, width = pictures.shape[2:]
    sizes = {(height + down, width + 2 * right): len(pictures), (max(height // 2 // down, 2) * down, width): 1}
    batches = []
    for size, count in sizes.items():
        batch = {name: tensor[:count] for name, tensor in inputs.items()}
        batch["pixel_values"] = nn.functional.interpolate(batch["pixel_values"], size, mode="bilinear")
        try:
            wrapper(*batch.values())
        except Exception as error:  # models raise nearly anything
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ValueError(
                f"free_size: {type(model).__name__} does not take pictures of {size[0]} x {size[1]}: {reason[:200]}"
            ) from error
        batches.append(batch)
    return batches


@contextmanager
def always_resized(model: nn.Module) -> Iterator[None]:
    """Inside, transformers' position embeddings are also resized to the size that they have, to the same values.

    The methods leave that out, by a comparison that would fix the size in a file. They compare the number of the
    embeddings that they get; so here they get none, and only their width counts. And ``torch_int``, which some of them
    call, leaves sizes without a value as they are.
    """
    parts = [part for part in model.modules() if callable(getattr(type(part), FLAG, None))]
    kinds = [type(part) for part in parts]
    files = [sys.modules[name] for name in {kind.__module__ for kind in kinds}]
    calls = [(file, file.torch_int) for file in files if hasattr(file, "torch_int")]
    try:
        for part, kind in zip(parts, kinds):
            part.__class__ = _resizing(kind)
        for file, to_int in calls:
            vars(file)["torch_int"] = partial(_sizes_as_they_are, to_int)
        yield
    finally:
        for part, kind in zip(parts, kinds):
            part.__class__ = kind
        for file, to_int in calls:
            vars(file)["torch_int"] = to_int


def _sizes_as_they_are(to_int: Callable[[Any], Any], x: Any) -> Any:
    return x if isinstance(x, torch.SymInt) else to_int(x)


def _resizing(kind: type[nn.Module]) -> type[nn.Module]:
    def resize(self: Any, embeddings: Tensor, *size: Any) -> Any:
        return getattr(kind, FLAG)(self, embeddings[:, :0], *size)

    return type(kind.__name__, (kind,), {FLAG: resize})
