"""What an integer-only model does when it runs: the proof that it is of integers, and the widths that these take."""

from __future__ import annotations

from pathlib import Path

from fairseq.cli.loading import load
from fairseq.cli.output import UserError, table
from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.quantization.evaluation.report import megabytes
from fairseq.quantization.integer_only.examination import Examination, examine
from fairseq.quantization.integer_only.model import IntegerViT


def read(path: Path) -> Examination:
    """Load and run the model in a folder or a .safetensors file.

    Raises:
        UserError: it is no integer-only model, an operation is one of floats, or an integer is past its width.
        FileNotFoundError, ValueError: there is no such thing, or it is damaged.
    """
    model = load(str(path)).model if path.is_dir() else _in_file(path)
    if not isinstance(model, IntegerViT):
        raise UserError(f"{path} is no integer-only model; quantize makes one with --arithmetic integer", code=1)
    try:
        return examine(model)
    except (RuntimeError, OverflowError) as error:  # FloatingOperation is the first
        raise UserError(f"{path}: {error}", code=1) from error


def _in_file(path: Path) -> object:
    """The model in a file; None if it is a packed one or a float one, which need more than the file."""
    from fairseq.cli import contents

    found = contents.read(path)
    return ViTQuantizer.load(path) if found is not None and found["arithmetic"] == "integer" else None


def text(found: Examination) -> str:
    """For people."""
    low, high = found.shifts
    lines = {
        "Operations": f"{found.operations:,} on {found.pictures} pictures of noise, none with a floating number",
        "Arithmetic": f"integer, {found.activations}, {found.functions} functions",
        "Weights": f"{found.layers} layers, {found.weights:,} bytes",
        "Requantize": f"{found.multipliers:,} multipliers of {found.multiplier_bits} bits at most, shifts from {low} "
        f"to {high}, offsets of {found.offset_bits} bits at most",
        "Outputs": ", ".join(f"{name}: integers / 2^{exponent}" for name, exponent in found.exponents.items()),
        "Memory": f"{megabytes(found.bytes)} of constants",
    }
    rows = [[name, f"{bits}", f"{used}"] for name, (bits, used) in found.widths.items()]
    said = "\n".join(f"{name + ':':<13}{line}" for name, line in lines.items())
    return f"{said}\n\n{table(['intermediate', 'bits', 'used'], rows)}"
