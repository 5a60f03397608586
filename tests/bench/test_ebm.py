"""What an energy-based model's step is compared with, and the share of what follows it."""

from dataclasses import replace

import pytest

from ebc_lab.bench.compared import EBM, energy_steps
from ebc_lab.bench.pairs import Effort
from ebc_lab.config.compose import compose
from ebc_lab.config.dicts import run_part
from ebc_lab.workloads.corpus import locate


@pytest.mark.thorough
def test_an_energy_based_step_is_compared_with_a_gpts_and_with_itself_without_its_parts(tiny):
    overrides = [o for o in tiny if "." not in o or o.split("=")[0].partition(".")[0] in ("model", "data")]
    small = ["workload=ebm", "ebm.revive_every=2", "ebm.soc_every=2", "ebm.splats=8"]
    run = run_part(compose([*overrides, *small], study=False))
    run = replace(run, data=replace(run.data, sha256=locate(run.data).sha256))
    found = energy_steps(run, Effort(rounds=1, limit_s=0.0))
    assert [(c["what"], c["against"]) for c in found["compared"]] == [
        (name, against) for name, (_, against) in EBM.items()
    ]
    assert all(c["times"]["median"] > 0 for c in found["compared"])
    assert 0 < found["after_step_pct"]["median"] < 100
