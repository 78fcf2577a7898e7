"""``fairseq-vit distill``: train a quantized model towards its float one on unlabelled pictures."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
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
    parse_overrides,
)
from fairseq.cli.output import Say, UserError, finish, mistakes, with_examples, working
from fairseq.cli.saving import check_output, whole_folder
from fairseq.quantization.json_files import read_json

RUN = "run.json"


@with_examples(
    "distill google/vit-base-patch16-224 --images pictures --bits 3 --epochs 1 -o vit-int3",
    "distill ./vit --teacher ./larger-vit --images pictures --bits 4 --activation-bits 4 --features 0 -o vit-w4a4",
    "distill ./vit --images pictures --bits 3 -o vit-int3 --resume",
)
def distill(
    model: Model,
    images: Annotated[
        Path, typer.Option(metavar="DIR", help="Pictures like those that the model will see, no labels.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="The folder to write.")],
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A local folder or a hub id.  [default: MODEL]")
    ] = None,
    bits: Annotated[int, typer.Option(help="Width of the integers, 2 to 8.")] = 4,
    method: Method = "channel",
    group_size: GroupSize = None,
    symmetric: Symmetric = False,
    activations: Annotated[
        str, typer.Option(metavar="dynamic|static|none", help="How inputs are rounded.")
    ] = "dynamic",
    activation_bits: ActivationBits = 8,
    override: Overrides = None,
    exclude: Exclude = None,
    calibration: Annotated[int, typer.Option(min=1, help="How many pictures it is quantized on, first.")] = 128,
    epochs: Annotated[float, typer.Option(min=0, help="How often each picture is seen.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures in a step, of each process.")] = 32,
    learning_rate: Annotated[float, typer.Option(min=0, help="Of weights, biases and norms.")] = 1e-4,
    scale_learning_rate: Annotated[float, typer.Option(min=0, help="Of scales, as a share of them.")] = 1e-3,
    outputs: Annotated[float, typer.Option(min=0, help="Weight of the loss of logits or embeddings.")] = 1.0,
    features: Annotated[float, typer.Option(min=0, help="Weight of the loss of hidden states.")] = 1.0,
    attention: Annotated[float, typer.Option(min=0, help="Weight of the loss of attention.")] = 0.0,
    temperature: Annotated[float, typer.Option(min=0, help="Of logits.")] = 1.0,
    augment: Annotated[bool, typer.Option("--augment", help="Random crops and flips.")] = False,
    held_back: Annotated[
        int, typer.Option(min=0, metavar="N", help="Pictures used for nothing but to undo what does not help them.")
    ] = 0,
    bf16: Annotated[bool, typer.Option("--bf16", help="Products in bfloat16 while it is trained.")] = False,
    save_every: Annotated[
        int | None, typer.Option(min=1, metavar="STEPS", help="Between checkpoints.  [default: an epoch]")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from OUT.checkpoints.")] = False,
    seed: Annotated[int, typer.Option(help="Of the order of pictures, crops and flips.")] = 0,
    force: Force = False,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Quantize MODEL, train it towards TEACHER on pictures without labels, and save it packed in the folder OUT.

    Checkpoints are in OUT.checkpoints until OUT is written; --resume goes on from the last one. OUT appears when all is
    written. Several processes share the pictures: torchrun --nproc-per-node 2 -m fairseq.cli distill ...
    """
    settings = {
        "bits": bits, "method": method, "group_size": group_size, "symmetric": symmetric, "seed": seed,
        "activations": None if activations == "none" else activations, "activation_bits": activation_bits,
        "overrides": parse_overrides(override or ()), "exclude": list(exclude or ()), "execution": "emulated",
    }  # fmt: skip
    losses = {"outputs": outputs, "features": features, "attention": attention, "temperature": temperature}
    training = {
        "epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate, "augment": augment, "bf16": bf16,
        "scale_learning_rate": scale_learning_rate, "held_back": held_back, "seed": seed,
    }  # fmt: skip
    run = {
        "model": model, "teacher": teacher or model, "images": str(images), "calibration": calibration,
        "processes": int(os.environ.get("WORLD_SIZE", "1")), "quantization": settings, "losses": losses,
        "training": training,
    }  # fmt: skip
    if held_back:  # what an earlier version calls the same run was calibrated on them
        run["held_back_is_calibrated"] = False
    main = speaks()
    with working(quiet or not main) as say, processes_together(device):
        checkpoints = output.with_name(f"{output.name}.checkpoints")
        if main:
            check_output(output, model, force)
            _begin(checkpoints, run, resume)
        try:
            result, text = _distill(run, images, output, checkpoints, save_every, device, main, say)
        finally:
            if main and not any(checkpoints.glob("checkpoint-*")):  # nothing to go on from
                shutil.rmtree(checkpoints, ignore_errors=True)
    return finish(result, text, as_json) if main else 0


