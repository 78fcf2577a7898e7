"""The measurements behind ``compare``, ``evaluate`` and ``benchmark``."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fairseq.cli.loading import Loaded, load, needs_processor
from fairseq.cli.output import Say, UserError, mistakes
from fairseq.cli.pictures import all_pixels, batches, labelled_images, noise, pictures_in
from fairseq.models.vit_quantization import compare_embeddings, compare_models, compare_outputs
from fairseq.quantization.architectures.forward import call, picture_inputs
from fairseq.quantization.calibration import processes
from fairseq.quantization.conversion.convert import bytes_of
from fairseq.quantization.evaluation.compare import EMBEDDINGS
from fairseq.quantization.evaluation.outputs import COMMON, least_kept

PAUSE = 0.1  # seconds in which idle threads of the turn before stop spinning
NEIGHBOURS = 5


class Score:
    """Running sums of one classifier's results."""

    def __init__(self) -> None:
        self.top1 = self.top5 = self.agree = self.count = 0
        self.squared_error, self.values, self.divergence = 0.0, 0, 0.0

    def add(self, got: Tensor, expected: Tensor, labels: Tensor) -> None:
        """Logits of this model and of the reference, (B, classes), and labels, (B,)."""
        first = got.argmax(-1)
        self.top1 += int((first == labels).sum())
        self.top5 += int((got.topk(min(5, got.shape[-1])).indices == labels[:, None]).any(-1).sum())
        self.agree += int((first == expected.argmax(-1)).sum())
        self.squared_error += float((got - expected).double().square().sum())
        self.values += got.numel()
        ours, wanted = got.double().log_softmax(-1), expected.double().log_softmax(-1)
        self.divergence += float((wanted.exp() * (wanted - ours)).sum())
        self.count += len(labels)

    def joined(self) -> Score:
        """That of all processes together."""
        whole = Score()
        for part in processes.gathered(vars(self)):
            for key, value in part.items():
                setattr(whole, key, getattr(whole, key) + value)
        return whole


def load_two(original: str, quantized: str, device: str, say: Say) -> tuple[Loaded, Loaded]:
    """Both models; a word on stderr if the second is not quantized."""
    say(f"Loading {original} and {quantized}")
    first, second = load(original, device), load(quantized, device)
    if not second.packed:
        say(f"warning: nothing in {quantized} is quantized")
    return first, second


def load_named(model: str, reference: str | None, device: str, say: Say) -> dict[str, Loaded]:
    """The "model" and, if there is one, before it the "reference"."""
    if reference is None:
        say(f"Loading {model}")
        return {"model": load(model, device)}
    first, second = load_two(reference, model, device, say)
    return {"reference": first, "model": second}


def difference(
    original: Loaded, quantized: Loaded, folder: Path | None, count: int, top_k: int, batch_size: int
) -> dict[str, Any]:
    """What compare_models finds on pictures or noise; compare_embeddings or compare_outputs where that says little."""
    if folder is None:
        pixels = noise(original.model, count)
    else:
        images = pictures_in(folder)[:count]
        processor = needs_processor(original, "--images")
        with mistakes():
            pixels = all_pixels(images, processor, batch_size)
    with mistakes():
        there = compare_outputs(original.model, quantized.model, pixels[:1])
        if any(row.measure not in COMMON for row in there) or not {row.output for row in there} & {*EMBEDDINGS}:
            if top_k != 1:
                raise UserError(f"--top-k is for classifiers; {original.name} is a {type(original.model).__name__}")
            rows = compare_outputs(original.model, quantized.model, pixels, batch_size)
            return {
                "kind": "outputs", "count": len(pixels), "outputs": [row._asdict() for row in rows],
                "kept": least_kept(rows),
            }  # fmt: skip
        total: list[float] = [0.0, 0.0, 0.0]
        for chunk in tqdm(pixels.split(batch_size), desc="Comparing", unit="batch", leave=False, delay=1):
            found = compare_models(original.model, quantized.model, chunk, top_k)
            if found.top_k_match is None:
                return _embeddings(original.model, quantized.model, pixels, batch_size)
            total = [sum_ + len(chunk) * value for sum_, value in zip(total, found)]  # type: ignore[operator]
    mse, mae, match = (value / len(pixels) for value in total)
    return {
        "kind": "classes", "count": len(pixels), "mse_loss": mse, "mae_loss": mae, "top_k": top_k, "match": match,
    }  # fmt: skip


