#!/usr/bin/env python3
"""Speed, memory and accuracy of a ViT in float32, in bfloat16 and quantized, in one run on the CPU.

    python examples/vision_transformer/benchmark.py --model DIR --json result.json --picture result.png
    python examples/vision_transformer/benchmark.py --size base --configs "8-bit channel" "4-bit channel"

The configurations take turns, each after a pause in which the threads of the one before come to rest. Columns: "ms",
the median over the rounds; "speed", the median of each round's ratio to float32; "weights", all parameters and buffers;
"resident" and "peak", what a process of its own holds that loads, quantizes and runs nothing else, and the most it ever
held (Linux only); "of int8 peak", the multiply-adds of all Linear layers per second, as a share of the fastest integer
product measured in this run (blank where the products are in float); "of memory", the weights times the forwards per
second, as a share of the bytes that this machine was measured to read. "top-1" and "agreement" (the share of pictures
with the float model's class) are over the pictures of --images and --labels; for a model that knows their classes, as
the embedded one does, over the 500 that ship with the project.

Above each table stands what the figures depend on: the instruction set of the native kernels
(FAIRSEQ_QUANTIZATION_LEVEL forces another), the threads, the fastest integer product and the bandwidth of memory, both
measured in this run. --picture draws accuracy or size against speed, and below it the roofline: the operations per
second that each configuration reaches, against its operations per byte of weights.

--profile adds where the time of the native kernels goes, by operation, in milliseconds of a forward and as a share of
it; "outside" is PyTorch and Python: the patch embedding, the last LayerNorm, whatever is not fused. "roofline" is the
share that the integer products of all Linear layers would take at the peak, or reading all weights at the bandwidth of
memory if that is more, if nothing else took time. A last table has the layers alone, beside torch._int_mm on the same
shapes.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import gc
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from bench_candidates import INTEGERS, SETTINGS, quantized
from benchmark_picture import draw
from common import (
    PROC,
    UserError,
    embedded_images,
    first_line,
    labelled_images,
    load_model,
    logits,
    memory,
    positive,
    processor_name,
    run,
    table,
)
from evaluate import score_all
from roofline import Roofline, best, instruction_set, measure_roofline, products
from torch import Tensor, nn
from tqdm import tqdm
from transformers import ViTConfig, ViTForImageClassification

from fairseq.modules.quantization.packed.kernels import library, native, structures

SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}  # width, heads
NAMES = ["bfloat16", *SETTINGS]
PAUSE = 0.1  # seconds in which idle threads of the turn before stop spinning
TURN = 0.2  # seconds of a turn: its time is the median of the forwards that begin in them


def build(size: str, pixels: int = 224) -> nn.Module:
    """A ViT with random weights and 1000 classes for pictures of ``pixels`` x ``pixels``, the same at every call."""
    hidden, heads = SIZES[size]
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=hidden, num_attention_heads=heads, intermediate_size=4 * hidden, num_labels=1000, image_size=pixels
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def configured(name: str, model: nn.Module) -> nn.Module:
    """``model`` in the configuration called ``name``; for bfloat16 it is ``model`` itself that is changed."""
    if name in SETTINGS or name in INTEGERS:
        return quantized(model, name)
    return model.bfloat16() if name == "bfloat16" else model


def noise(model: nn.Module, count: int) -> Tensor:
    """Pictures of the model's shape: (count, 3, H, W), float32."""
    size = model.config.image_size
    shape = (size, size) if isinstance(size, int) else tuple(size)
    return torch.randn(count, model.config.num_channels, *shape, generator=torch.Generator().manual_seed(0))


def weight_bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def operations(model: nn.Module) -> int:
    """Multiplications and additions of all Linear layers of the float model, for one picture."""
    counts: list[int] = []
    handles = [
        layer.register_forward_hook(lambda layer, _, out: counts.append(2 * layer.in_features * out.numel()))
        for layer in model.modules()
        if isinstance(layer, nn.Linear)
    ]
    logits(model, noise(model, 1))
    for handle in handles:
        handle.remove()
    return sum(counts)


