"""The names of `ebc_lab.ebc.options` are those that the registries and the settings accept, and cost no torch."""

import subprocess
import sys

from ebc_lab.config import checks
from ebc_lab.config.choices import groups
from ebc_lab.ebc import options
from ebc_lab.ebc.controller import CONTROLLERS
from ebc_lab.ebc.grouping import GROUPINGS
from ebc_lab.ebc.surrogate import AGGREGATES
from ebc_lab.records import figures


def test_both_sides_call_the_same_steps_clipped():
    assert figures.CLIPPED_BELOW == options.CLIPPED_BELOW


def test_both_sides_refuse_the_same_targets():
    assert checks.LEAST_KL == options.LEAST_TARGET_KL == {k: 10 * f for k, f in options.KL_FLOOR.items()}
    assert checks.LOWEST == options.LEAST_MULTIPLIER


def test_the_registries_hold_the_names():
    assert set(CONTROLLERS) == set(options.FORENSIC_CONTROLLERS)
    assert set(GROUPINGS) == set(options.GROUPINGS)
    assert set(AGGREGATES) == set(options.AGGREGATES)
    assert set(groups()["budget"]) == set(options.BUDGETS)
    assert set(groups()["controller"]) == {"auto", *options.FORENSIC_CONTROLLERS}


def test_the_settings_take_the_names():
    choices = checks.CHOICES
    assert set(choices["budget.schedule"]) == set(choices["stabilizer.schedule"]) == set(options.SCHEDULES)
    assert set(choices["budget.grouping"]) == set(options.GROUPINGS)
    assert set(choices["budget.cadence"]) == set(options.FORENSIC_CADENCES)
    assert set(choices["budget.guard"]) == set(options.GUARDS)
    assert set(choices["budget.aggregate"]) == set(options.AGGREGATES)
    assert set(choices["budget.units"]) == set(options.UNITS)


def test_the_options_load_without_torch():
    code = "import sys, ebc_lab.ebc.options; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
