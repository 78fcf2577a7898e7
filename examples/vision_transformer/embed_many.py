#!/usr/bin/env python3
"""Embeddings or classes of more pictures than one would wait for: on several workers, on several machines, resumable.

    python examples/vision_transformer/embed_many.py MODEL PICTURES OUTPUT
    python examples/vision_transformer/embed_many.py MODEL PICTURES OUTPUT --workers 2
    python examples/vision_transformer/embed_many.py MODEL PICTURES OUTPUT --workers 32 --address auto

MODEL is a folder, packed or float. PICTURES is a folder of pictures, a Parquet or tar file, or a folder of those.
OUTPUT becomes a folder of Parquet files with a row for each picture: ``picture``, its name; ``embedding``, or of a
classifier ``class_index``, ``label`` and ``probability``; and ``error``, which is null unless the picture cannot be
read. The same call again goes on where it was stopped. One worker is this process; more are actors of Ray Data
(``pip install "fairseq[ray]"``), each of which loads the model once. If one is killed, its chunk is done by another.
The rows do not depend on the number of workers.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from common import UserError, positive, read_image, run
from picture_chunks import Chunk, chunks_of, fingerprint
from torch import Tensor
from tqdm import tqdm

from fairseq.cli.loading import load, needs_processor
from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.quantization.evaluation.compare import embeddings
from fairseq.quantization.files import replacing, write_file

MOST_TASKS = 2000  # chunks beyond share one: each costs Ray some milliseconds
PLAN = "plan.json"
assert ViTQuantizer  # registers the format of packed models


class Embedder:
    """Loads a model once, and writes a Parquet file for each chunk that it is called with."""

    def __init__(self, model: str, output: str, what: str, batch: int, threads: int | None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        loaded = load(model)
        self.model, self.processor = loaded.model, needs_processor(loaded, "MODEL")
        self.labels = getattr(self.model.config, "id2label", {})
        self.output, self.batch = Path(output), batch
        self.classes = what == "classes" or (what == "auto" and _is_classifier(self.model))
        if self.classes and not _is_classifier(self.model):
            raise UserError(f"{model}: {type(self.model).__name__} has no classes; leave out --what classes")
        if not self.classes and _is_classifier(self.model):
            self.model = self.model.base_model

    def __call__(self, row: dict[str, Any]) -> dict[str, int]:
        """``row["chunk"]`` -> how many pictures there were, and how many of them could not be read."""
        pyarrow, parquet = _pyarrow()
        chunk: Chunk = row["chunk"]
        rows: list[dict[str, Any]] = []
        for pictures in _in_batches(chunk.pictures(), self.batch):
            rows += self._rows(pictures)
        table = pyarrow.Table.from_pylist(rows, schema=self._schema(pyarrow))
        with replacing(part(self.output, chunk.number)) as path:
            parquet.write_table(table, path)
        return {"pictures": len(rows), "bad": sum(row["error"] is not None for row in rows)}

    def _schema(self, pyarrow: Any) -> Any:
        found = {"embedding": pyarrow.list_(pyarrow.float32())}
        if self.classes:
            found = {"class_index": pyarrow.int64(), "label": pyarrow.string(), "probability": pyarrow.float32()}
        return pyarrow.schema({"picture": pyarrow.string(), **found, "error": pyarrow.string()})

    def _rows(self, pictures: list[tuple[str, bytes | None]]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = [{"picture": name, "error": None} for name, _ in pictures]
        inputs: list[Any] = []
        good: list[dict[str, Any]] = []
        for row, (name, content) in zip(rows, pictures, strict=True):
            try:
                if content is None:
                    raise UserError(f"{name}: the row is empty")
                inputs.append(self.processor(images=read_image(BytesIO(content), name), return_tensors="pt"))
                good.append(row)
            except (UserError, ValueError) as error:
                row["error"] = str(error)
        if inputs:
            together = {key: torch.cat([one[key] for one in inputs]) for key in inputs[0]}
            for row, found in zip(good, self._run(together), strict=True):
                row.update(found)
        return rows

    def _run(self, inputs: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
        if not self.classes:
            return ({"embedding": values} for values in embeddings(self.model, inputs, self.batch)[1].numpy())
        with torch.inference_mode():
            best = self.model(**inputs).logits.float().softmax(-1).max(-1)
        return (
            {"class_index": index, "label": self.labels.get(index), "probability": probability}
            for index, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        )


def part(output: Path, number: int) -> Path:
    """The file of a chunk."""
    return output / f"part-{number:06}.parquet"


def _in_batches(pictures: Iterable[Any], size: int) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for picture in pictures:
        batch.append(picture)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _is_classifier(model: Any) -> bool:
    return "ForImageClassification" in type(model).__name__


def _pyarrow() -> tuple[Any, Any]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UserError('Parquet files need pyarrow: pip install "fairseq[ray]"') from None


def here(chunks: list[Chunk], worker: tuple[Any, ...]) -> Iterator[dict[str, int]]:
    """What :class:`Embedder` says of each chunk, in this process."""
    embedder = Embedder(*worker)
    return (embedder({"chunk": chunk}) for chunk in chunks)


def on_ray(
    chunks: list[Chunk], worker: tuple[Any, ...], workers: int, threads: int, address: str | None
) -> Iterator[dict[str, int]]:
    """The same on actors of Ray Data, in any order; a chunk whose actor dies goes to another one."""
    try:
        ray = importlib.import_module("ray")
        importlib.import_module("ray.data")
    except ImportError:
        raise UserError('--workers needs Ray: pip install "fairseq[ray]"') from None
    # Actors import this file's own modules, and load what was saved as this process does.
    paths = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    ray.init(
        address=address,
        num_cpus=None if address else workers * threads,
        runtime_env={"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": str(threads)}},
        include_dashboard=False,
        logging_level="warning",
        log_to_driver=False,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        rows = ray.data.from_items(
            [{"chunk": chunk} for chunk in chunks], override_num_blocks=min(len(chunks), MOST_TASKS)
        )
        done = rows.map(Embedder, fn_constructor_args=worker, concurrency=workers, num_cpus=threads)
        yield from done.iter_rows()
    finally:
        ray.shutdown()


def resumed(output: Path, plan: dict[str, str], chunks: list[Chunk]) -> list[Chunk]:
    """The chunks that are still to be done; ``output`` is made if it is not there.

    Raises:
        UserError: what is in ``output`` was made of other pictures, by another model or with other settings.
    """
    output.mkdir(parents=True, exist_ok=True)
    if (output / PLAN).is_file():
        before = json.loads((output / PLAN).read_text(encoding="utf-8"))
        other = [key for key, value in plan.items() if before.get(key) != value]
        if other:
            raise UserError(f"{output} was begun with other {' and '.join(other)}; take another folder, or empty it")
    elif any(output.iterdir()):
        raise UserError(f"{output} is not empty, and was not made by this script; take another folder")
    write_file(output / PLAN, json.dumps(plan, indent=2).encode())
    for left in output.glob(".part-*"):  # by a worker that was killed as it wrote
        left.unlink(missing_ok=True)
    return [chunk for chunk in chunks if not part(output, chunk.number).is_file()]


def of_files(folder: Path) -> str:
    """A hash of the names, sizes and beginnings of a model's files."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        with path.open("rb") as opened:
            digest.update(f"{path.name}:{path.stat().st_size}:".encode() + opened.read(1 << 20))
    return digest.hexdigest()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder that save_pretrained wrote, or fairseq-vit quantize")
    parser.add_argument("pictures", type=Path, help="a folder of pictures, a .parquet or .tar file, a folder of those")
    parser.add_argument("output", type=Path, help="a folder for Parquet files; what is done already is left out")
    parser.add_argument("--what", choices=("auto", "embeddings", "classes"), default="auto", help="auto: by the model")
    parser.add_argument("--workers", type=positive, default=1, metavar="N", help="1: this process; more: Ray (default 1)")
    parser.add_argument("--threads", type=positive, metavar="N", help="of each worker (default: all cores, shared)")
    parser.add_argument("--address", help='of a Ray cluster, or "auto"; else Ray is started on this machine')
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N", help="pictures per run (default 16)")
    parser.add_argument("--chunk", type=positive, default=256, metavar="N", help="pictures per file (default 256)")
    parser.add_argument("--column", default="image", help="of Parquet files (default image)")
    return parser.parse_args()


