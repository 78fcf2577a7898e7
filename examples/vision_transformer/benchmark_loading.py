#!/usr/bin/env python3
"""Memory and time that loading takes: float, quantized afterwards, quantized while loading, and packed.

    python examples/vision_transformer/benchmark_loading.py --size base --bits 4

Each way runs in a process of its own (Linux only). "peak" is the most memory of its own, files that are mapped not
counted, that the process held above what it held before loading, sampled every millisecond; "model" is what all
parameters and buffers take in the end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmark import SIZES, build, weight_bytes
from common import PROC, UserError, positive, run, table
from transformers import AutoModelForImageClassification

from fairseq.models.vit_quantization import FairseqViTConfig, ViTQuantizer

WAYS = {
    "float": "from_pretrained(float folder)",
    "afterwards": "the same, then quantize_model",
    "while loading": "from_pretrained(float folder, quantization_config)",
    "packed": "from_pretrained(packed folder)",
}


class Peak:
    """The most anonymous memory of this process inside a ``with``, above what it was at its beginning, in bytes."""

    def __enter__(self) -> Peak:
        self.start = self.most = anonymous()
        self.running = True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while self.running:
            self.most = max(self.most, anonymous())
            time.sleep(0.001)

    def __exit__(self, *error: object) -> None:
        self.running = False
        self.thread.join()
        self.bytes = self.most - self.start


def anonymous() -> int:
    """Memory of this process that is no file, in bytes."""
    line = next(line for line in PROC.read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def measure(way: str, folder: str, packed: str, bits: int) -> dict[str, float]:
    """Load in this process: peak and model in bytes, seconds."""
    load = AutoModelForImageClassification.from_pretrained
    settings = {"bits": bits, "method": "channel"}
    started = time.perf_counter()
    with Peak() as peak:
        if way == "packed":
            model = load(packed)
        elif way == "while loading":
            model = load(folder, quantization_config=FairseqViTConfig(**settings))
        else:
            model = load(folder)
            if way == "afterwards":
                model = ViTQuantizer(**settings).quantize_model(model)
    return {"peak": peak.bytes, "model": weight_bytes(model), "seconds": time.perf_counter() - started}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="folder of a float image classifier; default: random weights")
    parser.add_argument("--size", choices=SIZES, default="base", help="of the model with random weights")
    parser.add_argument("--bits", type=positive, default=4)
    parser.add_argument("--measure", nargs=3, metavar=("WAY", "FLOAT", "PACKED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not PROC.exists():
        raise UserError(f"this script reads {PROC}, which this system has not")
    if args.measure:
        print(json.dumps(measure(*args.measure, args.bits)))
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder, packed = args.model or f"{name}/float", f"{name}/packed"
        if args.model is None:
            build(args.size).save_pretrained(folder)
        elif not Path(folder).is_dir():
            raise UserError(f"--model {folder}: no such folder")
        model = AutoModelForImageClassification.from_pretrained(folder)
        ViTQuantizer(bits=args.bits, method="channel").quantize_model(model).save_pretrained(packed)
        rows = []
        for way, what in WAYS.items():
            command = [sys.executable, __file__, "--bits", str(args.bits), "--measure", way, folder, packed]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            result = json.loads(done.stdout.splitlines()[-1])
            megabytes = [f"{result[key] / 1e6:.1f} MB" for key in ("peak", "model")]
            rows.append([what, *megabytes, f"{result['seconds']:.2f}"])
    print(table(["loading", "peak", "model", "seconds"], rows))
    return 0


if __name__ == "__main__":
    run(main)
