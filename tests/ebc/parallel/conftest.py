"""All that two gloo processes do for the tests of this folder, in one start of them."""

import pytest
from support.ebc_gloo_cases import CASES, SLOW_CASES, Told, start


@pytest.fixture(scope="session")
def told(once) -> Told:
    """What each rank has to say of `CASES`, and what was refused."""
    return once("gloo", lambda folder: start(CASES, folder))


@pytest.fixture(scope="session")
def slowly_told(once) -> Told:
    """The same of `SLOW_CASES`."""
    return once("slow_gloo", lambda folder: start(SLOW_CASES, folder))
