"""I-BERT's import paths give I-BERT's names, and the very objects of the integer package."""

import pytest

from fairseq.modules.quantization import integer
from fairseq.quantization.utils import quant_modules, quant_utils

MODULES = [
    "IntGELU",
    "IntLayerNorm",
    "IntSoftmax",
    "QuantAct",
    "QuantEmbedding",
    "QuantLinear",
    "freeze_model",
    "unfreeze_model",
]
UTILS = [
    "SymmetricQuantFunction",
    "batch_frexp",
    "fixedpoint_mul",
    "floor_ste",
    "get_percentile_min_max",
    "linear_quantize",
    "round_ste",
    "symmetric_linear_quantization_params",
]


@pytest.mark.parametrize(("path", "names"), [(quant_modules, MODULES), (quant_utils, UTILS)])
def test_names_and_identity(path, names):
    assert sorted(path.__all__) == sorted(names)
    for name in names:
        assert getattr(path, name) is getattr(integer, name)


def test_the_package_offers_both():
    assert sorted(integer.__all__) == sorted(MODULES + UTILS)
