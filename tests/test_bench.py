from dataclasses import replace

from ebc_lab.bench import overhead_and_record, paired_overhead
from ebc_lab.config import run_part
from ebc_lab.data import locate
from ebc_lab.overrides import compose
from ebc_lab.telemetry import read_json


def shape(tiny):
    run = run_part(compose([o for o in tiny if not o.startswith(("lr_s", "cal", "fin"))] + ["steps=40"], study=False))
    return replace(run, data=replace(run.data, sha256=locate(run.data).sha256))


def test_overhead_is_measured_in_pairs_of_audit_intervals(tiny):
    found = paired_overhead(shape(tiny))
    assert found["pairs"] == 2
    low, high = found["overhead_iqr_pct"]
    assert low <= found["overhead_pct"] <= high
    assert found["plain_steps_per_s"] > 0


def test_a_failed_measurement_is_recorded_as_failed(tiny, tmp_path):
    run = shape(tiny)
    overhead_and_record(replace(run, optimizer=replace(run.optimizer, name="nothing")), tmp_path, "x", "0" * 64)
    assert read_json(tmp_path / "result.json")["outcome"] == "failed"
    assert "KeyError" in (tmp_path / "log.txt").read_text()
