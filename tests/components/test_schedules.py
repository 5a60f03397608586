"""Learning-rate schedules: the factor on the peak at each step."""

from itertools import pairwise

import pytest

from ebc_lab.components.schedules import LR_SCHEDULES, lr_factor, lr_schedule
from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import LRScheduleConfig


def factors(name, steps, warmup=20):
    config = LRScheduleConfig(name, warmup_steps=warmup)
    return [lr_factor(config, t, steps) for t in range(steps)]


def test_constant():
    assert factors("constant", 50) == [1.0] * 50


def test_warmup_then_linear_decay_to_almost_zero():
    got = factors("warmup_linear", 100, warmup=20)
    assert got[:20] == pytest.approx([(t + 1) / 20 for t in range(20)])
    assert got[20] == 1.0
    falls = [a - b for a, b in pairwise(got[20:])]
    assert falls == pytest.approx([1 / 80] * 79)
    assert got[-1] == pytest.approx(1 / 80)
    assert lr_factor(LRScheduleConfig("warmup_linear"), 100, 100) == 0


def test_without_warmup_it_starts_at_the_peak():
    assert factors("warmup_linear", 4, warmup=0) == pytest.approx([1, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("steps", [1, 2, 10, 21])
@pytest.mark.parametrize("name", LR_SCHEDULES)
def test_a_short_run_still_moves_at_every_step_and_reaches_the_peak(name, steps):
    got = factors(name, steps, warmup=20)
    assert all(0 < f <= 1 for f in got)
    assert max(got) == 1


def test_a_rate_is_the_peak_times_its_factor(tmp_path):
    config = LRScheduleConfig("warmup_linear", warmup_steps=2)
    rate = lr_schedule(config, 0.5, 10, tmp_path)
    assert [rate(t) for t in range(10)] == [0.5 * lr_factor(config, t, 10) for t in range(10)]


def record(folder, rates):
    folder.mkdir()
    rows = [f"{t},{rate}" for t, rate in enumerate(rates)]
    (folder / "steps.csv").write_text("\n".join(["step,eta_eff", *rows]) + "\n")


def test_a_replay_is_what_another_run_applied_whatever_the_peak(tmp_path):
    record(tmp_path / "source", [0.1, 0.0, 0.3])
    beside = lr_schedule(LRScheduleConfig("replay", source="source"), 99.0, 3, tmp_path)
    named = lr_schedule(
        LRScheduleConfig("replay", source=str(tmp_path / "source")), 99.0, 2, tmp_path / "elsewhere"
    )
    assert [beside(t) for t in range(3)] == [0.1, 0.0, 0.3]
    assert [named(t) for t in range(2)] == [0.1, 0.0]


def test_a_replay_without_a_long_enough_record_is_refused(tmp_path):
    record(tmp_path / "source", [0.1, 0.2])
    with pytest.raises(UserError, match="records 2 steps, fewer than the 3"):
        lr_schedule(LRScheduleConfig("replay", source="source"), 1.0, 3, tmp_path)
    with pytest.raises(UserError, match="to replay"):
        lr_schedule(LRScheduleConfig("replay", source="nothing"), 1.0, 3, tmp_path)


@pytest.mark.parametrize("content", ["", "step,loss\n0,1.0\n", "step,eta_eff\n0,much\n"])
def test_a_file_that_is_no_record_is_refused(tmp_path, content):
    (tmp_path / "source").mkdir()
    (tmp_path / "source/steps.csv").write_text(content)
    with pytest.raises(UserError, match="is no record of a run"):
        lr_schedule(LRScheduleConfig("replay", source="source"), 1.0, 1, tmp_path)
