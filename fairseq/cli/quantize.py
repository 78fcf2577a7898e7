"""``fairseq-vit quantize``: a float model in, a folder that from_pretrained loads out."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from fairseq.cli.distributed import processes_together, speaks
from fairseq.cli.options import (
    ActivationBits,
    Device,
    Exclude,
    Force,
    GroupSize,
    Json,
    Method,
    Model,
    Overrides,
    Quiet,
    Symmetric,
    parse_bias_correction,
    parse_images,
    parse_overrides,
)
from fairseq.cli.output import Say, UserError, finish, mistakes, with_examples, working
from fairseq.cli.saving import check_output, whole_folder


@with_examples(
    "quantize google/vit-base-patch16-224 -o vit-int8",
    "quantize ./vit --bits 4 --method channel --calibration pictures --images 128 -o vit-int4",
    "quantize ./vit --average-bits 4.5 --calibration pictures --exclude '*classifier' -o vit-mixed",
)
def quantize(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="The folder to write.")],
    arithmetic: Annotated[
        str,
        typer.Option(
            metavar="float|integer", help="integer: integers alone (docs/integer_only.rst); needs --calibration."
        ),
    ] = "float",
    functions: Annotated[
        str, typer.Option(metavar="default|ibert|ivit", help="GELU and softmax of integers alone; others err more.")
    ] = "default",
    bits: Annotated[int | None, typer.Option(help="Width of the integers, 2 to 8.  [default: 8]")] = None,
    method: Method = "tensor",
    p: Annotated[float, typer.Option("--p", help="Share of the layers that is quantized.")] = 1.0,
    activations: Annotated[
        str, typer.Option(metavar="dynamic|static|none", help="How inputs are rounded; static needs --calibration.")
    ] = "dynamic",
    activation_bits: ActivationBits = 8,
    group_size: GroupSize = None,
    symmetric: Symmetric = False,
    rounding: Annotated[
        str,
        typer.Option(
            metavar="auto|nearest|gptq|gptaq|qronos|coordinate",
            help="auto: with --calibration coordinate up to 4 bits, gptaq above and for tensor; else nearest.",
        ),
    ] = "auto",
    equalize: Annotated[bool, typer.Option("--equalize/--no-equalize", help="Even out input channels first.")] = True,
    rotate: Annotated[bool, typer.Option("--rotate", help="Turn the hidden states first: ViT and DeiT.")] = False,
    bias_correction: Annotated[
        str, typer.Option(metavar="no|yes|add", help="Take the mean output error off biases; add: make them for it.")
    ] = "no",
    attention: Annotated[bool, typer.Option("--attention/--no-attention", help="Attention projections.")] = True,
    mlp: Annotated[bool, typer.Option("--mlp/--no-mlp", help="Layers of the MLPs.")] = True,
    classifier: Annotated[bool, typer.Option("--classifier/--no-classifier", help="Classifier or pooler.")] = True,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Also patch and position embeddings.")] = False,
    towers: Annotated[
        str, typer.Option(metavar="vision|text|all", help="Which towers of a model that reads text, too.")
    ] = "vision",
    seed: Annotated[int, typer.Option(help="Chooses the layers of --p, and the pictures.")] = 0,
    override: Overrides = None,
    exclude: Exclude = None,
    average_bits: Annotated[
        float | None, typer.Option(help="Widths layer by layer, this many per weight; needs --calibration.")
    ] = None,
    max_bytes: Annotated[
        int | None, typer.Option(help="Likewise, for so many bytes of weights as they are saved.")
    ] = None,
    max_milliseconds: Annotated[
        float | None, typer.Option(help="Likewise, for so long on one picture, measured on this machine.")
    ] = None,
    max_accuracy_drop: Annotated[
        float | None, typer.Option(help="Likewise, as small as it gets while at most so many % change their class.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Pictures like those that the model will see, no labels.")
    ] = None,
    images: Annotated[str, typer.Option(metavar="N|all", help="How many of them are used.")] = "128",
    augment: Annotated[
        int, typer.Option(min=1, help="Views of each picture: itself, and random crops, half of them flipped.")
    ] = 1,
    reconstruct: Annotated[
        bool, typer.Option("--reconstruct", help="Learn each block's integers on the pictures: minutes to hours.")
    ] = False,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the pictures with --reconstruct.  [default: 10]")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Instead of --epochs: as many as fit into so many minutes.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep finished blocks here, and go on if it was interrupted.")
    ] = None,
    engine: Annotated[
        str, typer.Option(metavar="auto|fused|layers", help="fused: an error if no encoder block can be fused.")
    ] = "auto",
    force: Force = False,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Quantize MODEL and save it in the folder OUT, with its image processor.

    OUT appears when all is written; after an error or Ctrl-C there is nothing.
    """
    limits = {
        "average_bits": average_bits, "max_bytes": max_bytes, "max_milliseconds": max_milliseconds,
        "max_accuracy_drop": max_accuracy_drop,
    }  # fmt: skip
    budget: dict[str, Any] = {name: limit for name, limit in limits.items() if limit is not None}
    named = [f"--{name.replace('_', '-')}" for name in budget]
    if len(named) > 1 or (named and bits is not None):
        raise UserError(" and ".join(["--bits"] * (bits is not None) + named) + " exclude each other")
    if budget.keys() & {"max_bytes", "max_milliseconds"} and (arithmetic != "float" or engine == "layers"):
        raise UserError(f"{named[0]} is of --arithmetic float and fused blocks; here it would be of another model")
    if named and calibration is None:
        raise UserError(f"{named[0]} needs --calibration: widths follow from what rounding does to pictures")
    settings = {
        "bits": 8 if bits is None else bits, "method": method, "p": p, "activation_bits": activation_bits,
        "activations": None if activations == "none" else activations, "group_size": group_size, "seed": seed,
        "arithmetic": arithmetic, "functions": functions, "symmetric": symmetric, "rounding": rounding,
        "equalize": equalize, "rotate": rotate,
        "bias_correction": parse_bias_correction(bias_correction), "quantize_attention": attention, "quantize_mlp": mlp,
        "towers": towers, "quantize_classifier": classifier, "quantize_embeddings": embeddings,
        "overrides": parse_overrides(override or ()), "exclude": exclude or (),
    }  # fmt: skip
    if calibration is not None and not calibration.is_dir():
        raise UserError(f"--calibration {calibration}: no such folder")
    count = parse_images(images)
    if augment != 1 and calibration is None:
        raise UserError("--augment needs --calibration")
    if not reconstruct and (epochs, minutes) != (None, None):
        raise UserError("--epochs and --minutes are for --reconstruct")
    if epochs is not None and minutes is not None:
        raise UserError("--epochs and --minutes exclude each other")
    if speaks():
        check_output(output, model, force)
    with working(quiet or not speaks()) as say, processes_together(device):
        pictures = {"calibration": calibration, "images": count, "augment": augment}
        learning = (epochs, minutes) if reconstruct else None
        result, text = _quantize(model, output, settings, pictures, budget, engine, resume, learning, device, say)
    return finish(result, text, as_json) if speaks() else 0


