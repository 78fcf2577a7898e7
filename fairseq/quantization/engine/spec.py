"""BlockSpec and Call: the one general encoder block, and what a call of it gives besides hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

KINDS = ("none", "layer", "rms", "l2")
"""Of norms: nothing, LayerNorm, x / sqrt(mean(x^2) + epsilon) * weight, x / max(|x|, epsilon)."""
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu")
GATINGS = ("none", "layer", "halves")
"""act(fc1(x)); act(gate(x)) * fc1(x); or act(g) * u, of which fc1 gives the halves (g, u)."""
ROLES = ("query", "key", "value", "output", "fc1", "gate", "fc2")
"""Of the layers, as ``struct Block`` has them; with one projection, ``query`` gives queries, keys and values."""
NORMS = ("norm1", "norm2", "post1", "post2", "query_norm", "key_norm", "attended_norm", "hidden_norm")


@dataclass(frozen=True)
class Norm:
    """A normalization of rows.

    Attributes:
        kind: one of :data:`KINDS`.
        weight, bias: (width,), or None.
        epsilon: see :data:`KINDS`.
    """

    kind: str = "none"
    weight: Tensor | None = None
    bias: Tensor | None = None
    epsilon: float = 0.0


@dataclass(frozen=True)
class BlockSpec:
    """An encoder block: its layers and tensors by role, as they are now, and what it computes with them.

    h = x + scale1 * post1(output(attended_norm(attention(norm1(x)))))
    y = h + scale2 * post2(fc2(hidden_norm(mlp(norm2(h)))))

    Attributes:
        layers: role of :data:`ROLES` -> a Linear or packed layer; "key", "value" and "gate" where there are such.
        norms: role of :data:`NORMS` -> the norm; those that are missing do nothing.
        activation: one of :data:`ACTIVATIONS`.
        gating: one of :data:`GATINGS`.
        width, heads, head_size, mlp: inputs of the query layer, ..., and inputs of fc2.
        scaling: what products of queries and keys are multiplied by, where there is no ``head_scale``.
        head_scale: (heads,), instead of ``scaling``; or None.
        scale1, scale2: (width,) LayerScale of what attention and the MLP add; or None.
        query_bias: (outputs of query,) added to what that layer gives, where the block keeps it beside the layer;
            or None.
    """

    layers: dict[str, nn.Module]
    norms: dict[str, Norm]
    activation: str
    gating: str
    width: int
    heads: int
    head_size: int
    mlp: int
    scaling: float
    head_scale: Tensor | None = None
    scale1: Tensor | None = None
    scale2: Tensor | None = None
    query_bias: Tensor | None = None

    @property
    def projections(self) -> int:
        """3, or 1 where one layer gives queries, keys and values."""
        return 3 if "key" in self.layers else 1

    def norm(self, role: str) -> Norm:
        """The norm of that role."""
        return self.norms.get(role, NOTHING)

    def tensors(self) -> Iterator[Tensor]:
        """What it holds besides its layers."""
        for norm in self.norms.values():
            yield from (tensor for tensor in (norm.weight, norm.bias) if tensor is not None)
        others = (self.head_scale, self.scale1, self.scale2, self.query_bias)
        yield from (tensor for tensor in others if tensor is not None)


NOTHING = Norm()


@dataclass(frozen=True)
class Call:
    """What changes from call to call, besides hidden states.

    Attributes:
        images, tokens: groups of tokens that attend to one another, and tokens of each: windows, or images.
        row_count: rows of hidden states, and of the output.
        rows: int32 (images * tokens,), the row of hidden states at each place of attention, -1 for a row of zeros;
            each row is at one place. None: as they lie.
        cos, sin: (tokens, head_size), by which queries and keys are rotated; or None.
        neighbours: whether (x1, x0) are rotated with one another, (x3, x2) and so on; else the halves of a row are.
        bias: (heads, tokens, tokens) added to the scaled products; or None.
        mask: (masks, tokens, tokens) added, too; image i takes mask i % masks. Or None.
    """

    images: int
    tokens: int
    row_count: int
    rows: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    neighbours: bool = False
    bias: Tensor | None = None
    mask: Tensor | None = None


MISSING = object()


@dataclass
class Tables:
    """What calls need besides hidden states and is the same for all calls of one kind: made once, then looked up.

    Attributes:
        made: by kind of call; the oldest goes first.
        most: how many are kept.
    """

    made: dict[Any, Any] = field(default_factory=dict)
    most: int = 16

    def get(self, key: Any, make: Any) -> Any:
        """What ``make()`` gave the first time."""
        made = self.made.get(key, MISSING)
        if made is MISSING:
            made = make()
            while len(self.made) >= self.most:
                self.made.pop(next(iter(list(self.made))), None)
            self.made[key] = made
        return made


def reason_not_two_norms(spec: BlockSpec) -> str | None:
    """What a block has in the place of a LayerNorm before attention and one before the MLP, or None."""
    if set(spec.norms) != {"norm1", "norm2"}:
        return f"its norms are {', '.join(spec.norms)}, not norm1 and norm2 alone"
    if any(norm.kind != "layer" or norm.weight is None or norm.bias is None for norm in spec.norms.values()):
        return "its norms are not LayerNorms with weight and bias"
    return None


def reason_not_plain(spec: BlockSpec) -> str | None:
    """What a block has that those of ViT have not, or None."""
    if spec.projections != 3:
        return "its query, key and value are one layer"
    if spec.gating != "none":
        return "its MLP is gated"
    if spec.activation != "gelu":
        return "its activation is not the exact GELU"
    if reason := reason_not_two_norms(spec):
        return reason
    if spec.head_scale is not None or spec.scale1 is not None or spec.scale2 is not None:
        return "it scales what its branches or its heads give"
    return None
