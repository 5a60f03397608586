import pytest


@pytest.fixture
def study(own_copy):
    """A copy of the finished study, for a test that changes it."""
    return own_copy[1]
