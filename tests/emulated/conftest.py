"""Marks what needs the emulated device, and skips it where there is none: `make test-emulated`."""

import pytest
from support.emulated import why_not

HERE = __file__.rpartition("/")[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_not()
    for item in items:
        if str(item.path).startswith(HERE):
            item.add_marker(pytest.mark.emulated)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))
