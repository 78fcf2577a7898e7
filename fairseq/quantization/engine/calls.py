"""Calls: what the arguments of a block's forward become as a Call, for each kind of blocks in BLOCK_CLASSES."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fairseq.modules.quantization.context import plain_context
from fairseq.quantization.architectures.blocks import BlockClass
from fairseq.quantization.engine import position_bias, windows
from fairseq.quantization.engine.plan import attention_function
from fairseq.quantization.engine.reading import attention_of
from fairseq.quantization.engine.spec import BlockSpec, Call, Tables

HARMLESS = ("output_hidden_states", "return_dict", "interpolate_pos_encoding", "num_items_in_batch", "resolution")
"""Arguments that reach blocks and change nothing in them, unless an adapter takes them."""
NEVER = -1e30
"""What is added to a product that is masked out is less; a row needs one that is not."""

Given = dict[str, Any]
_derived: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class Calls:
    """Makes the Call of each call of a block; what does not change from call to call is made once.

    It is dropped, tables and all, when a tensor that these were made from changes; see ``NativeBlock.holds``.

    Attributes:
        names: of the arguments of the block's forward behind hidden states, in their order.
        required: those without a default.
    """

    def __init__(self, block: nn.Module, kind: BlockClass, spec: BlockSpec, forward: Any):
        self.block, self.spec, self.adapter, self.tables = block, spec, ADAPTERS[kind.call], Tables()
        self.attention = attention_of(block)
        parameters = list(inspect.signature(forward).parameters.values())[2:]
        parameters = [p for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        self.names = tuple(p.name for p in parameters)
        self.required = tuple(p.name for p in parameters if p.default is inspect.Parameter.empty)

    def call(self, x: Tensor, args: tuple[Any, ...], kwargs: Given) -> Call | None:
        """For hidden states (images, tokens, width); None for a call that only the layers can run."""
        if len(args) > len(self.names) or x.ndim != 3:
            return None
        given = {**dict(zip(self.names, args)), **kwargs}
        call = self.adapter(self, x, given)
        left = (value for name, value in given.items() if name not in HARMLESS)
        return None if any(value is not None and value is not False for value in left) else call

    def in_common_with(self, other: Calls) -> bool:
        """Whether arguments without a tensor that give a call without tables give the same of another block."""
        return self.adapter is other.adapter and self.adapter in (images, clip) and self.names == other.names

    def table(self, x: Tensor, key: Any, make: Callable[[torch.dtype], Any]) -> Any:
        """What ``make`` gave for this key, in float64 for such hidden states, else float32."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32

        def made() -> Any:
            with plain_context(x.device):
                return make(dtype)

        return self.tables.get((key, dtype, x.device), made)


def images(calls: Calls, x: Tensor, given: Given) -> Call | None:
    """Each image by itself: ViT, DINOv2, CLIP and their like, with a mask or without."""
    names = ("attention_mask", "causal_attention_mask", "attn_mask")
    masks = [mask for name in names if (mask := given.pop(name, None)) is not None]
    if len(masks) == 2 and all(mask.is_floating_point() for mask in masks):  # of CLIP's text tower
        masks = [derived((masks[0], masks[1]), "sum", lambda: masks[0] + masks[1])]
    return _masked(calls, x, masks, {})


def clip(calls: Calls, x: Tensor, given: Given) -> Call | None:
    """The same of CLIP, whose text tower may ask PyTorch's function for a causal mask instead of giving one."""
    if given.pop("is_causal", None) and given.get("attention_mask") is None:
        if attention_function(calls.attention).name != "sdpa":
            return None
        mask = calls.table(x, ("causal", x.shape[1]), lambda dtype: _causal(x.shape[1], dtype, x.device))
        given["attention_mask"] = mask
    return images(calls, x, given)


def alone(calls: Calls, x: Tensor, given: Given) -> Call | None:
    """The same, if the model has (images, tokens, width), and not (tokens, images, width)."""
    return images(calls, x, given) if calls.attention.batch_first else None


def beit(calls: Calls, x: Tensor, given: Given) -> Call | None:
    """With biases by relative position, the block's own or one for all blocks."""
    interpolate, resolution = bool(given.get("interpolate_pos_encoding")), given.get("resolution")
    shared = [given.pop(name, None) for name in ("relative_position_bias", "attention_mask")]
    own = None
    if position_bias.has_own(calls.attention, calls.block):
        if resolution is None:
            return None
        size, tokens = (int(resolution[0]), int(resolution[1])), x.shape[1]
        own = calls.table(
            x,
            ("bias", size, interpolate, tokens),
            lambda dtype: position_bias.of_beit(calls.block, calls.attention, size, interpolate, tokens).to(dtype),
        )
    return _masked(calls, x, [bias for bias in shared if bias is not None], {"bias": own})


def timm_beit(calls: Calls, x: Tensor, given: Given) -> Call | None:
    """The same of timm."""
    shared = given.pop("shared_rel_pos_bias", None)
    own = None
    if calls.attention.relative_position_bias_table is not None:
        own = calls.table(x, "bias", lambda dtype: calls.attention._get_rel_pos_bias()[0].to(dtype).contiguous())
    return _masked(calls, x, [] if shared is None else [shared], {"bias": own})


def dinov3(calls: Calls, x: Tensor, given: Given) -> Call | None:
    """Patches rotated by halves; what precedes them is not."""
    cos, sin = given.pop("position_embeddings", None) or (None, None)
    mask = given.pop("attention_mask", None)
    if cos is None or sin is None:
        return None
    tables = _rotation(calls, x, cos, sin)
    return None if tables is None else _masked(calls, x, [] if mask is None else [mask], tables)


