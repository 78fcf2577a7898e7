"""``fairseq-vit pareto``: how well a model keeps its classes at many sizes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fairseq.cli.options import (
    ActivationBits,
    Device,
    Exclude,
    GroupSize,
    Json,
    Method,
    Model,
    Overrides,
    Quiet,
    Symmetric,
    parse_images,
    parse_overrides,
)
from fairseq.cli.output import UserError, finish, mistakes, with_examples, working


@with_examples(
    "pareto google/vit-base-patch16-224 --calibration pictures --save sizes.json --plot sizes.png",
    "pareto ./vit --calibration pictures --images all --activations none --average-bits 3,4,5",
)
def pareto(
    model: Model,
    calibration: Annotated[
        Path, typer.Option(metavar="DIR", help="Pictures like those that the model will see, no labels.")
    ],
    images: Annotated[str, typer.Option(metavar="N|all", help="How many of them; every fourth one judges.")] = "128",
    average_bits: Annotated[
        str | None,
        typer.Option(metavar="B,B,...", help="Of mixed widths.  [default: 2.5,3,3.5,4,4.5,5,6 where possible]"),
    ] = None,
    method: Method = "channel",
    group_size: GroupSize = None,
    symmetric: Symmetric = False,
    activations: Annotated[
        str, typer.Option(metavar="dynamic|static|none", help="How inputs are rounded.")
    ] = "dynamic",
    activation_bits: ActivationBits = 8,
    override: Overrides = None,
    exclude: Exclude = None,
    save: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw it: .png, .svg or .pdf.")] = None,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Quantize MODEL to many sizes, with one width for all layers and with mixed ones, and compare each with the float
    model on pictures that were not calibrated on."""
    if not calibration.is_dir():
        raise UserError(f"--calibration {calibration}: no such folder")
    count = parse_images(images)
    try:
        averages = None if average_bits is None else [float(part) for part in average_bits.split(",")]
    except ValueError:
        raise UserError(f"--average-bits {average_bits}: must be numbers with commas, such as 3,4,5") from None
    for file in filter(None, (save, plot)):
        if not file.parent.is_dir():
            raise UserError(f"{file}: the folder {file.parent} does not exist")
    with working(quiet) as say:
        from fairseq.cli.loading import load, needs_processor
        from fairseq.models.vit_quantization import ViTQuantizer
        from fairseq.quantization.bit_allocation.pareto_plot import check_format

        if plot is not None:
            with mistakes(ImportError, ValueError):
                check_format(plot)
        with mistakes(TypeError, ValueError):
            quantizer = ViTQuantizer(
                method=method, group_size=group_size, symmetric=symmetric, activation_bits=activation_bits,
                activations=None if activations == "none" else activations,
                overrides=parse_overrides(override or ()), exclude=exclude or (),
            )  # fmt: skip
        say(f"Loading {model}")
        loaded = load(model, device)
        processor = needs_processor(loaded, "--calibration")
        say(f"Quantizing {type(loaded.model).__name__} to many sizes")
        with mistakes(TypeError, ValueError):
            found = quantizer.pareto(loaded.model, calibration, processor, count, average_bits=averages)
        with mistakes(ImportError, OSError, ValueError):
            if save is not None:
                found.save(save)
            if plot is not None:
                found.plot(plot)
    return finish(asdict(found), str(found), as_json)
