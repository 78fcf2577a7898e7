#!/usr/bin/env python3
"""Makes of the embedded ViT what integer_vit.c runs: model.bin and model.h, and pictures as it reads them.

    python make_model.py [--activations static] [--output DIR]

128 of the 500 pictures that come with the examples calibrate it; eight others go to pictures.raw, and the integers that
the model gives for them to expected.txt.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import embedded_images, load_embedded, positive, run

from fairseq.models.vit_quantization import ViTQuantizer

CALIBRATION, PICTURES = 128, 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--activations", choices=("dynamic", "static"), default="dynamic")
    parser.add_argument("--output", type=Path, default=Path(), help="the folder to write to")
    parser.add_argument("--calibration", type=positive, default=CALIBRATION, help="how many pictures calibrate it")
    args = parser.parse_args()
    model, processor, _ = load_embedded()
    readers, _ = embedded_images()
    chosen = readers[:: len(readers) // (args.calibration + PICTURES)][: args.calibration + PICTURES]
    pixels = processor(images=[read() for read in chosen], return_tensors="pt")["pixel_values"]
    quantizer = ViTQuantizer(method="channel", rounding="nearest", arithmetic="integer", activations=args.activations)
    integers = quantizer.quantize_model(model, calibration=pixels[: args.calibration], processor=processor)
    pictures = integers.round_pixels(pixels[args.calibration :])  # uint8 (8, 3, 32, 32)
    print(ViTQuantizer.export(integers, args.output / "model.bin", "c", sample=pictures))
    pictures.numpy().tofile(args.output / "pictures.raw")
    logits = integers.integer_logits(pictures)
    lines = (" ".join(map(str, row)) + "\n" for row in logits.tolist())
    (args.output / "expected.txt").write_text("".join(lines), encoding="ascii")
    return 0


if __name__ == "__main__":
    run(main)
