"""Recorder: what the encoder blocks of a model give, and their queries and keys, while it runs."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from typing import Any, NamedTuple, Self

from torch import Tensor, nn

from fairseq.quantization.architectures.blocks import layer_paths
from fairseq.quantization.architectures.families import component_of, tower_of
from fairseq.quantization.architectures.layers import block_of, linear_layers
from fairseq.quantization.architectures.recognition import family_of


class Projection(NamedTuple):
    """A layer that gives queries and keys: which part of its output is which.

    Attributes:
        layer: its name in the model.
        part: 0 and 1 of three where one layer gives query, key and value, else None.
    """

    layer: str
    part: int | None


class Anatomy(NamedTuple):
    """What is compared in a model.

    Attributes:
        blocks: names of the encoder blocks of the vision tower, in order.
        attention: query and key, and how many heads, of each of them that is known to have these.
    """

    blocks: tuple[str, ...]
    attention: tuple[tuple[Projection, Projection, int], ...]


def anatomy(model: nn.Module) -> Anatomy:
    """The encoder blocks of a float or emulated model, and their attention where it is of a known kind."""
    family = family_of(model)
    names = (
        block_of(name)
        for name in linear_layers(model)
        if tower_of(name, family) == "vision" and component_of(name, family) in ("attention", "mlp")
    )
    blocks = tuple(block for block in dict.fromkeys(names) if block is not None)
    found = (_attention(model, block) for block in blocks)
    return Anatomy(blocks, tuple(one for one in found if one is not None))


def _attention(model: nn.Module, block: str) -> tuple[Projection, Projection, int] | None:
    part = model.get_submodule(block)
    paths, heads = layer_paths(part), _heads(part)
    if paths is None or heads is None:
        return None
    if "qkv" in paths:
        layer = f"{block}.{paths['qkv']}"
        return Projection(layer, 0), Projection(layer, 1), heads
    return Projection(f"{block}.{paths['query']}", None), Projection(f"{block}.{paths['key']}", None), heads


def _heads(block: nn.Module) -> int | None:
    """How many attention heads a block has, as one of its modules says."""
    counts = (getattr(m, name, None) for m in block.modules() for name in ("num_attention_heads", "num_heads"))
    return next((count for count in counts if isinstance(count, int)), None)


class Recorder:
    """A context in which a model's forward pass leaves what is compared, which stays until the next entry.

    Args:
        model: that :func:`anatomy` was made of.
        known: its anatomy.
        features, attention: which of the two is wanted.
    """

    def __init__(self, model: nn.Module, known: Anatomy, features: bool, attention: bool):
        projections = [p for query, key, _ in known.attention for p in (query, key)] if attention else []
        blocks = [Projection(name, None) for name in known.blocks] if features else []
        self._places = [(model.get_submodule(place.layer), place.part) for place in (*blocks, *projections)]
        self._blocks = len(blocks)
        self._kept: dict[int, Tensor] = {}
        self._stack = ExitStack()

    @property
    def features(self) -> list[Tensor]:
        """What each block gave, in order."""
        return [self._kept[place] for place in range(self._blocks)]

    @property
    def attention(self) -> list[Tensor]:
        """Query and key of each block, one after the other."""
        return [self._kept[place] for place in range(self._blocks, len(self._places))]

    def __enter__(self) -> Self:
        self._kept.clear()
        for place, (module, part) in enumerate(self._places):
            handle = module.register_forward_hook(functools.partial(self._keep, place, part))
            self._stack.callback(handle.remove)
        return self

    def _keep(self, place: int, part: int | None, module: nn.Module, args: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output  # hidden states are the first that a block returns
        self._kept[place] = output if part is None else output.chunk(3, -1)[part]

    def __exit__(self, *error: Any) -> None:
        self._stack.close()
