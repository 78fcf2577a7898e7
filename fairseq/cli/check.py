"""``fairseq-vit compare``, ``evaluate`` and ``benchmark``: what quantization did to a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fairseq.cli.distributed import processes_together, speaks
from fairseq.cli.options import BatchSize, Device, Images, Json, Model, Quiet, parse_batches
from fairseq.cli.output import UserError, finish, table, with_examples, working

Original = Annotated[str, typer.Argument(metavar="ORIGINAL", help="The float model: a local folder or a hub id.")]
Quantized = Annotated[str, typer.Argument(metavar="QUANTIZED", help="The quantized one.")]
Reference = Annotated[str | None, typer.Option(metavar="ORIGINAL", help="The float model, to compare with.")]
AtLeast = Annotated[
    float | None, typer.Option(min=0, max=1, help="Exit with 1 if a smaller share (or cosine) is kept.")
]  # fmt: skip


@with_examples(
    "compare google/vit-base-patch16-224 vit-int4 --images pictures",
    "compare ./vit vit-int4 --noise --top-k 5 --at-least 0.9",
)
def compare(
    original: Original,
    quantized: Quantized,
    images: Images = None,
    noise: Annotated[bool, typer.Option("--noise", help="Noise instead of pictures, as without --images.")] = False,
    count: Annotated[int, typer.Option("--limit", min=1, help="How many pictures, at most.")] = 64,
    top_k: Annotated[int, typer.Option(min=1, help="Is the original's class among so many?")] = 1,
    at_least: AtLeast = None,
    batch_size: BatchSize = 16,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Compare the outputs of two models on the same pictures.

    Classifiers: errors of the logits, and the share of pictures whose class is kept. Bare models: cosines of the
    embeddings, and the share of each picture's nearest others that is kept. Segmentation, detection, depth, feature
    maps: each output, in its own measure.
    """
    if noise and images is not None:
        raise UserError("--noise and --images exclude each other")
    with working(quiet) as say:
        from fairseq.cli import measure

        models = measure.load_two(original, quantized, device, say)
        result: dict[str, Any] = {
            "original": original,
            "quantized": quantized,
            "images": None if images is None else str(images),
        }
        result |= measure.difference(*models, images, count, top_k, batch_size)
    if result["kind"] == "classes":
        kept = result["match"]
        head = [f"top-{result['top_k']} match", "MSE", "MAE"]
        rows = [[quantized, f"{kept:.1%}", f"{result['mse_loss']:.3g}", f"{result['mae_loss']:.3g}"]]
    elif result["kind"] == "outputs":
        kept = result["kept"]  # NaN, with nothing to look at, passes no check
        head = ["output", "relative error", "measure", "value"]
        rows = [
            [quantized, o["output"], f"{o['relative_error']:.3g}", o["measure"], f"{o['value']:.4f}"]
            for o in result["outputs"]
        ]
    else:
        kept = result["cosine"]
        head = ["cosine", "least cosine", f"overlap@{result['k']}"]
        rows = [[quantized, f"{kept:.5f}", f"{result['cosine_min']:.5f}", f"{result['overlap']:.1%}"]]
    passed = at_least is None or kept >= at_least
    what = "pictures of noise" if images is None else f"pictures in {images}"
    text = f"{result['count']} {what}\n" + table(["quantized", *head], rows)
    text += "" if passed else f"\n{kept:.4g} is below {at_least:g}"
    return finish({**result, "passed": passed}, text, as_json, 0 if passed else 1)


@with_examples(
    "evaluate vit-int4 --images pictures --labels labels.csv",
    "evaluate vit-int4 --images pictures --labels labels.csv --reference google/vit-base-patch16-224 --json",
)
def evaluate(
    model: Model,
    images: Annotated[Path, typer.Option(metavar="DIR", help="A folder of pictures.")],
    labels: Annotated[Path, typer.Option(metavar="CSV", help="Columns: file (in the folder), class_index.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many pictures.")] = None,
    reference: Reference = None,
    at_least: AtLeast = None,
    batch_size: BatchSize = 16,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Measure the top-1 and top-5 accuracy of a classifier over labelled pictures.

    Under torchrun or accelerate launch the processes share the pictures, and the first prints.
    """
    with working(quiet or not speaks()) as say, processes_together(device):
        from fairseq.cli import measure

        models = measure.load_named(model, reference, device, say)
        result = {"model": model, "images": str(images), **measure.accuracy(models, images, labels, limit, batch_size)}
    scores: dict[str, Any] = {model: result}
    if reference is not None:
        scores[reference] = result["reference"]
    percent = {"top-1": "top1", "top-5": "top5"} | ({"agreement": "agreement"} if reference else {})
    rows = [
        [name, *(f"{score[key]:.1%}" if key in score else "" for key in percent.values())]
        for name, score in scores.items()
    ]
    passed = at_least is None or result["top1"] >= at_least
    code = 0 if passed else 1
    if not speaks():
        return code
    text = f"{result['count']} pictures\n" + table(["model", *percent], rows)
    text += "" if passed else f"\ntop-1 {result['top1']:.4g} is below {at_least:g}"
    return finish({**result, "passed": passed}, text, as_json, code)


@with_examples(
    "benchmark vit-int4 --reference google/vit-base-patch16-224",
    "benchmark vit-int4 --reference ./vit --batch 1,8 --rounds 20 --json",
)
def benchmark(
    model: Model,
    reference: Reference = None,
    batch: Annotated[list[str] | None, typer.Option(metavar="N,N", help="Batch sizes.  [default: 1,8]")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed forwards of each, in turns.")] = 9,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the CPU; by default as PyTorch chooses.")] = None,
    device: Device = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Time a model on noise, in turns with the reference, and tell both sizes.

    Times are medians; the ratio is the median of each round's.
    """
    sizes = parse_batches(batch or ["1,8"])
    with working(quiet) as say:
        from fairseq.cli import measure

        models = measure.load_named(model, reference, device, say)
        result = {"model": model, "reference": reference, **measure.speed(models, sizes, rounds, threads)}
    names = {"model": model, "reference": str(reference)}
    rows = []
    for size, times in result["batches"].items():
        for name, time in times.items():
            row = [f"{size}", names[name], f"{time['ms']:.2f}"]
            row += [f"{time['images_per_second']:.1f}", f"{time['ratio']:.2f}x" if reference else ""]
            rows.append([*row, f"{result['bytes'][name] / 1e6:.1f} MB"])
    header = ["batch", "model", "ms", "images/s", "speed", "weights"]
    if reference is None:
        header, rows = [h for h in header if h != "speed"], [[*row[:4], row[5]] for row in rows]
    return finish(result, f"threads: {result['threads']}, rounds: {rounds}\n" + table(header, rows), as_json)
