"""What is said of a model's figures: which are alerts, what their course and its avalanches are."""

import json
import math

import numpy as np
import pytest

from ebc_lab.ebm.diagnose import (
    ALERT,
    COMPARED_WITH,
    FINE,
    UNKNOWN,
    alerts,
    as_markdown,
    as_plain,
    diagnosed,
    findings,
)

WELL = {
    "step": 40.0,
    "val_loss": 2.0,
    "state_spread": 0.5,
    "energy": -20.0,
    "splat_coverage": 0.95,
    "kappa_at_limit": 0.1,
    "kappa_median": 9.0,
    "r2_0p05": 0.02,
    "r2_se_0p05": 0.001,
    "matched_0p05": 0.03,
    "soc_rate": 0.2,
    "load_max": 0.4,
    "dropped_mass": 1e-6,
}
FALLING = [WELL | {"step": 10.0 * i, "energy": -17.0 - i, "soc_rate": 0.3} for i in (1, 2, 3)] + [WELL]


def by_cause(figures, curve):
    return {finding.cause: finding for finding in findings(figures, curve)}


def test_a_healthy_model_has_no_alert_and_every_cause_is_told():
    assert alerts(WELL, FALLING) == []
    found = by_cause(WELL, FALLING)
    assert set(found) == {
        *("energy", "soc_rate", "r2_0p05"),
        *("load_max", "splat_coverage", "kappa_at_limit", "dropped_mass"),
    }
    assert {finding.verdict for finding in found.values()} == {FINE}
    assert {finding.recommendation for finding in found.values()} == {""}


@pytest.mark.parametrize(
    ("name", "threshold", "bad", "good"),
    [
        ("load_max", 0.6, 0.61, 0.6),
        ("splat_coverage", 0.8, 0.79, 0.8),
        ("kappa_at_limit", 0.5, 0.51, 0.5),
        ("dropped_mass", 0.01, 0.0101, 0.01),
        ("soc_rate", 0.3, 0.31, 0.3),
        ("r2_0p05", -0.002, -0.0021, -0.002),
    ],
)
def test_a_figure_beyond_its_threshold_is_the_one_alert(name, threshold, bad, good):
    figures = WELL | {name: bad}
    [alert] = alerts(figures, [*FALLING[:-1], figures])
    assert (alert.cause, alert.figure, alert.verdict) == (name, bad, ALERT)
    assert alert.threshold == pytest.approx(threshold)
    assert "ebm." in alert.recommendation
    assert alerts(WELL | {name: good}, [*FALLING[:-1], WELL | {name: good}]) == []


def test_energy_that_rises_is_an_alert_whose_slope_is_over_two_standard_errors():
    curve = [WELL | {"energy": energy} for energy in (-20.0, -19.1, -17.9, -17.0)]
    [alert] = alerts(curve[-1], curve)
    assert alert.cause == "energy"
    # by hand: slope = sum(t y) / sum(t²) with t = -1.5 … 1.5, its error from the residuals
    assert alert.figure == pytest.approx(1.02)
    residuals = np.array([-20, -19.1, -17.9, -17]) - (-18.5 + 1.02 * np.array([-1.5, -0.5, 0.5, 1.5]))
    assert alert.threshold == pytest.approx(2 * math.sqrt(residuals @ residuals / 2 / 5))


@pytest.mark.parametrize("curve", [[WELL], [WELL, WELL], [*FALLING, WELL | {"energy": math.nan}]])
def test_energy_without_a_trend_is_unknown(curve):
    assert by_cause(curve[-1], curve)["energy"].verdict == UNKNOWN


@pytest.mark.parametrize("name", ["dropped_mass", "soc_rate", "r2_0p05", "r2_se_0p05", "splat_coverage"])
def test_a_figure_that_is_not_known_is_no_alert(name):
    figures = WELL | {name: math.nan}
    found = by_cause(figures, [*FALLING[:-1], figures])
    assert found[name.replace("_se", "")].verdict == UNKNOWN
    assert alerts(figures, [*FALLING[:-1], figures]) == []


def test_soc_rate_is_held_against_its_first_value_over_0():
    rates = [{"soc_rate": rate} for rate in (math.nan, 0.0, 0.1, 0.9, 0.2)]
    curve = [*rates[:1], {}, *rates[1:]]
    [found] = findings(curve[-1], curve)
    assert (found.threshold, found.verdict) == (0.1, ALERT)


def test_nothing_is_said_of_what_a_model_without_splats_lacks():
    figures = {"step": 3.0, "val_loss": 2.0, "state_spread": 0.5}
    assert findings(figures, [figures]) == []
    assert findings({}, []) == []


# -- a whole run ---------------------------------------------------------------------------------------------


def test_trends_are_in_words_and_of_the_figures_that_are_there():
    found = diagnosed(FALLING)
    assert found.trends["energy"] == "decreasing"
    assert found.trends["splat_coverage"] == "stable"
    assert "state_coverage" not in found.trends
    assert found.figures == WELL


def power_law_sizes(count):
    rng = np.random.default_rng(0)
    return np.clip(rng.zipf(1.8, count), 1, 10**6).tolist()


def test_critical_is_said_where_the_power_law_is_not_rejected_and_only_from_50_avalanches_on():
    assert diagnosed(FALLING, power_law_sizes(400)).criticality.startswith("critical: ")
    rng = np.random.default_rng(0)
    other = diagnosed(FALLING, (30 + rng.poisson(20, 400)).tolist())
    assert other.criticality.startswith("not critical: ")
    assert not other.law.critical
    few = diagnosed(FALLING, power_law_sizes(49))
    assert few.law is None
    assert few.criticality.startswith("not tested: 49 avalanches")
    assert diagnosed(FALLING, power_law_sizes(50)).law is not None


def test_a_diagnosis_can_be_written_as_json_and_as_markdown():
    figures = WELL | {"dropped_mass": 0.5, "soc_rate": math.nan}
    found = diagnosed([*FALLING[:-1], figures], power_law_sizes(60))
    plain = json.loads(json.dumps(as_plain(found)))
    assert plain["law"]["alpha"] == found.law.alpha
    [alert] = [finding for finding in plain["findings"] if finding["verdict"] == ALERT]
    assert (alert["cause"], alert["figure"], alert["threshold"]) == ("dropped_mass", 0.5, 0.01)
    page = as_markdown("Diagnosis", found)
    assert f"| dropped_mass | 0.5 | 0.01 | alert | {alert['recommendation']} |" in page
    assert "| soc_rate | – | 0.3 | unknown | – |" in page
    assert "* energy: decreasing" in page
    assert COMPARED_WITH in page
    assert COMPARED_WITH not in as_markdown("Without", diagnosed([{"step": 1.0, "load_max": 0.4}]))
    assert diagnosed([]).figures == {}
    assert "not tested: 0 avalanches" in as_markdown("Empty", diagnosed([]))
