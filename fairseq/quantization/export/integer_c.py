"""An IntegerViT for C: a file with its numbers, and a header with its sizes and the constants of the arithmetic.

``examples/vision_transformer/integer_c`` has the program that reads both. The file is little-endian:

    "IVIT", uint32 version, uint32 length of the file, uint32 CRC-32 of all that follows
    arrays, each after its number of entries as uint32: the sizes (an array of one int32 each), then

    constants       int32 (tokens, width)
    linear          int8 weight (out, in), requantize (out)              the patches
    norm            of the tokens, if there is one                       and then for each block
    norm, 3 linear  int64 eps, result; query, key, value                 norm1 and what reads it
    attention       int32 multiplier, uint8 shift (heads); result        and the linear "output"
    norm, linear                                                         norm2 and fc1
    activation      int32 entries (2, 256); result                       and the linear fc2
    norm, result    what is read of tokens; those that there are         and a linear; twice if there are two heads
    checks          their number; uint8 pictures, int32 logits           what a program can compare itself with

A requantize is int32 multipliers, uint8 shifts, int64 offsets. A result is the number of its bytes as int32, a
requantize, and if there are more bytes than columns int32 zero, int32 columns, int32 added, uint8 shifts.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from fairseq.modules.quantization.integer import attention, dyadic, normalization, piecewise, rows
from fairseq.modules.quantization.integer.dyadic import Requantize
from fairseq.quantization.export.export_report import ExportReport
from fairseq.quantization.integer_only.head import LOGIT_BITS, Readout
from fairseq.quantization.integer_only.layers import WIDE, IntegerLinear, IntegerNorm, Spread
from fairseq.quantization.integer_only.model import IntegerViT

MAGIC, VERSION = b"IVIT", 2
START = 16
MOST_CHECKS = 2


def c_files(model: IntegerViT, pixels: Tensor) -> tuple[bytes, str]:
    """The file and the header.

    Args:
        model: on the CPU.
        pixels: uint8 (N, channels, H, W); the first two are written, too, with their logits.

    Raises:
        ValueError: blocks of several sizes, or a head, for which the program has no place.
    """
    sizes = _sizes(model)
    body = b"".join(_counted(array) for array in _arrays(model, sizes, pixels[:MOST_CHECKS]))
    head = MAGIC + np.array([VERSION, START + len(body), zlib.crc32(body)], "<u4").tobytes()
    return head + body, _header(model, sizes, START + len(body))


def write_c(model: IntegerViT, pixels: Tensor, file: Path) -> ExportReport:
    """Write both, the header with the suffix .h, and read them again.

    Args:
        model, pixels: see :func:`c_files`.
        file: alone in its folder; the report names it as if it lay one folder higher.

    Raises:
        ValueError: see :func:`c_files`.
        RuntimeError: what was written is not what is read.
    """
    content, header = c_files(model, pixels)
    file.write_bytes(content)
    file.with_suffix(".h").write_text(header, encoding="ascii")
    if file.read_bytes() != content or file.with_suffix(".h").read_text(encoding="ascii") != header:
        raise RuntimeError(f"{file.name} is not what was written")
    weights = [module.weight.numel() for module in model.modules() if isinstance(module, IntegerLinear)]
    paths = tuple(str(file.parent.parent / name) for name in (file.name, file.with_suffix(".h").name))
    return ExportReport(
        "c",
        paths,
        len(content) + len(header),
        len(weights),
        sum(weights),
        0,
        {},
        (f"integer_{model.main}",),
        0.0,
        0.0,
        0.0,
        1.0,
    )


def _sizes(model: IntegerViT) -> dict[str, int]:
    """What the program has to know when it is compiled."""
    hidden = {len(block.fc1.weight) for block in model.blocks}  # type: ignore[union-attr, arg-type]
    heads = {len(block.attention.multiplier) for block in model.blocks}  # type: ignore[union-attr, arg-type]
    if len(hidden) > 1 or len(heads) > 1:
        raise ValueError(f"format 'c' needs blocks of one size; these have {hidden} hidden units and {heads} heads")
    tokens, width = model.constants.shape
    readouts = _readouts(model)
    first = readouts[0]
    return {
        "CHANNELS": len(model.pixel_start), "HEIGHT": model.size[0], "WIDTH": model.size[1],
        "PATCH_HEIGHT": model.patch[0], "PATCH_WIDTH": model.patch[1], "TOKENS": tokens, "SIZE": width,
        "HEADS": heads.pop(), "HIDDEN": hidden.pop(), "BLOCKS": len(model.blocks),
        "CLASSES": len(first.linear.weight), "DYNAMIC": int(model.bits == WIDE),
        "BEFORE": int(model.before is not None), "READOUTS": len(readouts), "RANGES": len(first.tokens),
        "NORM_FIRST": int(first.norm_first), "NORM_LAST": int(first.norm is not None and not first.norm_first),
    }  # fmt: skip


def _readouts(model: IntegerViT) -> list[Any]:
    """The readouts whose sum the program prints: Linear layers that read as many ranges of tokens in the same way."""
    found: list[Any] = [model.head.readouts[source] for source in model.head.outputs[model.main]]
    for readout in found:
        if not isinstance(readout, Readout) or readout.linear is None or readout.tokens is None:
            raise ValueError(
                f"format 'c' has a program for what a Linear layer makes of tokens or their mean; {model.main} of this "
                "model is something else; export it as ONNX"
            )
    kinds = {(len(r.tokens), r.norm is None, r.norm_first, r.read is None, len(r.linear.weight)) for r in found}
    if len(kinds) > 1:
        raise ValueError(f"format 'c' needs layers behind the blocks that read alike; those of {model.main} do not")
    return found


def _arrays(model: IntegerViT, sizes: dict[str, int], pixels: Tensor) -> Iterator[NDArray[Any]]:
    for size in sizes.values():
        yield _number(size)
    yield _array(model.constants, "<i4")
    yield from _linear(model.patches)
    if model.before is not None:
        yield from _norm(model.before)
    for block in model.blocks:
        parts: Any = block
        yield from _norm(parts.norm1)
        for role in (parts.query, parts.key, parts.value):
            yield from _linear(role)
        yield _array(parts.attention.multiplier, "<i4")
        yield _array(parts.attention.shift, "u1")
        yield from _result(parts.attention.output)
        yield from _linear(parts.output)
        yield from _norm(parts.norm2)
        yield from _linear(parts.fc1)
        yield _array(parts.activation.entries, "<i4")
        yield from _result(parts.activation.output)
        yield from _linear(parts.fc2)
    for readout in _readouts(model):
        if readout.norm is not None:
            yield from _norm(readout.norm)
        if readout.read is not None:
            yield from _result(readout.read)
        yield from _linear(readout.linear)
    yield _number(len(pixels))
    checks = zip(pixels, model.integer_logits(pixels))
    yield np.concatenate([part for x, y in checks for part in (_array(x, "u1"), _array(y, "<i4").view("u1"))])


def _linear(layer: IntegerLinear) -> Iterator[NDArray[Any]]:
    yield _array(layer.weight, "i1")
    yield from _requantize(layer.output)


def _norm(norm: IntegerNorm) -> Iterator[NDArray[Any]]:
    yield _array(norm.eps, "<i8")
    yield from _result(norm.output)


def _requantize(output: Requantize) -> Iterator[NDArray[Any]]:
    yield _array(output.multiplier, "<i4")
    yield _array(output.shift, "u1")
    yield _array(output.offset if output.offset is not None else 0 * output.multiplier, "<i8")


def _result(output: nn.Module) -> Iterator[NDArray[Any]]:
    if isinstance(output, Requantize):
        yield _number(len(output.multiplier))
        yield from _requantize(output)
        return
    requantize, spread = output.get_submodule("0"), output.get_submodule("1")
    assert isinstance(requantize, Requantize)
    assert isinstance(spread, Spread)
    yield _number(len(spread.columns))
    yield from _requantize(requantize)
    yield _number(spread.zero)
    yield _array(spread.columns, "<i4")
    yield _array(spread.added, "<i4")
    yield _array(spread.shift, "u1")


def _array(tensor: Tensor, kind: str) -> NDArray[Any]:
    """Entries in order, in so many bytes each."""
    flat = tensor.detach().cpu().reshape(-1).numpy()
    found: NDArray[Any] = flat.astype(kind)
    assert np.array_equal(found, flat), f"an array does not fit {kind}"
    return found


def _number(value: int) -> NDArray[Any]:
    return np.array([value], "<i4")


def _counted(array: NDArray[Any]) -> bytes:
    return np.array(len(array), "<u4").tobytes() + array.tobytes()


def _braces(value: Any) -> str:
    """Nested tuples of numbers in C."""
    return str(value) if isinstance(value, int) else f"{{{', '.join(map(_braces, value))}}}"


def _header(model: IntegerViT, sizes: dict[str, int], length: int) -> str:
    inputs = [module.weight.shape[1] for module in model.modules() if isinstance(module, IntegerLinear)]
    constants = {
        "READ_BITS": model.bits, "STREAM_BITS": normalization.STREAM_BITS, "ACTIVATION_BITS": piecewise.INPUT_BITS,
        "LOGIT_BITS": LOGIT_BITS, "NORM_BITS": normalization.UNIT_BITS, "MOST_INPUTS": max(*inputs, *sizes.values()),
        "MOST_MULTIPLIER": 1 << dyadic.MULTIPLIER_BITS, "MOST_SHIFT": dyadic.LARGEST_SHIFT,
        "SIGNED_SHIFT": rows.RECIPROCAL_SHIFT, "UNSIGNED_SHIFT": rows.UNSIGNED_SHIFT,
        "FRACTION": attention.FRACTION, "EXP_SQUARE": attention.SQUARE, "EXP_SLOPE": attention.SLOPE,
        "EXP_SMALLEST": attention.SMALLEST, "SCORE_LIMIT": attention.SCORE_LIMIT, "ROW_SHIFT": attention.ROW_SHIFT,
        "RECIPROCAL_SHIFT": attention.RECIPROCAL_SHIFT, "MEAN_FRACTION": attention.MEAN_FRACTION,
        "TABLE": piecewise.PIECES, "MOST_CHECKS": MOST_CHECKS,
    }  # fmt: skip
    values = [f"{start!r} + {step!r} * p" for start, step in zip(model.pixel_start.tolist(), model.pixel_step.tolist())]
    return "\n".join([
        "/* Sizes of one model and the constants of integer-only inference, beside the file with its numbers.",
        "   A logit is its integer / 2**LOGIT_EXPONENT. A byte p of a picture stands for, channel by channel:",
        *(f"       {value}" for value in values),
        "*/",
        f"#define FILE_VERSION {VERSION}",
        f"#define FILE_BYTES {length}",
        f"#define LOGIT_EXPONENT ({int(model.logit_exponent)})",
        *(f"#define {name} {value}" for name, value in sizes.items()),
        f"#define MODEL_SIZES {', '.join(sizes)}",
        f"#define READ_TOKENS {_braces(tuple(readout.tokens for readout in _readouts(model)))}",
        *(f"#define {name} {value}" for name, value in constants.items()),
        f"#define MOST_OFFSET ((int64_t)1 << {dyadic.LARGEST_SHIFT - 1})",
        "",
    ])  # fmt: skip
