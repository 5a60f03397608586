"""The picture of how arms recover from shocks."""

import numpy as np
import pytest
from support.drawn import GOOD, PLAIN, TRAP, check_sheet, drawn, write_suite
from support.seen import assert_as_recorded, sheets_text

from ebc_lab.report.pictures import shock


def shocked(name, peak, back):
    result = {"shock_peak": peak, "shock_recovery_steps": back}
    return result, {"shock": {"name": name, "step": None, "size": 10.0}}


def test_recovery_has_a_panel_for_each_kind_of_shock_and_a_line_for_each_arm(tmp_path):
    shocks = {
        PLAIN: shocked("lr_spike", 0.4, 12),
        GOOD: shocked("lr_spike", 0.1, 0),
        TRAP: shocked("label_noise", 0.2, None),
    }
    figures = drawn(write_suite(tmp_path, more=shocks, outcomes={}), "recovery", phone=("recovery",))
    for name, figure in figures.items():
        check_sheet(figure, name)
    assert_as_recorded("pictures_shock", sheets_text(figures))


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