def _begin(folder: Path, run: dict[str, Any], resume: bool) -> None:
    """Make the folder of checkpoints, or see that it holds those of the same run."""
    file = folder / RUN
    if resume and file.is_file():
        with mistakes(OSError, ValueError, prefix=f"--resume: {file}: "):
            before = read_json(file)
        for name, old, new in _differences(before, json.loads(json.dumps(run))):
            raise UserError(f"--resume: the run in {folder} has {name} {old!r}, and this one {new!r}")
    elif any(folder.glob("checkpoint-*")):
        raise UserError(f"{folder}: holds the checkpoints of another run; --resume goes on with it, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")


def _differences(before: Any, now: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """Where two runs differ: name, value before, value now."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys((*before, *now))
        return [d for key in keys for d in _differences(before.get(key), now.get(key), key)]
    return [] if before == now else [(name, before, now)]


class _Read(Sequence[Any]):
    """Pictures that are decoded when they are asked for."""

    def __init__(self, readers: Sequence[Any]):
        self.readers = readers

    def __len__(self) -> int:
        return len(self.readers)

    def __getitem__(self, index: Any) -> Any:
        return self.readers[index]()


def _distill(
    run: dict[str, Any],
    images: Path,
    output: Path,
    checkpoints: Path,
    save_every: int | None,
    device: str,
    main: bool,
    say: Say,
) -> tuple[dict[str, Any], str]:
    from fairseq.cli.loading import load, needs_processor
    from fairseq.cli.pictures import pictures_in
    from fairseq.models.vit_quantization import ViTQuantizer
    from fairseq.quantization.training.distill import distill as train
    from fairseq.quantization.training.losses import Losses
    from fairseq.quantization.training.pictures import hold_back
    from fairseq.quantization.training.progress import Progress

    with mistakes(TypeError, ValueError):
        quantizer, losses = ViTQuantizer(**run["quantization"]), Losses(**run["losses"])
    readers = pictures_in(images)
    with mistakes(ValueError):
        parts = hold_back(len(readers), run["training"]["held_back"], run["training"]["seed"])
    rest, held = (_Read([readers[i] for i in part]) for part in parts)
    say(f"Loading {run['model']}")
    loaded = load(run["model"], device)
    teacher = loaded if run["teacher"] == run["model"] else load(run["teacher"], device)
    processor = needs_processor(loaded, "--images")
    say(f"Quantizing {type(loaded.model).__name__} with pictures in {images}")
    with mistakes():
        student: Any = quantizer.quantize_model(loaded.model, rest, processor, run["calibration"])
    told: list[Progress] = []

    def tell(progress: Progress) -> None:
        told.append(progress)
        say(str(progress))

    say(f"Training on {len(rest)} pictures")
    started = time.perf_counter()
    steps: dict[str, Any] = {} if save_every is None else {"save_strategy": "steps", "save_steps": save_every}
    with mistakes(ImportError, TypeError, ValueError):
        train(
            student, teacher.model, rest, processor, losses=losses, output_dir=checkpoints, resume=True, progress=tell,
            **steps, **run["training"] | {"held_back": held if held else 0},
        )  # fmt: skip
    seconds = time.perf_counter() - started
    if not main:
        return {}, ""
    packed: Any = ViTQuantizer.pack_model(student.cpu())
    say(f"Saving {output}")
    with whole_folder(output) as folder:
        packed.save_pretrained(folder)
        processor.save_pretrained(folder)
    shutil.rmtree(checkpoints, ignore_errors=True)
    on_disk = sum(file.stat().st_size for file in output.glob("model*.safetensors"))
    result = {
        "path": str(output), **run, "pictures": len(readers), "seconds": seconds, "on_disk": on_disk,
        "steps": told[-1].steps if told else 0, "losses_first": dict(told[0].losses) if told else {},
        "losses_last": dict(told[-1].losses) if told else {},
    }  # fmt: skip
    text = f"Trained on {len(rest)} pictures, {result['steps']} steps in {seconds:.0f} s"
    return result, f"{text}\nSaved {output}, {on_disk / 1e6:.1f} MB of weights"
