"""The engines."""

from collections.abc import Iterator

import pytest

from ebc_lab.verity import use_engine
from ebc_lab.verity.engine import why_not_native


@pytest.fixture(params=["eager", "c"])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each engine in turn."""
    if request.param == "c" and why_not_native():
        pytest.skip(why_not_native())
    use_engine(request.param)
    yield request.param
    use_engine("auto")