def turn(model: nn.Module, pixel_values: Tensor) -> float:
    """Milliseconds of one forward, after a pause and a forward that does not count."""
    time.sleep(PAUSE)
    logits(model, pixel_values)
    times, end = [], time.perf_counter() + TURN
    while (started := time.perf_counter()) < end:
        logits(model, pixel_values)
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


def measure_speed(models: dict[str, nn.Module], batch: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Milliseconds of each model in each round, their medians, and the medians of the ratios to float32."""
    pixel_values = noise(models["float32"], batch)
    for model in models.values():
        logits(model, pixel_values)
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in tqdm(range(rounds), desc=f"Timing batch {batch}", unit="round", leave=False):
        for name, model in models.items():
            times[name].append(turn(model, pixel_values))
    return {
        name: {
            "ms": statistics.median(values),
            "images_per_second": 1000 * batch / statistics.median(values),
            "speed": statistics.median(f / v for f, v in zip(times["float32"], values, strict=True)),
            "ms_per_round": values,
        }
        for name, values in times.items()
    }


def measure_profile(model: nn.Module, batch: int, rounds: int) -> dict[str, float] | None:
    """Milliseconds of a forward by operation, and outside of the native kernels; None for a model without them.

    Medians over the rounds; looking at the clock makes the kernels a few percent slower than in the other tables.
    """
    pixel_values, profiles = noise(model, batch), []
    for _ in range(rounds + 1):  # the first does not count
        started = time.perf_counter()
        with library.profile() as seconds:
            logits(model, pixel_values)
        elapsed = time.perf_counter() - started
        by_operation = {stage: 1000 * value / torch.get_num_threads() for stage, value in seconds.items()}
        profiles.append({**by_operation, "outside": 1000 * elapsed - sum(by_operation.values())})
    if not any(profiles[0][stage] for stage in structures.STAGES):
        return None
    return {key: statistics.median(profile[key] for profile in profiles[1:]) for key in profiles[0]}


def measure_linears(model: nn.Module, batch: int, rounds: int) -> list[dict[str, Any]]:
    """Rates of a native 8-bit layer and of ``torch._int_mm`` in turns, for each shape of a Linear in the blocks.

    The layer rounds its float input and scales its output; ``torch._int_mm`` takes integers and leaves them.
    """
    shapes: dict[tuple[int, int, int], None] = {}
    handles = [
        layer.register_forward_hook(
            lambda layer, _, out: shapes.setdefault((out.numel() // layer.out_features, *reversed(layer.weight.shape)))
        )
        for layer in model.modules()
        if isinstance(layer, nn.Linear)
    ]
    logits(model, noise(model, batch))
    for handle in handles:
        handle.remove()
    # The few rows of the classifier only wait for its weight to come from memory.
    return [measure_linear(*shape, rounds) for shape in shapes if shape[0] >= 16]


def measure_linear(rows: int, inputs: int, outputs: int, rounds: int) -> dict[str, Any]:
    """Operations per second, medians of ten turns a round."""
    candidates = products(rows, inputs, outputs)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    with torch.inference_mode():
        for _ in range(10 * rounds):
            for name, run_once in candidates.items():
                started = time.perf_counter()
                run_once()
                times[name].append(time.perf_counter() - started)
    rates = {name: 2 * rows * inputs * outputs / statistics.median(values) for name, values in times.items()}
    return {"rows": rows, "in": inputs, "out": outputs, **rates}


def seen(linear: dict[str, Any]) -> Roofline:
    """The faster product of one row of :func:`measure_linears` as a peak that was seen, and nothing of memory."""
    name = max(("native layer", "torch._int_mm"), key=lambda kind: linear[kind])
    return Roofline(linear[name], f"{name}, {linear['rows']} x {linear['in']} -> {linear['out']}", 0.0)


def show_linears(linears: list[dict[str, Any]], peak: float) -> str:
    """The table of :func:`measure_linears`, with the native layer's share of the peak, in operations per second."""
    kinds = ("native layer", "torch._int_mm")
    rows = [
        [f"{one['rows']} x {one['in']} -> {one['out']}"]
        + [f"{one[name] / 1e12:.2f} TOPS" for name in kinds]
        + [f"{one[kinds[0]] / one[kinds[1]]:.0%}", f"{one[kinds[0]] / peak:.0%}"]
        for one in linears
    ]
    return table(["layer", *kinds, "ratio", "of int8 peak"], rows)


def show_profile(profiles: dict[str, dict[str, float]], rooflines: dict[str, float]) -> str:
    """The table of one batch size: a row per operation, ms and share of each configuration, and its least ms."""
    header, rows = ["operation"], []
    for name in profiles:
        header += [name, "share"]
    for stage in (*structures.STAGES, "outside"):
        row = [stage]
        for profile in profiles.values():
            row += [f"{profile[stage]:.2f} ms", f"{profile[stage] / sum(profile.values()):.0%}"]
        rows.append(row)
    totals, shares = ["all"], ["roofline"]
    for name, profile in profiles.items():
        totals += [f"{sum(profile.values()):.2f} ms", ""]
        shares += [f"{rooflines[name]:.2f} ms", f"{rooflines[name] / sum(profile.values()):.0%}"]
    return table(header, [*rows, totals, shares])


def measure_own_memory(name: str, args: argparse.Namespace) -> dict[str, int]:
    """In a process of its own: what it holds once the model is configured and has run, and held before."""
    before = memory()["resident"]
    model = configured(name, build(args.size, args.pixels) if args.size else load_model(args.model).model)
    for _ in range(3):
        logits(model, noise(model, max(args.batch)))
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)  # give back what glibc keeps for later
    return {**memory(), "before_model": before}


