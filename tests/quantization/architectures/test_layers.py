"""Layer names of both generations of transformers, and of the models that the installed one builds."""

from collections import Counter

import pytest
import torch
import transformers
from transformers import ViTConfig, ViTForImageClassification, ViTForMaskedImageModeling, ViTModel

from fairseq.quantization.architectures.families import component_of
from fairseq.quantization.architectures.layers import linear_layers

NAMES = {
    "vit.encoder.layer.11.attention.attention.query": "attention",
    "vit.encoder.layer.0.attention.attention.key": "attention",
    "encoder.layer.0.attention.attention.value": "attention",
    "vit.encoder.layer.3.attention.output.dense": "attention",
    "vit.encoder.layer.3.intermediate.dense": "mlp",
    "vit.encoder.layer.3.output.dense": "mlp",
    "vit.layers.3.attention.q_proj": "attention",
    "layers.3.attention.k_proj": "attention",
    "vit.layers.3.attention.v_proj": "attention",
    "vit.layers.3.attention.o_proj": "attention",
    "vit.layers.3.mlp.fc1": "mlp",
    "layers.10.mlp.fc2": "mlp",
    "classifier": "classifier",
    "cls_classifier": "classifier",
    "pooler.dense": "classifier",
    "vit.pooler.dense": "classifier",
    "decoder.0": None,
    "my_classifier_notes": None,
    "vit.layers.3.attention.rq_proj": None,
    "dense": None,
}


@pytest.mark.parametrize(("name", "component"), NAMES.items(), ids=list(NAMES))
def test_component(name, component):
    assert component_of(name) == component


def components(model):
    return Counter(component_of(name) for name in linear_layers(model))


@pytest.mark.parametrize(("layers", "hidden", "total"), [(12, 768, 73), (24, 1024, 145)], ids=["ViT-Base", "ViT-Large"])
def test_real_sizes(layers, hidden, total):
    with torch.device("meta"):
        config = ViTConfig(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=16, num_labels=1000)
        model = ViTForImageClassification(config)
    assert components(model) == {"attention": 4 * layers, "mlp": 2 * layers, "classifier": 1}
    assert sum(components(model).values()) == total


def test_bare_and_masked_models():
    with torch.device("meta"):
        config = ViTConfig(num_hidden_layers=2)
        assert components(ViTModel(config)) == {"attention": 8, "mlp": 4, "classifier": 1}
        assert components(ViTForMaskedImageModeling(config)) == {"attention": 8, "mlp": 4}


def test_the_two_generations_are_told_apart_by_the_installed_version():
    """What the second test environment is for: the old names really occur there, and the new ones here."""
    with torch.device("meta"):
        names = list(linear_layers(ViTModel(ViTConfig(num_hidden_layers=1))))
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    assert ("encoder.layer.0.attention.attention.query" in names) == (version < (5, 9))
    assert ("layers.0.attention.q_proj" in names) == (version >= (5, 9))
