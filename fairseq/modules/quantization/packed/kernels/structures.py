"""The structures and functions of the compiled library, as csrc/api.h and csrc/native.cpp declare them."""

from __future__ import annotations

from ctypes import POINTER, Structure, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from typing import Any

STAGES = (
    "LayerNorm, quantize",
    "integer products",
    "scale, bias, GELU, add",
    "attention",
    "quantize",
    "unpack 4 bits",
    "wait",
)
"""Where the time of a call goes, in the order of the C enumeration ``Stage``."""


class Linear(Structure):
    """One Linear, as ``struct Linear`` of csrc/api.h."""

    kept: tuple[Any, ...]  # what it points to

    _fields_ = (
        ("panels", c_void_p), ("sums", c_void_p), ("scale", c_void_p), ("zero", c_void_p), ("bias", c_void_p),
        ("factor", c_void_p), ("inputs", c_int64), ("outputs", c_int64), ("narrow", c_int32),
        ("zero_offset", c_int32), ("scale_step", c_int32), ("input_scale", c_float), ("input_zero", c_int32),
        ("halves", c_int32), ("input_bits", c_int32), ("group_size", c_int64),
    )  # fmt: skip


class Norm(Structure):
    """A norm, as ``struct Norm`` of csrc/api.h."""

    _fields_ = (("weight", c_void_p), ("bias", c_void_p), ("epsilon", c_float), ("kind", c_int32))


NORMS = ("none", "layer", "rms", "l2")
"""LayerNorm, RMSNorm, and x / max(norm of x, epsilon), in the order of the C enumeration ``NormKind``."""
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu")
"""In the order of the C enumeration ``Activation``."""
GATINGS = ("none", "layer", "halves")
"""Of an MLP, in the order of the C enumeration ``Gating``."""
LAYERS = ("query", "key", "value", "output", "fc1", "gate", "fc2")
BLOCK_NORMS = (
    "norm1", "norm2", "post1", "post2", "query_norm", "key_norm", "attended_norm", "hidden_norm",
)  # fmt: skip


class Block(Structure):
    """An encoder block, as ``struct Block`` of csrc/api.h."""

    _fields_ = (
        *((name, Linear) for name in LAYERS),
        *((name, Norm) for name in BLOCK_NORMS),
        *((name, c_void_p) for name in ("scale1", "scale2", "head_scale")),
        ("scaling", c_float),
        *((name, c_int32) for name in ("projections", "activation", "gating")),
        *((name, c_int64) for name in ("width", "heads", "head_size", "mlp")),
    )
    kept: tuple[Any, ...]  # what it points to


class Call(Structure):
    """What a block is called with, as ``struct Call`` of csrc/api.h."""

    _fields_ = (
        *((name, c_int64) for name in ("images", "tokens", "row_count")),
        *((name, c_void_p) for name in ("rows", "cosines", "sines", "bias", "mask")),
        ("masks", c_int64), ("neighbours", c_int32), ("exact", c_int32),
    )  # fmt: skip
    kept: tuple[Any, ...]  # what it points to
    sizes: tuple[int, int] | None  # heads and head_size of the tables, if there are any


class Patches(Structure):
    """A convolution over patches, as ``struct Patches`` of csrc/api.h."""

    _fields_ = (
        ("panels", c_void_p), ("bias", c_void_p),
        *((name, c_int64) for name in ("channels", "height", "width", "patch_height", "patch_width", "out")),
    )  # fmt: skip


class Requantize(Structure):
    """Constants of a requantization, as ``struct Requantize`` of csrc/api.h."""

    _fields_ = (
        ("multiplier", c_void_p), ("shift", c_void_p), ("offset", c_void_p),
        *((name, c_int32) for name in ("lift", "low", "high")),
    )  # fmt: skip


