"""A small model with some splats and a tokenizer of lower-case letters, made once."""

import numpy as np
import pytest
import torch

from ebc_lab.ebm.model import EnergyModel, ModelSettings
from ebc_lab.ebm.sphere import normalise
from ebc_lab.workloads.tokens import Characters

LETTERS = "abcdefghijklmnopqrstuvwxyz .\n"
CONTEXT = 8


@pytest.fixture(scope="session")
def letters():
    return Characters(LETTERS)


@pytest.fixture(scope="session")
def context():
    return CONTEXT


@pytest.fixture(scope="session")
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = ModelSettings(len(LETTERS), n=8, splats=12, neighbours=4, window=3, hidden=12)
        made = EnergyModel(settings)
        made.store.grow(normalise(torch.randn(300, 8)), 12, np.random.default_rng(0))
    return made.eval()
