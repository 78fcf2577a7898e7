#!/usr/bin/env python3
"""Embeddings or classes of more pictures than one would wait for: on several workers, on several machines, resumable.

    python examples/vision_transformer/embed_many.py MODEL PICTURES OUTPUT
    python examples/vision_transformer/embed_many.py MODEL PICTURES OUTPUT --workers 2
    python examples/vision_transformer/embed_many.py MODEL PICTURES OUTPUT --workers 32 --address auto

MODEL is a folder, packed or float. PICTURES is a folder of pictures, a Parquet or tar file, or a folder of those.
OUTPUT becomes a folder of Parquet files with a row for each picture: ``picture``, its name; ``embedding``, or of a
classifier ``class_index``, ``label`` and ``probability``; and ``error``, which is null unless the picture cannot be
read. The same call again goes on where it was stopped. One worker is this process; more are actors of Ray Data
(``pip install -e ".[ray]"``), each of which loads the model once. If one is killed, its chunk is done by another.
The rows do not depend on the number of workers.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import logging
import os
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import UserError, positive, run
from embedder import Embedder, arithmetic, import_pyarrow, part
from picture_chunks import Chunk, chunks_of, fingerprint
from tqdm import tqdm

from fairseq.quantization.files import write_file

MOST_TASKS = 2000  # chunks beyond share one: each costs Ray some milliseconds
PLAN = "_plan.json"  # which readers of Parquet folders pass over


def here(chunks: list[Chunk], worker: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
    """What :class:`Embedder` says of each chunk, in this process."""
    embedder = Embedder(*worker)
    return (embedder({"chunk": pickle.dumps(chunk)}) for chunk in chunks)


def on_ray(
    chunks: list[Chunk], worker: tuple[Any, ...], workers: int, threads: int, address: str | None
) -> Iterator[dict[str, Any]]:
    """The same on actors of Ray Data, in any order; a chunk whose actor dies goes to another one."""
    # Else Ray would start actors of "uv run" in a copy of the current folder, which may hold this library without its
    # compiled part, and import that one.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    try:
        ray = importlib.import_module("ray")
        importlib.import_module("ray.data")
    except ImportError:
        raise UserError('--workers needs Ray: pip install -e ".[ray]"') from None
    Embedder(*worker)  # a mistake is told here, in a line, and not by an actor
    # Actors import this folder's modules, too.
    paths = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    ours = {key: value for key, value in os.environ.items() if key.startswith("FAIRSEQ_")}
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    ray.init(
        address=address,
        num_cpus=None if address else workers * threads,
        runtime_env={"env_vars": {**ours, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(threads)}},
        include_dashboard=False,
        logging_level="error",
        log_to_driver=False,
    )
    logging.getLogger("ray.data").setLevel("CRITICAL")  # an error is told here, in a line
    ray.data.DataContext.get_current().enable_progress_bars = False
    # The worker that lacks something says so in its rows: of an error Ray prints the traceback of every attempt.
    try:
        rows = [{"chunk": pickle.dumps(chunk)} for chunk in chunks]
        pool = ray.data.ActorPoolStrategy(size=workers)
        data = ray.data.from_items(rows, override_num_blocks=min(len(chunks), MOST_TASKS))
        yield from data.map(Embedder, fn_constructor_args=worker, compute=pool, num_cpus=threads).iter_rows()
    except ray.exceptions.RayError as error:
        raise UserError(f"a worker stopped: {_summary(error)}") from error
    finally:
        ray.shutdown()


def _summary(error: Exception) -> str:
    """Of the traceback that Ray repeats: what was raised there, else what Ray says first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    mistake = f"{UserError.__module__}.{UserError.__name__}: "
    return next((line.removeprefix(mistake) for line in lines if line.startswith(mistake)), lines[0])


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
    return [chunk for chunk in chunks if not part(output, chunk.number).is_file()]


def of_files(folder: Path) -> str:
    """A hash of the names and contents of a model's files."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        with path.open("rb") as opened:
            digest.update(f"{path.name}:{hashlib.file_digest(opened, 'sha256').hexdigest()}".encode())
    return digest.hexdigest()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder that save_pretrained wrote, or fairseq-vit quantize")
    parser.add_argument("pictures", type=Path, help="a folder of pictures, a .parquet or .tar file, a folder of those")
    parser.add_argument("output", type=Path, help="a folder for Parquet files; what is done already is left out")
    parser.add_argument("--what", choices=("auto", "embeddings", "classes"), default="auto", help="auto: by the model")
    parser.add_argument(
        "--workers", type=positive, default=1, metavar="N", help="1: this process; more: Ray (default 1)"
    )
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
    import_pyarrow()
    if args.output.resolve().is_relative_to(args.pictures.resolve()):
        raise UserError(f"{args.output} lies in {args.pictures}, and would be read as pictures; take another folder")
    chunks = chunks_of(args.pictures, args.chunk, args.column)
    settings = f"{args.what}, {args.batch_size} per run"
    plan = {
        "pictures": fingerprint(chunks), "model": of_files(args.model), "settings": settings,
        "kernels or versions": arithmetic(),
    }  # fmt: skip
    left = resumed(args.output, plan, chunks)
    count, total = sum(len(chunk.parts) for chunk in left), sum(len(chunk.parts) for chunk in chunks)
    if count < total:
        print(f"{total - count} of {total} pictures were done before")
    threads = args.threads or max(1, (os.cpu_count() or 1) // args.workers)
    paths = str(args.model.resolve()), str(args.output.resolve())
    worker = (*paths, args.what, args.batch_size, threads, plan["kernels or versions"])
    started = time.perf_counter()
    results: Iterator[dict[str, Any]] = iter(())
    if left and (args.workers > 1 or args.address):
        results = on_ray(left, worker, args.workers, threads, args.address)
    elif left:
        results = here(left, worker)
    with tqdm(total=count, unit="picture", disable=None) as bar:
        for result in results:
            if result["refused"]:
                raise UserError(f"a worker was refused: {result['refused']}; install and set the same there")
            bar.update(result["pictures"])
    seconds = time.perf_counter() - started
    if count:
        print(f"{count} pictures in {seconds:.1f} s, {count / seconds:.1f} a second, on {args.workers} worker(s)")
    return summary(args.output, chunks, total)


def summary(output: Path, chunks: list[Chunk], total: int) -> int:
    """Print how many rows there are, and the first of the pictures that could not be read; 0, or 1 if rows lack."""
    _, parquet = import_pyarrow()
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
