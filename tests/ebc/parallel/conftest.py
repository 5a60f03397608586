"""All that two gloo processes do for the tests of this folder, in one start of them."""

import pytest
from support.ebc_gloo_cases import CASES, SLOW_CASES, Told, start


@pytest.fixture(scope="session")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """What each rank has to say of `CASES`, and what was refused."""
    return start("train_and_refuse", CASES, tmp_path_factory.mktemp("gloo"))


@pytest.fixture(scope="session")
def slowly_told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """The same of `SLOW_CASES`."""
    return start("train", SLOW_CASES, tmp_path_factory.mktemp("slow_gloo"))
