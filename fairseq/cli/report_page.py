"""The measurements behind ``report``, as a :class:`~fairseq.quantization.evaluation.page.Page`."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import fairseq
from fairseq.cli.loading import Loaded, load, needs_processor
from fairseq.cli.machine import processor_name
from fairseq.cli.measure import PAUSE, seconds
from fairseq.cli.output import Say, UserError, mistakes
from fairseq.cli.pictures import all_pixels, pictures_in
from fairseq.models.vit_quantization import compare_outputs
from fairseq.quantization.architectures.families import component_of, kept_reason, tower_of
from fairseq.quantization.architectures.forward import call
from fairseq.quantization.architectures.layers import block_of, linear_layers
from fairseq.quantization.architectures.recognition import family_of
from fairseq.quantization.architectures.separate import separated
from fairseq.quantization.conversion.convert import bytes_of
from fairseq.quantization.evaluation.alone import errors_alone
from fairseq.quantization.evaluation.compare import moved
from fairseq.quantization.evaluation.layer_report import LayerReport
from fairseq.quantization.evaluation.outputs import OutputComparison, least_kept
from fairseq.quantization.evaluation.page import Change, Page, summary
from fairseq.quantization.evaluation.page_pictures import (
    Point,
    as_colours,
    hidden_states,
    last_block,
    scatter,
    thumbnail,
)
from fairseq.quantization.evaluation.report import QuantizationReport

FIRST = 5
"""So many classes of a picture are shown."""
SHOWN, MAPS, ALONE = 24, 4, 16
"""How many pictures whose class changed, maps of hidden states, and pictures to measure blocks on, there are."""
CLASSES = "the classes"
LEFT_OUT = "left in float when it was quantized"


def make(
    original: str, names: list[str], folder: Path, count: int, batch_size: int, rounds: int, command: str, say: Say
) -> Page:
    """Measure the first of the quantized models called ``names``, and the others for the scatter plot.

    ``command`` is what was typed.

    Raises:
        UserError: a model cannot be loaded or is not packed, or the pictures cannot be read.
    """
    say(f"Loading {original} and {', '.join(names)}")
    reference, *others = (load(name) for name in (original, *names))
    for each in others:
        if not each.packed:
            raise UserError(f"nothing in {each.name} is packed; pass a folder that quantize wrote")
    ours = others[0]
    readers = pictures_in(folder)[:count]
    processor = needs_processor(reference, "--images")
    with mistakes():
        pictures = [read() for read in readers]
        pixels = all_pixels(
            [functools.partial(Image.Image.copy, picture) for picture in pictures], processor, batch_size
        )
        say(f"Comparing on {len(pixels)} pictures")
        rows = {each.name: compare_outputs(reference.model, each.model, pixels, batch_size) for each in others}
        say("Running each block by itself")
        alone = errors_alone(reference.model, ours.model, pixels[:ALONE])
        maps = _maps(reference.model, ours.model, pixels[:MAPS], pictures)
        names = [str(Path(reader.args[1]).relative_to(folder)) for reader in readers]  # type: ignore[attr-defined]
        changes, changed = _changes(reference.model, ours.model, pixels, pictures, names, batch_size)
    say("Timing one picture, in turns")
    times = _times([reference, *others], pixels[:1], rounds)
    report = _report(reference.model, ours.model)
    sizes = {each.name: bytes_of(each.model) for each in (reference, *others)}
    kept = {name: least_kept(found) for name, found in rows.items()}
    what = _what(rows[ours.name])
    milliseconds = {name: 1000 * statistics.median(taken) for name, taken in times.items()}
    points = [Point(_short(reference.name), sizes[reference.name] / 1e6, 1.0, milliseconds[reference.name])]
    points += [Point(_short(name), sizes[name] / 1e6, kept[name], milliseconds[name]) for name in kept]
    ratio = statistics.median(a / b for a, b in zip(times[reference.name], times[ours.name], strict=True))
    threads = torch.get_num_threads()
    versions = {"fairseq": fairseq.__version__} | {name: metadata.version(name) for name in ("torch", "transformers")}
    with mistakes(ImportError):
        plot = scatter(points, what)
    return Page(
        title=f"{_short(ours.name)}, quantized from {_short(original)}",
        summary=summary(
            f"{kept[ours.name]:.1%} of {what} of {len(pixels)} pictures", sizes[ours.name] / sizes[reference.name],
            ratio, f"here (one picture, {threads} thread{'s'[: threads > 1]})", alone,
        ),
        figures=[
            ("kept" if what == CLASSES else f"kept of {what}", f"{kept[ours.name]:.1%}"),
            ("memory", f"{sizes[ours.name] / 1e6:.1f} MB of {sizes[reference.name] / 1e6:.1f}"),
            ("one picture", f"{milliseconds[ours.name]:.1f} ms of {milliseconds[reference.name]:.1f}"),
            ("bits per weight", f"{_average(report.quantized):.2f}"),
        ],
        layers=report.layers,
        shares=[report.share(layer) for layer in report.layers],
        alone=alone,
        outputs=[(r.output, f"{r.relative_error:.3g}", r.measure, f"{r.value:.4f}") for r in rows[ours.name]],
        pictures=len(pixels),
        changes=changes,
        changed=changed,
        maps=maps,
        scatter=plot,
        others=[
            (p.name, f"{p.megabytes:.1f} MB", f"{p.kept:.1%}", f"{p.milliseconds:.1f} ms") for p in points
        ],
        kept_in_float=report.kept_in_float,
        facts=[
            ("command", command), ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
            ("processor", processor_name()), ("threads", str(threads)),
        ],
    )  # fmt: skip


def _times(models: list[Loaded], pixels: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of each forward, by the model's name, all models in turns."""
    times: dict[str, list[float]] = {each.name: [] for each in models}
    for _ in tqdm(range(rounds), desc="Timing", unit="round", leave=False, delay=1):
        for each in models:
            time.sleep(PAUSE)
            seconds(each.model, pixels)  # warms up
            times[each.name].append(seconds(each.model, pixels))
    return times


