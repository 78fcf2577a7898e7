"""One worker of embed_many.py: a model, loaded once, and a Parquet file for each chunk of pictures."""

from __future__ import annotations

import importlib
import pickle
import platform
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from common import UserError, read_image
from picture_chunks import Chunk, Picture
from torch import Tensor

import fairseq
from fairseq.cli.loading import load, needs_processor
from fairseq.cli.output import mistakes
from fairseq.modules.quantization.packed.kernels import native, runs_native
from fairseq.modules.quantization.packed.kernels.native_calls import attention_is_exact
from fairseq.quantization.evaluation.compare import embeddings
from fairseq.quantization.files import replacing


class Embedder:
    """Loads a model once, and writes a Parquet file for each chunk that it is called with."""

    def __init__(self, model: str, output: str, what: str, batch: int, threads: int, wanted: str) -> None:
        found = arithmetic()
        self.refused = "" if found == wanted else f"{platform.node()} has {found}, not {wanted}: its rows would differ"
        torch.set_num_threads(threads)
        loaded = load(model)
        self.model, self.processor = loaded.model, needs_processor(loaded, "MODEL")
        self.labels = getattr(self.model.config, "id2label", {})
        self.output, self.batch = Path(output), batch
        self.classes = what == "classes" or (what == "auto" and _is_classifier(self.model))
        if self.classes and not _is_classifier(self.model):
            raise UserError(f"{model}: {type(self.model).__name__} has no classes; leave out --what classes")
        if not self.classes and _is_classifier(self.model):
            inner = self.model.base_model
            self.model = inner if inner is not self.model else self.model.vision_model  # of CLIP and SigLIP

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """``row["chunk"]``, pickled -> how many pictures there were; or why this worker cannot do it."""
        if self.refused:
            return {"pictures": 0, "refused": self.refused}
        pyarrow, parquet = import_pyarrow()
        chunk: Chunk = pickle.loads(row["chunk"])
        rows: list[dict[str, Any]] = []
        for pictures in _in_batches(chunk.pictures(), self.batch):
            rows += self._rows(pictures)
        table = pyarrow.Table.from_pylist(rows, schema=self._schema(pyarrow))
        with replacing(part(self.output, chunk.number)) as path:
            parquet.write_table(table, path)
        return {"pictures": len(rows), "refused": ""}

    def _schema(self, pyarrow: Any) -> Any:
        found = {"embedding": pyarrow.list_(pyarrow.float32())}
        if self.classes:
            found = {"class_index": pyarrow.int64(), "label": pyarrow.string(), "probability": pyarrow.float32()}
        return pyarrow.schema({"picture": pyarrow.string(), **found, "error": pyarrow.string()})

    def _rows(self, pictures: list[Picture]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = [{"picture": name, "error": None} for name, _ in pictures]
        inputs: list[Any] = []
        good: list[dict[str, Any]] = []
        for row, (name, content) in zip(rows, pictures, strict=True):
            try:
                if isinstance(content, str):
                    raise UserError(content)
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
            with mistakes(ValueError):
                found = embeddings(self.model, inputs, self.batch)[1]
            return ({"embedding": values} for values in found.numpy())
        with torch.inference_mode():
            best = self.model(**inputs).logits.float().softmax(-1).max(-1)
        return (
            {"class_index": index, "label": self.labels.get(index), "probability": probability}
            for index, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        )


def arithmetic() -> str:
    """What decides the bits of rows besides the processor, as far as it is known: versions and kernels."""
    kernels = "native" if native.levels() and runs_native("auto") else "no native"
    attention = "float32" if attention_is_exact() else "bfloat16"
    return f"fairseq {fairseq.__version__} with {kernels} kernels, attention in {attention}, torch {torch.__version__}"


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


def import_pyarrow() -> tuple[Any, Any]:
    """pyarrow and its Parquet files; UserError without it."""
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UserError('Parquet files need pyarrow: pip install -e ".[ray]"') from None
