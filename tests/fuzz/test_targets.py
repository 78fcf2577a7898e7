"""The targets of the fuzzer: what loads still does, and some hundred mutations are refused as they should be."""

import random

import pytest
from fuzz.targets import DOCUMENTED, TARGETS, mutated
from transformers.utils import logging

RUNS = {"float_config": 5, "packed_config": 5, "index": 5, "processor_config": 3, "integer_description": 8}
"""Those that take longer, as they load a whole model."""


@pytest.fixture(autouse=True)
def quiet():
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_a_target(name):
    seeds, run = TARGETS[name].seeds(), TARGETS[name].run
    for seed in seeds:
        run(seed)
    rng, refused = random.Random(name), 0
    for _ in range(RUNS.get(name, 20)):
        try:
            run(mutated(rng.choice(seeds), rng))
        except DOCUMENTED:
            refused += 1
    assert refused
