"""All that two gloo processes do for the tests of this folder, in one start of them."""

import pytest
from support.ebc_gloo_cases import CASES, SLOW_CASES, Results, start


@pytest.fixture(scope="session")
def results(once) -> Results:
    """What each rank has to say of `CASES`, and what was refused."""
    return once("gloo", lambda folder: start(CASES, folder))


@pytest.fixture(scope="session")
def rarer_results(once) -> Results:
    """The same of `SLOW_CASES`."""
    return once("slow_gloo", lambda folder: start(SLOW_CASES, folder))
