"""Generated tensors, for hypothesis."""

import hypothesis.strategies as st
import torch

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@st.composite
def tensors(draw):
    """Any shape, dtype, magnitude; symmetric, one-sided, constant, zero or with outliers."""
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    kind = draw(st.sampled_from(["normal", "positive", "negative", "constant", "zero", "outlier"]))
    if kind in ("positive", "negative"):
        x = x.abs() + 1 if kind == "positive" else -x.abs() - 1
    elif kind in ("constant", "zero"):
        x = torch.full_like(x, 0.3 if kind == "constant" else 0.0)
    elif kind == "outlier":
        x.view(-1)[0] = 50.0
    largest = max(float(x.abs().max()), 1e-30)
    info = torch.finfo(dtype)
    size = draw(st.sampled_from([1.0, info.max / largest, 1e-3, 100 * info.tiny, info.tiny / 8]))
    return (x * size).to(dtype).clamp(-info.max, info.max)