def accuracy(
    models: dict[str, Loaded], folder: Path, labels: Path, limit: int | None, batch_size: int
) -> dict[str, Any]:
    """Top-1 and top-5 of the model, and of the reference with the share of equal classes and the logits' error.

    Of several processes each takes some of the pictures, and all get the sums.
    """
    for loaded in models.values():
        if "ForImageClassification" not in type(loaded.model).__name__:
            raise UserError(f"{loaded.name} is a {type(loaded.model).__name__}: labels need an image classifier")
    counts = {loaded.name: int(loaded.model.config.num_labels) for loaded in models.values()}  # type: ignore[union-attr, arg-type]
    if len(set(counts.values())) > 1:
        raise UserError("the models have different classes: " + ", ".join(f"{n} has {c}" for n, c in counts.items()))
    processor = needs_processor(models["model"], "--images")
    images, truth = labelled_images(folder, labels, min(counts.values()))
    images, truth = images[:limit], truth[:limit]
    own = processes.share(len(images))
    images, truth = images[own.start : own.stop], truth[own.start : own.stop]
    scores = {name: Score() for name in models}
    hidden = processes.rank() != 0 or None
    with tqdm(total=len(images), desc="Evaluating", unit="image", delay=1, disable=hidden) as bar, mistakes():
        for pixels, expected in zip(batches(images, processor, batch_size), truth.split(batch_size), strict=True):
            logits = {name: _logits(loaded.model, pixels) for name, loaded in models.items()}
            for name, got in logits.items():
                scores[name].add(got, logits.get("reference", got), expected)
            bar.update(len(pixels))
    scores = {name: score.joined() for name, score in scores.items()}
    shares = {name: {"top1": s.top1 / s.count, "top5": s.top5 / s.count} for name, s in scores.items()}
    score = scores["model"]
    result: dict[str, Any] = {"count": score.count, **shares["model"]}
    if "reference" in models:
        result["agreement"], result["mse_loss"] = score.agree / score.count, score.squared_error / score.values
        result["divergence"] = score.divergence / score.count
        result["reference"] = {"model": models["reference"].name, **shares["reference"]}
    return result


def speed(models: dict[str, Loaded], sizes: list[int], rounds: int, threads: int | None) -> dict[str, Any]:
    """Median times of each batch size, the models in turns, and the bytes of their weights."""
    before = torch.get_num_threads()
    threads = threads or before
    torch.set_num_threads(threads)
    found: dict[int, dict[str, Any]] = {}
    try:
        for size in sizes:
            pixels = noise(models["model"].model, size)
            times: dict[str, list[float]] = {name: [] for name in models}
            for _ in tqdm(range(rounds), desc=f"Batch {size}", unit="round", leave=False):
                for name, loaded in models.items():
                    time.sleep(PAUSE)
                    seconds(loaded.model, pixels)  # warms up
                    times[name].append(seconds(loaded.model, pixels))
            found[size] = {name: _summary(taken, times, size) for name, taken in times.items()}
    finally:
        torch.set_num_threads(before)
    weights = {name: bytes_of(loaded.model) for name, loaded in models.items()}
    return {"threads": threads, "rounds": rounds, "batches": found, "bytes": weights}


def _summary(taken: list[float], times: dict[str, list[float]], size: int) -> dict[str, float | None]:
    middle = statistics.median(taken)
    ratio = None
    if "reference" in times:
        ratio = statistics.median(first / second for first, second in zip(times["reference"], taken))
    return {"ms": 1000 * middle, "images_per_second": size / middle, "ratio": ratio}


def seconds(model: nn.Module, pixels: Tensor) -> float:
    """Of one forward."""
    device, dtype = _place(model)
    pixels = pixels.to(device, dtype)
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    with torch.inference_mode():
        call(model, picture_inputs(model, pixels))
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _logits(model: nn.Module, pixels: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, classes) on the CPU, float32."""
    with torch.inference_mode():
        output = model(pixel_values=pixels.to(*_place(model)))
    return output.logits.float().cpu()


def _place(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a model is, and the dtype of pixel values for it; an integer-only one has buffers alone."""
    parameter = next(model.parameters(), None)
    if parameter is None:
        return next(model.buffers()).device, torch.float32
    return parameter.device, parameter.dtype


def _embeddings(original: nn.Module, quantized: nn.Module, pixels: Tensor, batch_size: int) -> dict[str, Any]:
    if len(pixels) < 2:
        raise UserError("embeddings are compared on at least 2 pictures; raise --limit")
    found = compare_embeddings(original, quantized, pixels, min(NEIGHBOURS, len(pixels) - 1), batch_size)
    return {"kind": "embeddings", "count": len(pixels), **found._asdict()}
