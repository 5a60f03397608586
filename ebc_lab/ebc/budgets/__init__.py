"""How c is found: one class for each budget, with its state, what it needs of a step, and `find_c`."""

from .budget import Budget, Need
from .calibrated import Calibrated
from .fisher import Fisher
from .lagged import Lagged
from .shadow import Shadow
from .surrogate import Surrogate
from .tracked import Tracked

BUDGETS: dict[str, type[Budget]] = {
    "shadow": Shadow,
    "tracked": Tracked,
    "surrogate": Surrogate,
    "fisher": Fisher,
    "calibrated": Calibrated,
    "lagged": Lagged,
}

__all__ = ["BUDGETS", "Budget", "Lagged", "Need", "Surrogate"]
