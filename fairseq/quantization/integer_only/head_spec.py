"""What a float model does behind its last block: candidates, of which those that compute what it returns are taken."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq.quantization.engine.reference_block import activate, normalize
from fairseq.quantization.engine.spec import ACTIVATIONS, Norm
from fairseq.quantization.integer_only.head import Tokens

TOLERANCE = 1e-3
"""Of what is checked on pictures, see :func:`distance`."""
OUTPUT_NAME = re.compile("[a-z][a-z0-9_]*")
"""Of outputs and readouts, which are names of modules."""
Note = Callable[[tuple[str, ...], Tensor], None]
Candidate = TypeVar("Candidate")


def distance(a: Tensor, b: Tensor, within: Tensor | None = None) -> float:
    """How far ``a`` is from ``b``, (..., C): the largest difference as a share of its column, which hides no other.

    A hundredth of the largest column is added to each; and 0.004 of those of ``within``, where both were rounded as
    parts of something that reaches further. Inf of other shapes, or where something is not finite.
    """
    if a.shape != b.shape:
        return math.inf
    a, b = (t.detach().double().reshape(-1, t.shape[-1]) for t in (a, b))
    room = b.abs().amax(0) + 1e-2 * b.abs().max()
    if within is not None:
        room = room + 4e-3 * within.detach().double().reshape(-1, within.shape[-1]).abs().amax(0)
    share = ((a - b).abs().amax(0) / room.clamp(min=1e-30)).max()
    return float(share) if bool(torch.isfinite(share)) else math.inf


def close(a: Tensor, b: Tensor, within: Tensor | None = None) -> bool:
    """Whether they are the same but for rounding, by :func:`distance`."""
    return distance(a, b, within) <= TOLERANCE


def nearest(candidates: Iterable[tuple[Candidate, float]]) -> Candidate | None:
    """The candidate of the least distance, if that is no more than rounding."""
    found = min(candidates, key=lambda pair: pair[1], default=None)
    return None if found is None or found[1] > TOLERANCE else found[0]


@dataclass(frozen=True)
class ReadoutSpec:
    """As :class:`~.head.Readout`, with a float norm and the Linear or packed layer of the model."""

    tokens: Tokens | None
    norm: Norm | None
    norm_first: bool
    linear: Any = None

    def pooled(self, h: Tensor) -> Tensor:
        """What the layer reads of the residual stream, (B, T, C)."""
        x = h if self.norm is None or not self.norm_first else normalize(self.norm, h)
        if self.tokens is not None:
            means = (x[:, start] if stop == start + 1 else x[:, start:stop].mean(1) for start, stop in self.tokens)
            x = torch.cat(list(means), dim=-1)
        return x if self.norm is None or self.norm_first else normalize(self.norm, x)


@dataclass(frozen=True)
class Probing:
    """Attention of one query to normed tokens.

    Attributes:
        probe: (C,), what the query is made of.
        attention: with its weights for query, key and value in one.
    """

    norm: Norm
    probe: Tensor
    attention: nn.MultiheadAttention

    @property
    def heads(self) -> int:
        """How many the attention has."""
        return self.attention.num_heads

    def projection(self, part: int) -> tuple[Tensor, Tensor]:
        """Weight and bias of the queries, keys or values, 0 to 2."""
        weight, bias = self.attention.in_proj_weight, self.attention.in_proj_bias
        bias = torch.zeros_like(weight[:, 0]) if bias is None else bias
        return weight.detach().chunk(3)[part], bias.detach().chunk(3)[part]

    def query(self) -> Tensor:
        """(C,), the same for all pictures."""
        return F.linear(self.probe, *self.projection(0))

    def attended(self, h: Tensor, note: Note = lambda key, value: None) -> Tensor:
        """What ``norm2`` and the sum read, (B, C), of the residual stream; ``note`` is told of what is on the way."""
        x = normalize(self.norm, h)
        key, value = (F.linear(x, *self.projection(part)) for part in (1, 2))
        query, key_, value_ = (
            t.unflatten(-1, (self.heads, -1)).transpose(-2, -3) for t in (self.query()[None], key, value)
        )
        scores = query @ key_.transpose(-1, -2) / math.sqrt(query.shape[-1])  # (B, heads, 1, T)
        mixed = (torch.softmax(scores, -1) @ value_).transpose(1, 2).flatten(1)
        out: Any = self.attention.out_proj
        y = F.linear(mixed, out.weight, out.bias)
        note(("key", "in"), x)
        note(("key", "out"), key)
        note(("value", "out"), value)
        note(("output", "in"), mixed)
        note(("stream",), y)
        return y


@dataclass(frozen=True)
class AttentionSpec(Probing):
    """As :class:`~.head.AttentionPooling`: the attention, and an MLP.

    Attributes:
        fc1, fc2: Linear or packed.
        activation: one of those of blocks.
    """

    norm2: Norm
    fc1: Any
    fc2: Any
    activation: str


@dataclass(frozen=True)
class HeadSpec:
    """As :class:`~.head.IntegerHead`."""

    readouts: Mapping[str, ReadoutSpec | AttentionSpec]
    outputs: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Seen:
    """What was seen of a head on pictures.

    Attributes:
        stream: what the last block gave, (B, T, C).
        outputs: of the model, by name, floating tensors alone.
        layers: of Linear layers behind the blocks: input and output by name.
        norms: the LayerNorms outside of blocks.
        patches: how many tokens are patches; they are the last ones.
    """

    stream: Tensor
    outputs: Mapping[str, Tensor]
    layers: Mapping[str, tuple[Tensor, Tensor]]
    norms: tuple[Norm, ...]
    patches: int


def read_head(model: nn.Module, seen: Seen) -> HeadSpec:
    """The head that computes every output of ``model`` that was seen.

    Raises:
        ValueError: an output that no candidate computes; the message is the reason, without the model.
    """
    readouts: dict[str, ReadoutSpec | AttentionSpec] = {}
    outputs: dict[str, tuple[str, ...]] = {}
    for name, value in seen.outputs.items():
        if (single := _single(model, seen, value)) is not None:
            readouts[name], outputs[name] = single, (name,)
        elif (both := _mean_of_two(model, seen, value)) is not None:
            known = {f"{name}_{i}": spec for i, spec in enumerate(both)}
            outputs[name] = tuple(known)
            readouts |= known
        else:
            raise ValueError(
                f"its {name} is not tokens or their mean, a LayerNorm and one Linear layer, nor the mean of two such, "
                "nor attention of one query"
            )
    return HeadSpec(*_shared(readouts, outputs))


def _shared(
    readouts: dict[str, ReadoutSpec | AttentionSpec], outputs: dict[str, tuple[str, ...]]
) -> tuple[dict[str, ReadoutSpec | AttentionSpec], dict[str, tuple[str, ...]]]:
    """Without readouts that are the same as one with a better name: what a mean is of, which may be outputs, too."""
    kept: dict[str, ReadoutSpec | AttentionSpec] = {}
    names: dict[str, str] = {}
    for name, spec in sorted(readouts.items(), key=lambda item: item[0] not in outputs):
        twin = next((other for other, known in kept.items() if _same(known, spec)), name)
        kept.setdefault(twin, spec)
        names[name] = twin
    return kept, {name: tuple(names[source] for source in sources) for name, sources in outputs.items()}


def _same(a: ReadoutSpec | AttentionSpec, b: ReadoutSpec | AttentionSpec) -> bool:
    if not isinstance(a, ReadoutSpec) or not isinstance(b, ReadoutSpec):
        return a is b
    return a.linear is b.linear and (a.tokens, a.norm_first) == (b.tokens, b.norm_first) and a.norm is b.norm


def _single(model: nn.Module, seen: Seen, value: Tensor) -> ReadoutSpec | AttentionSpec | None:
    found = sorted(seen.layers.items(), key=lambda item: distance(item[1][1], value))
    for name, (read, given) in found:
        if close(given, value) and (spec := _pooling(seen, read, model.get_submodule(name))) is not None:
            return spec
    return _pooling(seen, value, None) or _attention(model, seen, value)


def _mean_of_two(model: nn.Module, seen: Seen, value: Tensor) -> tuple[ReadoutSpec, ReadoutSpec] | None:
    layers = list(seen.layers.items())
    pairs = [(a, b) for i, a in enumerate(layers) for b in layers[i + 1 :] if a[1][1].shape == b[1][1].shape]
    best = nearest((pair, distance((pair[0][1][1] + pair[1][1][1]) / 2, value)) for pair in pairs)
    if best is None:
        return None
    first, second = (_pooling(seen, read, model.get_submodule(name)) for name, (read, _) in best)
    return None if first is None or second is None else (first, second)


def _pooling(seen: Seen, read: Tensor, linear: Any) -> ReadoutSpec | None:
    """What makes ``read`` of the residual stream."""
    specs = (ReadoutSpec(*candidate, linear) for candidate in _candidates(seen, read.ndim))
    return nearest((spec, distance(spec.pooled(seen.stream), read)) for spec in specs)


def _candidates(seen: Seen, dimensions: int) -> Iterator[tuple[Tokens | None, Norm | None, bool]]:
    """Tokens, norm, and whether it comes first."""
    count = seen.stream.shape[1]
    first = count - seen.patches
    for norm in (*seen.norms, None):
        if dimensions == 3:
            yield None, norm, norm is not None
            continue
        for token in range(min(first + 1, count)):
            yield ((token, token + 1),), norm, False
        for start in sorted({0, min(1, first), first}):
            for before in [((0, 1),), ()] if first else [()]:
                for norm_first in (True, False) if norm is not None else (False,):
                    if norm_first or not before:
                        yield (*before, (start, count)), norm, norm_first
            if first and norm is None:
                yield ((0, 1), (start, count)), None, False


def _attention(model: nn.Module, seen: Seen, value: Tensor) -> AttentionSpec | None:
    """An nn.MultiheadAttention whose query is a parameter, and an MLP, which make ``value``."""
    width = seen.stream.shape[-1]
    modules = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    probes = [p.detach().reshape(-1) for p in model.parameters() if p.numel() == width and p.ndim == 3]
    pairs = [
        (a, b)
        for a, (x, _) in seen.layers.items()
        for b, (_, y) in seen.layers.items()
        if x.shape[-1] == y.shape[-1] == width and a != b
    ]
    found: list[tuple[AttentionSpec, float]] = []
    for attention in modules:
        if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
            continue
        for norm, probe in itertools.product(seen.norms, probes):
            y = Probing(norm, probe, attention).attended(seen.stream)
            for fc1, fc2 in pairs:
                (read, given), (activated, added) = (_flat(seen.layers[layer]) for layer in (fc1, fc2))
                norm2 = nearest((n, distance(normalize(n, y), read)) for n in seen.norms)
                kind = nearest((k, distance(activate(k, given), activated)) for k in ACTIVATIONS)
                if norm2 is not None and kind is not None:
                    first, second = model.get_submodule(fc1), model.get_submodule(fc2)
                    spec = AttentionSpec(norm, probe, attention, norm2, first, second, kind)
                    found.append((spec, distance(y + added, value)))
    return nearest(found)


def _flat(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Of one token: (B, 1, C) -> (B, C)."""
    first, second = (t[:, 0] if t.ndim == 3 and t.shape[1] == 1 else t for t in pair)
    return first, second
