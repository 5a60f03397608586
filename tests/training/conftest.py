"""A run that takes a second."""

import pytest
from support.runs import resolved

from ebc_lab.config.compose import compose
from ebc_lab.config.dicts import run_part


@pytest.fixture
def run(tiny):
    chosen = [o for o in tiny if not o.startswith(("lr_s", "cal", "fin"))]
    return resolved(run_part(compose([*chosen, "optimizer.lr=1e-2", "steps=30"], study=False)))