class Requantize32(Structure):
    """The same for 32 bits, as ``struct Requantize32`` of csrc/api.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("multiplier", "offset", "shift")),
        *((name, c_int32) for name in ("low", "high")),
    )  # fmt: skip


class Lines(Structure):
    """The pieces of an activation, as ``struct Lines`` of csrc/api.h."""

    _fields_ = (("both", c_void_p), ("values", c_void_p), ("gains", c_void_p))


class IntegerLinear(Linear):
    """A Linear of integers alone, as ``struct IntegerLinear`` of csrc/api.h."""

    # Behind those of Linear:
    _fields_ = (("output", Requantize), ("centre", c_int32), ("small", c_int32))  # type: ignore[assignment]


class IntegerNorm(Structure):
    """A LayerNorm of integers alone, as ``struct IntegerNorm`` of csrc/api.h."""

    _fields_ = (("output", Requantize), ("epsilon", c_int64))


ROW_KINDS = ("signed", "unsigned", "bytes")
"""How rows of integers become bytes, in the order of the C enumeration ``RowKind``."""


class Rows(Structure):
    """How rows of integers become bytes, as ``struct Rows`` of csrc/api.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("columns", "added", "shift")),
        ("kind", c_int32), ("zero", c_int32), ("alone", c_void_p),
    )  # fmt: skip


class IntegerAttention(Structure):
    """Attention of integers alone, as ``struct IntegerAttention`` of csrc/api.h."""

    _fields_ = (
        ("multiplier", c_void_p), ("shift", c_void_p), ("output", Requantize), ("lift", c_int32), ("dynamic", c_int32),
    )  # fmt: skip


class IntegerBlock(Structure):
    """An encoder block of integers alone, as ``struct IntegerBlock`` of csrc/api.h."""

    _fields_ = (
        *((name, IntegerLinear) for name in ("query", "key", "value", "output", "fc1", "fc2")),
        *((name, IntegerNorm) for name in ("norm1", "norm2")),
        *((name, Rows) for name in ("rows1", "attended_rows", "rows2", "hidden_rows")),
        ("attention", IntegerAttention), ("lines", Lines), ("activation", Requantize), ("activation32", Requantize32),
    )  # fmt: skip


class IntegerModel(Structure):
    """A Vision Transformer of integers alone, as ``struct IntegerModel`` of csrc/api.h."""

    _fields_ = (
        ("patches", IntegerLinear), ("classifier", IntegerLinear), ("constants", c_void_p),
        ("blocks", POINTER(POINTER(IntegerBlock))),
        *((name, c_int64) for name in (
            "block_count", "channels", "picture_height", "picture_width", "patch_height", "patch_width", "tokens",
            "width", "heads", "head_size", "mlp",
        )),
        ("norm", IntegerNorm), ("rows", Rows), ("before", POINTER(IntegerNorm)),
    )  # fmt: skip


SIGNATURES: dict[str, tuple[Any, ...]] = {
    "fairseq_level_name": (c_int,),
    "fairseq_supports": (c_int,),
    "fairseq_size": (c_int,),
    "fairseq_activate": (c_int, c_int, c_void_p, c_int64, c_void_p),
    "fairseq_norm": (c_int, POINTER(Norm), c_void_p, c_int64, c_int64, c_void_p),
    "fairseq_quantize": (c_int, POINTER(Linear), c_void_p, c_int64, c_void_p, c_void_p, c_void_p),
    "fairseq_round_tokens": (c_int, c_int, c_void_p, c_int64, c_int64, c_void_p, c_int),
    "fairseq_product": (c_int, POINTER(Linear), c_void_p, c_int64, c_void_p),
    "fairseq_linear": (
        c_int, POINTER(Linear), c_void_p, c_int64, c_int, c_void_p, c_void_p, c_int, POINTER(c_double),
    ),
    "fairseq_attention": (
        c_int, POINTER(Block), POINTER(Call), c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int,
    ),
    "fairseq_fast_halves": (c_int,),
    "fairseq_fast_floats": (c_int,),
    "fairseq_patches": (c_int, POINTER(Patches), c_void_p, c_int64, c_void_p, c_int),
    "fairseq_integers": (
        c_int, POINTER(IntegerModel), c_void_p, c_int64, c_void_p, c_int, c_int64, c_int64, POINTER(c_double),
    ),
    "fairseq_integer_norm": (c_int, POINTER(IntegerNorm), c_void_p, c_int64, c_int64, c_void_p, c_int),
    "fairseq_round_pixels": (
        c_int, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_int,
    ),
    "fairseq_blocks": (
        c_int, POINTER(POINTER(Block)), POINTER(POINTER(Call)), c_int64, c_void_p, POINTER(c_void_p), c_int, c_int64,
        c_int64, POINTER(c_double),
    ),
}  # fmt: skip
