"""The names of `ebc_lab.ebc.options` are those that the settings accept, and load no torch."""

import subprocess
import sys

from ebc_lab.config.choices import groups
from ebc_lab.ebc import options
from ebc_lab.ebc.controller import CONTROLLERS


def test_the_registry_and_the_settings_hold_the_names():
    assert set(CONTROLLERS) == set(options.CONTROLLERS)
    assert set(groups()["budget"]) == {*options.BUDGETS, options.LAGGED}
    assert set(groups()["controller"]) == {"auto", *options.FORENSIC_CONTROLLERS}


def test_options_and_settings_load_without_torch():
    code = "import sys, ebc_lab.ebc.options, ebc_lab.ebc.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
