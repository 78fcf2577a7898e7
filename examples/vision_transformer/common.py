"""What the scripts share: finding a model, reading pictures, measuring accuracy and time, and short error messages."""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import time
import zipfile
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from fairseq.cli.loading import hub_problem
from fairseq.cli.machine import processor_name
from fairseq.cli.output import UserError, first_line, table
from fairseq.cli.pictures import Reader, batches, labelled_images, pictures_in, read_image
from fairseq.models.vit_quantization import ViTQuantizer

__all__ = [
    "CONFIGURATIONS", "DEFAULT_MODEL", "EMBEDDED", "PROC", "SAMPLE_IMAGE", "Loaded", "UserError", "batches",
    "embedded_images", "first_line", "hub_problem", "labelled_images", "load_embedded", "load_model",
    "logits", "memory", "milliseconds_per_image", "parse_configuration", "pictures_in", "positive", "processor_name",
    "quantize", "read_image", "run", "table",
]  # fmt: skip

HERE = Path(__file__).resolve().parent
EMBEDDED = HERE / "cifar10-vit"
TEST_IMAGES = HERE / "assets" / "cifar10_test_500.zip"
SAMPLE_IMAGE = HERE / "assets" / "chelsea.jpg"
DEFAULT_MODEL = "google/vit-base-patch16-224"

PROC = Path("/proc/self/status")

CONFIGURATIONS = [(bits, method) for bits in (8, 4) for method in ("tensor", "channel", "histogram")]


def run(main: Callable[[], int]) -> None:
    """Call ``main`` and exit with its code; a :class:`UserError` becomes one line and exit code 2."""
    try:
        code = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 130
    sys.exit(code)


class Loaded(NamedTuple):
    """A float model in eval mode, its image processor, and what it is called."""

    model: nn.Module
    processor: Any
    name: str


def load_model(source: str | None, any_kind: bool = False) -> Loaded:
    """Load a classifier from a hub id or a folder; by default ViT-Base if it can be had, else the embedded model.

    With ``any_kind`` what is no classifier by its config is loaded as a model without classes.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if source is not None:
        if not Path(source).is_dir():
            if Path(source).exists() or source.count("/") > 1 or source.startswith((".", "/", "~")):
                raise UserError(f"--model {source}: no such folder")
            reason = hub_problem(source)
            if reason:
                raise UserError(f"--model {source}: no such folder, and as a hub id it cannot be loaded: {reason}")
        return _from_pretrained(source, source, any_kind)
    reason = hub_problem(DEFAULT_MODEL)
    if reason is None:
        try:
            return _from_pretrained(DEFAULT_MODEL, DEFAULT_MODEL)
        except UserError as error:
            reason = str(error)
    print(f"{DEFAULT_MODEL} cannot be loaded ({reason}).")
    print("Using the embedded model instead: a small ViT trained on CIFAR-10 (10 classes, 32x32 pixels).\n")
    return load_embedded()


def load_embedded() -> Loaded:
    """The small ViT that ships with the examples, trained on CIFAR-10."""
    return _from_pretrained(str(EMBEDDED), "the embedded CIFAR-10 ViT")


def _from_pretrained(source: str, name: str, any_kind: bool = False) -> Loaded:
    kind = "image classifier"
    try:
        loader = AutoModelForImageClassification
        if any_kind and not _is_classifier(AutoConfig.from_pretrained(source)):
            loader, kind = AutoModel, "model"
        model, loading = loader.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
        processor = AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"cannot load the model {source}: {first_line(error)}") from error
    if loading["missing_keys"]:
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise UserError(f"{source} is not a whole {kind}: it has no weights for {missing}")
    return Loaded(model.eval(), processor, name)


def _is_classifier(config: Any) -> bool:
    """Whether a model was saved as an image classifier; without a word of it, it counts as one."""
    names = getattr(config, "architectures", None) or ["ForImageClassification"]
    return any("ForImageClassification" in name for name in names)


def quantize(quantizer: ViTQuantizer, model: nn.Module, **keywords: Any) -> nn.Module:
    """``quantizer.quantize_model``, its refusal of a model being a mistake of the person at the keyboard."""
    try:
        return quantizer.quantize_model(model, **keywords)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error


def embedded_images() -> tuple[list[Reader], list[str]]:
    """The 500 CIFAR-10 test pictures, each as a function that decodes it, and their class names."""
    archive = zipfile.ZipFile(TEST_IMAGES)
    names = archive.namelist()
    return [functools.partial(_read_from, archive, name) for name in names], [n.split("/")[0] for n in names]


def _read_from(archive: zipfile.ZipFile, name: str) -> Image.Image:
    with archive.open(name) as opened:
        return read_image(opened, name)


@torch.inference_mode()
def logits(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, classes) on the CPU, float32."""
    device = next(chain(model.parameters(), model.buffers())).device
    return model(pixel_values=pixel_values.to(device)).logits.float().cpu()


def milliseconds_per_image(models: dict[str, nn.Module], pixel_values: Tensor, turns: int = 9) -> dict[str, float]:
    """Median time of one forward of one picture; the models take turns, so that a drifting machine slows all alike."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(turns + 2):
        for name, model in models.items():
            started = time.perf_counter()
            logits(model, pixel_values[:1])
            if turn >= 2:  # the first two warm up
                times[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


def memory() -> dict[str, int]:
    """What this process holds and the most it ever held, in bytes; Linux only, where there is ``PROC``."""
    lines = dict(line.split(":", 1) for line in PROC.read_text().splitlines() if ":" in line)
    return {key: 1024 * int(lines[field].split()[0]) for key, field in (("resident", "VmRSS"), ("peak", "VmHWM"))}


def parse_configuration(text: str) -> tuple[int, str]:
    """ "4:histogram" -> (4, "histogram"), for argparse."""
    bits, _, method = text.partition(":")
    if not bits.isdecimal() or (int(bits), method) not in {(b, m) for b in range(2, 9) for _, m in CONFIGURATIONS}:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not BITS:METHOD, such as 4:histogram (2 to 8 bits; tensor, channel, histogram)"
        )
    return int(bits), method


def positive(text: str) -> int:
    """An int of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
