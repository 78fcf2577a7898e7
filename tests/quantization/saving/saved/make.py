"""Makes the folders beside it: packed models as one version of transformers saves them, and what they compute.

    python tests/quantization/saved/make.py

They are kept, so that every later version, of transformers and of this library, is tested to load them.
"""

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from families import build, pictures  # noqa: E402

from fairseq.models.vit_quantization import ViTQuantizer  # noqa: E402

FAMILIES = {"vit": {"bits": 4, "method": "channel", "quantize_embeddings": True}, "swin": {"bits": 8}}

if __name__ == "__main__":
    version = ".".join(transformers.__version__.split(".")[:2])
    for name, settings in FAMILIES.items():
        quantized = ViTQuantizer(**settings).quantize_model(build(name), engine="layers")
        folder = HERE / f"{name}-{version}"
        quantized.save_pretrained(folder)
        (folder / "README.md").unlink()
        with torch.no_grad():
            save_file({"logits": quantized(pictures()).logits}, folder / "expected.safetensors")