def eva(calls: Calls, x: Tensor, given: Given) -> Call | None:
    """Patches rotated by neighbours or halves, where there is a table."""
    rope, mask = given.pop("rope", None), given.pop("attn_mask", None)
    tables: Given | None = {}
    if rope is not None:
        if x.shape[1] - calls.attention.num_prefix_tokens != rope.shape[-2]:
            return None
        sin, cos = rope.chunk(2, -1)
        neighbours = not getattr(calls.attention, "rotate_half", False)
        tables = _rotation(calls, x, cos, sin, rope, neighbours)
    return None if tables is None else _masked(calls, x, [] if mask is None else [mask], tables)


def shifted_windows(calls: Calls, x: Tensor, given: Given) -> Call | None:
    """Windows of a grid of tokens, shifted in every second block."""
    size, block = given.pop("input_dimensions", None), cast(Any, calls.block)
    if size is None or int(size[0]) * int(size[1]) != x.shape[1]:
        return None
    if not given.pop("always_partition", False) and hasattr(block, "set_shift_and_window_size"):
        block.set_shift_and_window_size(size)  # what the forward of Swin does, and keeps
    grid = windows.Grid(int(size[0]), int(size[1]), int(block.window_size), int(block.shift_size))
    bias = calls.table(x, "bias", lambda dtype: position_bias.of_windows(calls.attention).to(dtype).contiguous())
    if bias.shape[-1] != grid.window**2:
        return None
    rows = calls.table(x, ("rows", grid, len(x)), lambda dtype: windows.rows(grid, len(x)).to(x.device))
    mask = calls.table(x, ("mask", grid), lambda dtype: windows.mask(block, grid, dtype, x.device))
    return Call(len(x) * grid.windows, grid.window**2, x.shape[0] * x.shape[1], rows=rows, bias=bias, mask=mask)


ADAPTERS: dict[str, Callable[[Calls, Tensor, Given], Call | None]] = {
    "images": images,
    "clip": clip,
    "alone": alone,
    "beit": beit,
    "timm_beit": timm_beit,
    "dinov3": dinov3,
    "eva": eva,
    "windows": shifted_windows,
}


def _masked(calls: Calls, x: Tensor, added: list[Tensor], tables: Given) -> Call | None:
    """A call with what is added to its products: tables of all heads, or of all images; None for another shape."""
    count, tokens = x.shape[:2]
    heads, bias, mask = calls.spec.heads, tables.pop("bias", None), None
    if bias is not None and bias.shape[-2:] != (tokens, tokens):
        return None
    adds = bool(added) and attention_function(calls.attention).name == "eager"
    for table in added:
        if table.dtype == torch.bool and adds:  # 0 and 1, where PyTorch's function takes them for yes and no
            return None
        if table.ndim != 4 or table.shape[-2:] != (tokens, tokens):
            return None
        if len(table) == 1 and table.shape[1] == heads and table.is_floating_point():
            bias = table[0] if bias is None else bias + table[0]
        elif table.shape[1] == 1 and len(table) in (1, count) and mask is None:
            mask = derived((table,), "mask", functools.partial(_mask, table[:, 0]))
            if mask is None:
                return None
            mask = mask if len(mask) else None
        else:
            return None
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    bias, mask = (None if t is None else t.detach().to(real).contiguous() for t in (bias, mask))
    return Call(count, tokens, count * tokens, bias=bias, mask=mask, **tables)


def _causal(tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What keeps tokens from those behind them: (1, 1, tokens, tokens)."""
    return torch.full((tokens, tokens), -torch.inf, dtype=dtype, device=device).triu_(1)[None, None]


def _mask(table: Tensor) -> Tensor | None:
    """(masks, tokens, tokens), what is added to products: no masks if that is nothing, None if a row has no token."""
    if table.dtype == torch.bool:
        table = torch.zeros_like(table, dtype=torch.float32).masked_fill_(~table, -torch.inf)
    if not table.is_floating_point() or not bool((table.amax(-1) > NEVER).all()):
        return None
    return table.clone() if bool(table.any()) else table.new_empty(0, *table.shape[1:])


def _rotation(
    calls: Calls, x: Tensor, cos: Tensor, sin: Tensor, source: Tensor | None = None, neighbours: bool = False
) -> Given | None:
    """Tables for all tokens: those before the patches are multiplied by 1."""
    before, size = x.shape[1] - cos.shape[-2], calls.spec.head_size
    if cos.ndim != 2 or sin.shape != cos.shape or cos.shape[-1] != size or before < 0:
        return None

    def padded() -> tuple[Tensor, Tensor]:
        ones = torch.cat([cos.new_ones(before, size), cos])
        return ones, torch.cat([sin.new_zeros(before, size), sin])

    cosines, sines = derived((sin, cos) if source is None else (source,), ("rotation", before), padded)
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    cosines, sines = cosines.detach().to(real), sines.detach().to(real)
    return {"cos": cosines, "sin": sines, "neighbours": neighbours}


def derived(sources: tuple[Tensor, ...], key: Any, make: Callable[[], Any]) -> Any:
    """What ``make`` gives for tensors that all blocks of a model are called with: made for the first of them.

    A tensor of inference mode does not know whether it was written to; of such a one it is made each time.
    """
    if any(source.is_inference() for source in sources):
        return make()
    first, *others = sources
    key = (key, *(source._version for source in sources))
    found = _derived.get(first)
    if found is None or found[0] != key or any(kept is not other for kept, other in zip(found[1], others)):
        found = (key, others, make())
        _derived[first] = found
    return found[2]
