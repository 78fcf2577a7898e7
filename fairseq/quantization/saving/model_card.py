"""The model card that save_pretrained writes: what a packed model is, how it was made and how to load it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from fairseq.quantization.evaluation.report import megabytes

TASKS = {"ForImageClassification": "image-classification", "VisionEncoderDecoder": "image-to-text"}
HUB_ID = r"[\w.-]+/[\w.-]+"

CARD = """---
library_name: transformers
{base}{task}tags:
- fairseq_vit
- quantized
{tags}---

# {title}

A `{architecture}` whose weights are integers: {summary}. It was quantized with
[I-BERT's](https://arxiv.org/abs/2101.01321) successor `fairseq`, which runs it.

| | |
|---|---|
{rows}

## Loading

```python
import fairseq.models.vit_quantization  # registers the format; without it, loading stops with an error
from transformers import {auto}

model = {auto}.from_pretrained("{here}")
```

The logits are those of the model that was saved, to the last bit. Every tensor has a checksum, which loading compares.
"""


def model_card(model: nn.Module, description: Mapping[str, Any]) -> str:
    """README.md for a packed HuggingFace model.

    Args:
        model: the model.
        description: see :func:`fairseq.quantization.saving.checkpoint.description_of`.
    """
    information = description.get("information", {})
    settings = [{"bits": 8, "method": "tensor", "activations": "dynamic", **e} for e in description["layers"].values()]
    counts = Counter(f"{entry['bits']}-bit {entry['method']}" for entry in settings)
    summary = ", ".join(f"{count} layers {kind}" for kind, count in counts.most_common())
    activations = Counter(str(entry["activations"] or "float") for entry in settings)
    source = str(getattr(model.config, "_name_or_path", "") or "")
    base = source if re.fullmatch(HUB_ID, source) else None
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    rows = {
        "Weights": summary,
        **({"Arithmetic": "integers alone, from the rounded pixels to the logits"} if "integer" in description else {}),
        "Activations": ", ".join(f"{kind} ({count} layers)" for kind, count in activations.most_common()),
        "Calibration": _calibration(information),
        "Size": megabytes(size) + _before(information),
        **{str(key): _figure(value) for key, value in information.get("metrics", {}).items()},
    }
    architecture = type(model).__name__
    task = next((task for ending, task in TASKS.items() if ending in architecture), None)
    bits = sorted({entry["bits"] for entry in settings})
    return CARD.format(
        base=f"base_model: {base}\n" if base else "",
        task=f"pipeline_tag: {task}\n" if task else "",
        tags="".join(f"- {n}-bit\n" for n in bits),
        title=f"{base.split('/')[1] if base else architecture}, {' and '.join(map(str, bits))} bits",
        architecture=architecture,
        summary=summary,
        rows="\n".join(f"| {key} | {value} |" for key, value in rows.items()),
        auto="AutoModelForImageClassification" if task == "image-classification" else architecture,
        here="this-repository-or-folder",
    )


def _calibration(information: Mapping[str, Any]) -> str:
    count = information.get("calibration_images")
    return f"{count} pictures" if count else "none"


def _before(information: Mapping[str, Any]) -> str:
    before = information.get("bytes_before")
    return f" in memory, {megabytes(before)} in float" if isinstance(before, int) else " in memory"


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/").replace("\n", " ")