def main() -> int:
    args = parse()
    if not (args.model / "config.json").is_file():
        raise UserError(f"{args.model}: no model in this folder: it has no config.json")
    _pyarrow()
    chunks = chunks_of(args.pictures, args.chunk, args.column)
    settings = f"{args.what}, {args.batch_size} per run"
    left = resumed(
        args.output, {"pictures": fingerprint(chunks), "model": of_files(args.model), "settings": settings}, chunks
    )
    count, total = sum(len(chunk.parts) for chunk in left), sum(len(chunk.parts) for chunk in chunks)
    if count < total:
        print(f"{total - count} of {total} pictures were done before")
    threads = args.threads or max(1, (os.cpu_count() or 1) // args.workers)
    worker = (str(args.model.resolve()), str(args.output.resolve()), args.what, args.batch_size, threads)
    started = time.perf_counter()
    results: Iterator[dict[str, int]] = iter(())
    if left and (args.workers > 1 or args.address):
        results = on_ray(left, worker, args.workers, threads, args.address)
    elif left:
        results = here(left, worker)
    with tqdm(total=count, unit="picture", disable=None) as bar:
        for result in results:
            bar.update(result["pictures"])
    seconds = time.perf_counter() - started
    if count:
        print(f"{count} pictures in {seconds:.1f} s, {count / seconds:.1f} a second, on {args.workers} worker(s)")
    return summary(args.output, chunks, total)


def summary(output: Path, chunks: list[Chunk], total: int) -> int:
    """Print how many rows there are, and the first of the pictures that could not be read; 0, or 1 if rows lack."""
    _, parquet = _pyarrow()
    rows, errors = 0, []
    for chunk in chunks:
        found = parquet.read_table(part(output, chunk.number), columns=["error"]).column(0)
        rows += len(found)
        errors += [text for text in found.to_pylist() if text is not None]
    print(f"{rows} of {total} pictures are in {output}; {len(errors)} of them could not be read")
    for text in errors[:10]:
        print(f"  {text}")
    if len(errors) > 10:
        print("  ... the others have a text in the column error")
    return int(rows != total)


if __name__ == "__main__":
    run(main)
