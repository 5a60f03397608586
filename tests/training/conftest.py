"""A run that takes a second."""

import pytest
from support.runs import short_run


@pytest.fixture
def run(tiny):
    return short_run(tiny, "steps=30")
