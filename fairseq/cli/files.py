"""``fairseq-vit export`` and ``inspect``: files for other runtimes, and what is inside a saved one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fairseq.cli.options import Json, Quiet
from fairseq.cli.output import UserError, finish, mistakes, with_examples, working

FORMATS = {".onnx": "onnx", ".xml": "openvino", ".pt": "torchscript", ".pt2": "torch_export", ".bin": "c"}


@with_examples(
    "export vit-int8 vit-int8.onnx --ops standard --external-data",
    "export vit-int8 vit-int8.xml --format openvino --free-size",
    "export vit-integer model.bin",
)
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder that quantize wrote, or a hub id of one.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The file; its suffix tells the format.")],
    format: Annotated[
        str | None,
        typer.Option(
            metavar="onnx|openvino|torchscript|torch_export|c", help="By default from .onnx, .xml, .pt, .pt2 or .bin."
        ),
    ] = None,
    ops: Annotated[
        str, typer.Option(metavar="onnxruntime|standard", help="standard: operators of ONNX alone.")
    ] = "onnxruntime",
    external_data: Annotated[
        bool, typer.Option("--external-data", help="Keep the weights of an ONNX file in a second one.")
    ] = False,
    pixels: Annotated[
        str | None,
        typer.Option(
            metavar="uint8|float32",
            help="What the file of an integer-only model takes: pixels, or values to round first.  [default: uint8]",
        ),
    ] = None,
    free_size: Annotated[
        bool, typer.Option("--free-size", help="Take pictures of any height and width, in whole patches.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Write a quantized model as a file that runs without this library.

    The file is run in a process of its own and compared with the model before it appears; all but .bin, which is
    for the C program of the examples, and has pictures for that to be compared on.
    """
    form = format or FORMATS.get(output.suffix)
    if form is None:
        raise UserError(f"{output}: its name must end in {', '.join(FORMATS)}, or --format must say what it is")
    with working(quiet) as say:
        from fairseq.cli.loading import load
        from fairseq.models.vit_quantization import ViTQuantizer

        say(f"Loading {model}")
        loaded = load(model)
        if not loaded.packed:
            raise UserError(f"{model} is not quantized; quantize it first: fairseq-vit quantize {model} -o OUT")
        say(f"Exporting {output}" + (", and verifying it in another process" if form != "c" else ""))
        with mistakes(ValueError, OSError, ImportError):
            report = ViTQuantizer.export(
                loaded.model, output, form,
                external_data=external_data or None, onnx_ops=ops, pixels=pixels, free_size=free_size,
            )  # fmt: skip
    return finish({"model": model, **report.to_dict()}, str(report), as_json)


@with_examples(
    "inspect vit-int4 --layers",
    "inspect vit-int4/model.safetensors --verify --json",
    "inspect vit-integer --integer",
)
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A saved folder, or a .safetensors file.")],
    layers: Annotated[bool, typer.Option("--layers", help="List every layer.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read the weights, too, and compare checksums.")] = False,
    integer: Annotated[
        bool, typer.Option("--integer", help="Run an integer-only model, and see that no operation is one of floats.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Tell what is inside a saved model, from its headers and config.json, without loading weights.

    With --integer the model is loaded and run on noise. Exit code 1: it is not quantized; with --integer, it is no
    integer-only model, an operation has a floating number, or an integer is past its width.
    """
    if integer:
        with working(quiet) as say, mistakes():
            from fairseq.cli import integers

            say(f"Running {path} on noise")
            examined = integers.read(path)
        return finish({"path": str(path), **examined.to_dict()}, integers.text(examined), as_json)
    with working(quiet), mistakes():
        from fairseq.cli import contents

        result = contents.read(path, verify)
    if result is None:
        return finish({"path": str(path), "quantized": False}, f"{path} is not quantized", as_json, 1)
    return finish(result, contents.text(result, layers), as_json)