def measure_memory(name: str, source: list[str], args: argparse.Namespace) -> dict[str, int] | None:
    """Ask a child process to measure its own; None where the system does not tell."""
    if not PROC.exists():
        return None
    command = [sys.executable, __file__, *source, "--threads", args.threads, "--batch", *args.batch, "--measure", name]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    child = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)
    if child.returncode:
        last = child.stderr.strip().rpartition("\n")[2] or f"exit code {child.returncode}"
        raise UserError(f"the process that measures the memory of {name} failed: {last.removeprefix('error: ')}")
    return json.loads(child.stdout.splitlines()[-1])


def find_pictures(args: argparse.Namespace, config: Any) -> tuple[list, Tensor] | None:
    """The pictures to measure accuracy with, and their labels; None without any."""
    if args.images:
        images, labels = labelled_images(args.images, args.labels, config.num_labels)
    else:
        images, names = embedded_images()
        if args.size or not set(names) <= set(config.label2id):
            return None
        labels = torch.tensor([config.label2id[name] for name in names])
    return images[: args.limit], labels[: args.limit]


def measure_accuracy(models: dict[str, nn.Module], images: list, labels: Tensor, processor: Any) -> dict[str, dict]:
    """Top-1 accuracy, and agreement with the first of the models."""
    scores = score_all(models, images, labels, processor, 25)
    return {name: {"top1": s.top1 / s.count, "agreement": s.agree / s.count} for name, s in scores.items()}


