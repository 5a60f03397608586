"""Some rules stand twice, because the study must not import torch and the method must not import the study."""

from ebc_lab.config import checks
from ebc_lab.config.choices import groups
from ebc_lab.ebc import budget, clip
from ebc_lab.records import figures


def test_both_sides_call_the_same_steps_clipped():
    assert figures.CLIPPED_BELOW == budget.CLIPPED_BELOW


def test_both_sides_refuse_the_same_targets():
    assert checks.LEAST_KL == {"float32": 10 * budget.FLOOR_FLOAT32, "bfloat16": 10 * budget.FLOOR_BFLOAT16}
    assert checks.LOWEST == clip.LOWEST


def test_both_sides_know_the_same_names():
    from ebc_lab.ebc.controller import CONTROLLERS, SCHEDULES
    from ebc_lab.ebc.grouping import GROUPINGS
    from ebc_lab.ebc.sensitivity import CADENCES
    from ebc_lab.ebc.surrogate import AGGREGATES, GUARDS

    choices = checks.CHOICES
    assert set(choices["budget.schedule"]) == set(choices["stabilizer.schedule"]) == set(SCHEDULES)
    assert set(choices["budget.grouping"]) == set(GROUPINGS)
    assert set(choices["budget.cadence"]) == set(CADENCES)
    assert set(choices["budget.guard"]) == set(GUARDS)
    assert set(choices["budget.aggregate"]) == set(AGGREGATES)
    assert set(choices["budget.units"]) == set(clip.UNITS)
    assert set(groups()["budget"]) == set(clip.BUDGETS)
    assert set(groups()["controller"]) == {"auto", *CONTROLLERS}
