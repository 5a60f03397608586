"""A small model with some splats and a tokenizer of lower-case letters, made once."""

import pytest
import torch
from support.ebm_models import energy_model

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
    return energy_model(torch.float32, vocabulary=len(LETTERS), n=8, splats=12, in_use=12).eval()