def show(result: dict[str, Any], batch: str) -> str:
    """The table of one batch size; columns that nothing was measured for are left out."""
    header = ["configuration", "ms", "images/s", "speed", "weights", "resident", "peak", "of int8 peak", "of memory"]
    accuracy = result["pictures"] > 0
    rows = []
    for name, timing in result["batches"][batch].items():
        fixed = result["configurations"][name]
        held = fixed["memory"] or {}
        share = timing["int8_peak_share"]
        row = [name, f"{timing['ms']:.1f}", f"{timing['images_per_second']:.1f}", f"{timing['speed']:.2f}x"]
        row.append(f"{fixed['weight_bytes'] / 1e6:.1f} MB")
        row += [f"{held[key] / 1e6:.0f} MB" if held else "" for key in ("resident", "peak")]
        row += ["" if share is None else f"{share:.0%}", f"{timing['bandwidth_share']:.0%}"]
        rows.append(row + [f"{fixed[key]:.1%}" for key in ("top1", "agreement") if accuracy])
    return table(header + ["top-1", "agreement"] * accuracy, rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", default=None, help="folder or hub id; default: as in test_with_image.py")
    which.add_argument("--size", choices=SIZES, help="random weights and 1000 classes instead, for speed only")
    parser.add_argument("--pixels", type=positive, default=224, help="side of the pictures of --size, in patches of 16")
    parser.add_argument("--batch", type=positive, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument(
        "--configs",
        nargs="+",
        default=NAMES,
        metavar="NAME",
        help=f"default: {'; '.join(NAMES)}; with --size also {'; '.join(INTEGERS)}",
    )
    parser.add_argument("--images", type=Path, help="folder of pictures, to measure accuracy with")
    parser.add_argument("--labels", type=Path, help="CSV with the columns file and class_index")
    parser.add_argument("--limit", type=positive, default=None, help="only the first so many pictures")
    parser.add_argument("--profile", action="store_true", help="where the milliseconds of the native kernels go")
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--picture", type=Path, help="draw accuracy, size, speed and the roofline here, a .png")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # what measure_memory asks of a child process
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    """UserError for what would fail only after minutes."""
    known = [*NAMES, *INTEGERS]
    unknown = [name for name in args.configs if name not in known]
    if unknown:
        raise UserError(f"--configs: {unknown[0]!r} is not one of {'; '.join(known)}")
    of_noise = [name for name in args.configs if name in INTEGERS]
    if of_noise and not args.size:
        raise UserError(f"--configs: {of_noise[0]!r} has ranges from noise, and needs --size; see evaluate.py")
    if args.pixels % 16:
        raise UserError(f"--pixels {args.pixels}: not a multiple of 16, the side of a patch")
    if bool(args.images) != bool(args.labels):
        raise UserError("--images and --labels go together")
    if args.images and args.size:
        raise UserError("--images: the random weights of --size have no accuracy; use --model")
    for option, file in (("--json", args.json), ("--picture", args.picture)):
        if file and (file.is_dir() or not file.parent.is_dir()):
            raise UserError(f"{option} {file}: {'is a folder' if file.is_dir() else f'no folder {file.parent}'}")
    try:
        instruction_set()
    except ValueError as error:
        raise UserError(f"{native.ENVIRONMENT}: {error}") from None
    if args.picture and args.picture.suffix.lower() != ".png":
        raise UserError(f"--picture {args.picture}: its name must end in .png")
    if args.picture and importlib.util.find_spec("matplotlib") is None:
        raise UserError("--picture needs matplotlib: uv pip install matplotlib")


def main() -> int:
    args = parse()
    check(args)
    torch.set_num_threads(args.threads)
    if args.measure:
        print(json.dumps(measure_own_memory(args.measure, args)))
        return 0
    model, processor, title = (
        (build(args.size, args.pixels), None, f"ViT-{args.size}") if args.size else load_model(args.model)
    )
    pictures = find_pictures(args, model.config)
    names = ["float32", *dict.fromkeys(args.configs)]
    models = {name: configured(name, copy.deepcopy(model) if name == "bfloat16" else model) for name in names}
    result = measure(
        models, ["--size", args.size, "--pixels", args.pixels] if args.size else ["--model", model.name_or_path], args
    )
    result = {"model": title, "pictures": len(pictures[0]) if pictures else 0, **result}
    if pictures:
        for name, accuracy in measure_accuracy(models, *pictures, processor).items():
            result["configurations"][name].update(accuracy)
    report(result, args)
    return 0


def measure(models: dict[str, nn.Module], source: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Size, memory and speed of each model, and the machine; ``source`` tells a child process where it comes from."""
    fixed, speeds, rooflines = {}, {}, []
    for name in tqdm(models, desc="Memory", unit="process", leave=False):
        held = measure_memory(name, source, args)
        fixed[name] = {"weight_bytes": weight_bytes(models[name]), "memory": held}
    profiles: dict[str, dict[str, dict[str, float]]] = {}
    linears: dict[str, list[dict[str, Any]]] = {}
    for batch in args.batch:
        rooflines.append(measure_roofline())
        speeds[str(batch)] = measure_speed(models, batch, args.rounds)
        if args.profile:
            measured = {name: measure_profile(model, batch, args.rounds) for name, model in models.items()}
            profiles[str(batch)] = {name: profile for name, profile in measured.items() if profile}
            if profiles[str(batch)]:
                linears[str(batch)] = measure_linears(models["float32"], batch, args.rounds)
                rooflines += [seen(one) for one in linears[str(batch)]]
    per_picture = operations(models["float32"])
    roofline = best(rooflines)
    for timings in speeds.values():
        for name, timing in timings.items():
            settings = (SETTINGS | INTEGERS).get(name)
            in_integers = settings is not None and settings.get("activations", "dynamic") is not None
            rate = per_picture * timing["images_per_second"]
            timing["int8_peak_share"] = rate / roofline.peak if in_integers else None
            timing["bandwidth_share"] = fixed[name]["weight_bytes"] / (timing["ms"] / 1000) / roofline.bandwidth
    machine = {
        "processor": processor_name(), "system": platform.platform(), "threads": torch.get_num_threads(),
        "instruction_set": instruction_set(), "int8_peak_tops": roofline.peak / 1e12, "int8_peak_of": roofline.product,
        "memory_gb_per_second": roofline.bandwidth / 1e9,
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    return {
        "machine": machine, "rounds": args.rounds, "operations_per_picture": per_picture,
        "configurations": fixed, "batches": speeds, "profiles": profiles, "linears": linears,
    }  # fmt: skip


def report(result: dict[str, Any], args: argparse.Namespace) -> None:
    """Print the tables, write the files."""
    machine = result["machine"]
    roofline = Roofline(
        1e12 * machine["int8_peak_tops"], machine["int8_peak_of"], 1e9 * machine["memory_gb_per_second"]
    )
    kernels = machine["instruction_set"] or "no native kernels"
    print(f"{result['model']}: {machine['processor']}, threads: {machine['threads']}, torch {machine['torch']}")
    print(f"{result['rounds']} rounds, {result['pictures']} pictures; the fastest product was {roofline.product}")
    under = f"{kernels}, threads: {machine['threads']}, {roofline}"
    for batch in result["batches"]:
        print(f"\nBatch {batch} ({under})\n{show(result, batch)}")
        if result["profiles"].get(batch):
            operations = int(batch) * result["operations_per_picture"]
            least = {
                name: 1000 * roofline.seconds(operations, fixed["weight_bytes"])
                for name, fixed in result["configurations"].items()
            }
            print(f"\nBatch {batch}, by operation ({under})\n{show_profile(result['profiles'][batch], least)}")
            linears = show_linears(result["linears"][batch], roofline.peak)
            print(f"\nBatch {batch}, Linear layers alone ({under})\n{linears}")
    held = result["configurations"]["float32"]["memory"]
    if held:
        print(f"\nOf what is resident, Python and PyTorch take {held['before_model'] / 1e6:.0f} MB without any model.")
    else:
        print(f"\nThis system has no {PROC}: resident and peak memory were not measured.")
    try:
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")
        if args.picture:
            draw(result, args.picture)
    except OSError as error:
        raise UserError(f"cannot write the result: {first_line(error)}") from None


if __name__ == "__main__":
    run(main)
