"""Every backend beside what numpy, torch and scikit-learn do, in one run on this machine."""

from .report import Report as Report
from .report import Row as Row
from .runner import PerformanceBenchmark as PerformanceBenchmark
