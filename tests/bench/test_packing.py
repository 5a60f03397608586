"""How many runs should share a GPU."""

from dataclasses import replace

import pytest

from ebc_lab.bench import packing
from ebc_lab.config.compose import compose
from ebc_lab.config.dicts import run_part
from ebc_lab.config.errors import UserError


@pytest.fixture
def run(tiny):
    return replace(run_part(compose(tiny)), dtype="float32")


def test_the_smallest_number_near_the_best_is_chosen():
    assert packing.smallest_near_best({1: 100.0, 2: 180.0, 4: 300.0, 8: 310.0}) == 4
    assert packing.smallest_near_best({1: 100.0, 2: 104.0}) == 1
    assert packing.smallest_near_best({1: 100.0, 2: 90.0}) == 1


@pytest.mark.parametrize("stabilizer", ["none", "ebc"])
def test_packing_is_measured_with_whole_runs(run, stabilizer):
    """On a CPU here, where nobody asks for it: the same code as on a GPU."""
    shape = replace(run, stabilizer=replace(run.stabilizer, name=stabilizer))
    found = packing.measure_packing(shape, counts=(1, 2), steps=3)
    assert list(found["tokens_per_s"]) == ["1", "2"]
    assert all(rate > 0 for rate in found["tokens_per_s"].values())
    assert found["runs_per_worker"] in (1, 2)


def test_a_number_of_runs_that_memory_does_not_hold_is_left_out(run, monkeypatch):
    from ebc_lab.components import optimizer as optimizers

    build = optimizers.build
    built = []

    def full_at_the_third(*asked, **named):
        if len(built) == 2:
            raise MemoryError("no more")
        built.append(asked)
        return build(*asked, **named)

    monkeypatch.setattr(optimizers, "build", full_at_the_third)
    assert list(packing.measure_packing(run, counts=(1, 2, 4), steps=3)["tokens_per_s"]) == ["1", "2"]


def test_a_cpu_carries_one_run_a_worker_without_being_asked(run, monkeypatch):
    monkeypatch.setattr(packing, "measured", None)
    assert packing.packing(run) == {"runs_per_worker": 1, "tokens_per_s": {}, "eager": []}


def test_a_measurement_is_made_and_reported_once_per_shape(run, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = {"runs_per_worker": 4, "tokens_per_s": {"1": 1e5, "4": 3e5}, "eager": ["optimizer=soap"]}
    measured = []
    said = []
    monkeypatch.setattr(packing, "measured", lambda run: measured.append(run) or found)
    run = replace(run, device="cuda")
    assert [packing.packing(run, said.append) for _ in range(2)] == [found, found]
    rates = "4 run(s) share a GPU: tokens/s of all together 100,000 with 1, 300,000 with 4"
    assert said[1:] == [f"{rates}; steps are taken eagerly (optimizer=soap)"]
    other = replace(run, dtype="bfloat16")
    assert packing.packing(other) == found
    assert measured == [run, other]


@pytest.mark.slow
def test_packing_is_measured_in_a_process_of_its_own(run):
    assert set(packing.measured(run)["tokens_per_s"]) == {str(count) for count in packing.COUNTS}
    with pytest.raises(UserError, match=r"measuring the packing failed: .*a run ended"):
        packing.measured(replace(run, optimizer=replace(run.optimizer, lr=1e30)))