def _maps(original: nn.Module, quantized: nn.Module, pixels: Tensor, pictures: list[Any]) -> list[tuple[str, str, str]]:
    """The last block's hidden states as colours; none where there is no map of patches."""
    block = last_block(quantized)
    if block is None:
        return []
    found = [hidden_states(model, pixels, block) for model in (separated(original), quantized)]
    if any(value is None for value in found):
        return []
    first, second = found
    assert first is not None
    assert second is not None
    return [(thumbnail(picture), *as_colours(a, b)) for picture, a, b in zip(pictures, first, second)]


def _changes(
    original: nn.Module, quantized: nn.Module, pixels: Tensor, pictures: list[Any], names: list[str], batch_size: int
) -> tuple[list[Change], int | None]:
    """The pictures whose class changed, and how many; None without classes of pictures."""
    labels = getattr(getattr(original, "config", None), "id2label", None) or {}
    changes: list[Change] = []
    changed = 0
    for start in tqdm(range(0, len(pixels), batch_size), desc="Classes", unit="batch", leave=False, delay=1):
        batch = pixels[start : start + batch_size]
        before, after = (_probabilities(model, batch) for model in (original, quantized))
        if before is None or after is None:
            return [], None
        for i in (before.argmax(-1) != after.argmax(-1)).nonzero().flatten().tolist():
            changed += 1
            if len(changes) < SHOWN:
                best = [_best(values[i], labels) for values in (before, after)]
                changes.append(Change(thumbnail(pictures[start + i]), names[start + i], *best))
    return changes, changed


def _probabilities(model: nn.Module, pixels: Tensor) -> Tensor | None:
    with torch.inference_mode():
        logits = call(model, moved(model, pixels)).get("logits")
    return None if logits is None or logits.ndim != 2 or logits.shape[1] < 2 else logits.float().cpu().softmax(-1)


def _best(values: Tensor, labels: Mapping[int, str]) -> list[tuple[str, float]]:
    top = values.topk(min(FIRST, len(values)))
    return [(labels.get(i, f"class {i}"), p) for i, p in zip(top.indices.tolist(), top.values.tolist(), strict=True)]


def _report(original: nn.Module, quantized: nn.Module) -> QuantizationReport:
    """Each Linear of the float model, and what it is in the quantized one."""
    original = separated(original)
    family, packed = family_of(original), dict(quantized.named_modules())
    rows = []
    for name, layer in linear_layers(original).items():
        linear = cast(nn.Linear, layer)
        module: Any = packed.get(name, linear)
        row = LayerReport(
            name, component_of(name, family), (linear.out_features, linear.in_features), bytes_of(linear),
            bytes_of(module), block=block_of(name),
        )  # fmt: skip
        settings = getattr(module, "config", None)
        if settings is None or isinstance(module, nn.Linear):
            why = kept_reason(name, family)
            why = why or (f"of the {tower_of(name, family)} tower" if tower_of(name, family) == "text" else LEFT_OUT)
            rows.append(replace(row, skipped=why))
        else:
            rows.append(replace(row, bits=settings.bits, method=settings.method, activations=_activations(settings)))
    return QuantizationReport(tuple(rows), bytes_of(original), bytes_of(quantized))


def _activations(settings: Any) -> str | None:
    if settings.activations is None:
        return None
    return f"{settings.activations}, {settings.activation_bits} bits"


def _average(layers: Sequence[LayerReport]) -> float:
    """Bits per weight of the quantized layers."""
    sizes = [(layer.bits or 0, layer.shape[0] * layer.shape[1]) for layer in layers]
    return sum(bits * size for bits, size in sizes) / sum(size for _, size in sizes)


def _short(name: str) -> str:
    """The last part of a folder's name, or a hub id."""
    return Path(name).resolve().name if Path(name).is_dir() else name


def _what(rows: list[OutputComparison]) -> str:
    """What the least of the measures counts."""
    least = min(rows, key=lambda row: math.inf if math.isnan(row.kept) else row.kept)
    return CLASSES if least.measure == "top-1 match" else f"{least.output} ({least.measure})"