def _quantize(
    source: str,
    output: Path,
    settings: dict[str, Any],
    pictures: dict[str, Any],
    budget: dict[str, Any],
    engine: str,
    resume: Path | None,
    learning: tuple[int | None, float | None] | None,
    device: str,
    say: Say,
) -> tuple[dict[str, Any], str]:
    from fairseq.cli.loading import load, needs_processor, tokenizer_of
    from fairseq.models.vit_quantization import Reconstruction, ViTQuantizer

    calibration = pictures["calibration"]
    reconstruct: bool | Reconstruction = learning is not None
    with mistakes(TypeError, ValueError):
        quantizer = ViTQuantizer(**settings)
        if learning is not None and learning != (None, None):
            epochs, minutes = learning
            reconstruct = Reconstruction(minutes=minutes) if epochs is None else Reconstruction(epochs=epochs)
    say(f"Loading {source}")
    loaded = load(source, device)
    given: dict[str, Any] = {}
    if calibration is not None:
        given = {**pictures, "processor": needs_processor(loaded, "--calibration")}
    if budget:
        say("Choosing widths: " + "".join(f"{name.replace('_', ' ')} {limit:,}" for name, limit in budget.items()))
        with mistakes():
            assigner = ViTQuantizer(**{**settings, "arithmetic": "float", "functions": "default"})  # what it measures
            shown = {name: value for name, value in given.items() if name != "augment"}
            chosen = assigner.assign_bits(loaded.model, **shown, **budget).overrides
            quantizer = ViTQuantizer(**{**settings, "overrides": chosen})
    say(f"Quantizing {type(loaded.model).__name__}" + (f" with pictures in {calibration}" if calibration else ""))
    started = time.perf_counter()
    with mistakes(ValueError, OSError, *([RuntimeError] if engine == "fused" else [])):
        quantized: Any = quantizer.quantize_model(
            loaded.model, **given, engine=engine, reconstruct=reconstruct, resume=resume
        )
    seconds = time.perf_counter() - started
    report = quantizer.report
    assert report is not None
    if not report.quantized:
        raise UserError("no layer was quantized, so there is nothing to save: see --p", code=1)
    if not speaks():
        return {}, ""
    say(f"Saving {output}")
    with whole_folder(output) as folder:
        quantized.save_pretrained(folder)
        for extra in (loaded.processor, tokenizer_of(loaded)):
            if extra is not None:
                extra.save_pretrained(folder)
    if loaded.processor is None:
        say(f"warning: {source} has no image processor, so {output} has none either")
    on_disk = sum(file.stat().st_size for file in output.glob("model*.safetensors"))
    sizes = {"float": report.bytes_before, "quantized": report.bytes_after, "on_disk": on_disk}
    result = {
        "path": str(output), "model": source, "architecture": type(quantized).__name__, "sizes": sizes,
        "quantized": len(report.quantized), "skipped": len(report.skipped), "fused_blocks": report.fused_blocks,
        "calibration_images": quantized.quantization_information.get("calibration_images"), "seconds": seconds,
        "layers": [asdict(layer) for layer in report.layers],
    }  # fmt: skip
    return result, f"{report}\nSaved {output}, {on_disk / 1e6:.1f} MB of weights"
