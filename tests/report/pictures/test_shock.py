"""The picture of how arms recover from shocks."""

import numpy as np
import pytest
from support.drawn import GOOD, PLAIN, SEEDS, TRAP, check_sheet, drawn, write_suite

from ebc_lab.report.pictures import shock


def shocked(name, peak, back):
    result = {"shock_peak": peak, "shock_recovery_steps": back}
    return result, {"shock": {"name": name, "step": None, "size": 10.0}}


@pytest.mark.thorough
def test_recovery_has_a_panel_for_each_kind_of_shock_and_a_line_for_each_arm(tmp_path):
    shocks = {
        PLAIN: shocked("lr_spike", 0.4, 12),
        GOOD: shocked("lr_spike", 0.1, 0),
        TRAP: shocked("label_noise", 0.2, None),
    }
    figures = drawn(write_suite(tmp_path, more=shocks, outcomes={}), phone=("recovery",))
    check_sheet(figures["recovery_phone"], "recovery")
    check_sheet(figures["recovery"], "recovery")
    panels = {axes.get_title(loc="left"): axes for axes in figures["recovery"].axes}
    assert set(panels) == {
        "one step at 10 times the learning rate",
        "one batch with 1000% of its targets drawn at random",
    }
    spike, noise = panels.values() if "step" in next(iter(panels)) else reversed(panels.values())
    told = {text.get_text().replace("\n", "  ") for text in spike.texts}
    assert told == {f"{PLAIN}  peak +0.400, back after 12 steps", f"{GOOD}  peak +0.100, back immediately"}
    assert [text.get_text() for text in noise.texts] == [f"{TRAP}  peak +0.200, not back"]
    lines = [line for line in spike.get_lines() if len(line.get_xdata()) > 2]
    assert sum(line.get_alpha() is None for line in lines) == 2
    assert sum(line.get_alpha() is not None for line in lines) == 2 * len(SEEDS)


def test_around_a_shock_no_mean_reaches_over_it():
    losses = np.concatenate([np.full(30, 2.0), [9.0], np.full(5, 3.0), np.full(20, 2.0)])
    offset = np.arange(-20, 40)
    found = dict(zip(offset.tolist(), shock.around(losses, 30, offset).tolist(), strict=True))
    assert found[-20] == found[-1] == 0.0
    assert np.isnan(found[0])
    assert found[1] == found[5] == 1.0
    assert found[10] == pytest.approx(0.5)
    assert found[25] == 0.0
    assert np.isnan(found[26])
