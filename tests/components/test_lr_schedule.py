"""Learning-rate schedules: the factor on the peak at each step."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebc_lab.components.lr_schedule import LR_SCHEDULES, lr_factor, lr_schedule
from ebc_lab.config.errors import UserError
from ebc_lab.config.parts.lr_schedule import LRScheduleConfig


def plainly(name, t, n, warmup, decay):
    """The formulas again, in the order in which they are said."""
    if t < warmup:
        up = (t + 1) / warmup
        return min(up, (1 - t / n) / decay) if name == "trapezoid" else up
    if name == "constant":
        return 1.0
    if name == "warmup_linear":
        return 1 - (t - warmup) / (n - warmup)
    if name == "cosine":
        return (1 + math.cos(math.pi * (t - warmup) / (n - warmup))) / 2
    if name == "inverse_sqrt":
        return (max(1, warmup) / (t + 1)) ** 0.5
    held = (1 - decay) * n
    return 1.0 if t <= held else (n - t) / (n - held)


@given(
    st.sampled_from(sorted(LR_SCHEDULES)),
    st.integers(2, 400),
    st.integers(0, 100),
    st.floats(0.01, 1.0),
)
def test_every_factor_is_the_plain_formulas_and_lies_between_0_and_1(name, steps, warmup, decay):
    warmup = min(warmup, steps - 1)
    config = LRScheduleConfig(name, warmup_steps=warmup, decay_share=decay)
    got = [lr_factor(config, t, steps) for t in range(steps)]
    plain = 0 if name == "constant" else warmup
    assert got == pytest.approx([plainly(name, t, steps, plain, decay) for t in range(steps)])
    assert all(0 < f <= 1 for f in got)
    falls = name not in ("constant", "inverse_sqrt")
    assert (lr_factor(config, steps, steps) == pytest.approx(0)) == falls


@pytest.mark.parametrize("steps", [1, 2, 10, 21])
@pytest.mark.parametrize("name", LR_SCHEDULES)
def test_a_short_run_still_moves_at_every_step_and_reaches_the_peak(name, steps):
    warmup = 20 if name != "trapezoid" else steps // 2
    config = LRScheduleConfig(name, warmup_steps=warmup)
    got = [lr_factor(config, t, steps) for t in range(steps)]
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
