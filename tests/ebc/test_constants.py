"""Two rules stand twice, because the study must not import torch and the method must not import the study."""

from ebc_lab import telemetry, validation
from ebc_lab.ebc import budget


def test_both_sides_call_the_same_steps_clipped():
    assert telemetry.CLIPPED_BELOW == budget.CLIPPED_BELOW


def test_both_sides_refuse_the_same_targets():
    assert validation.LEAST_KL == {"float32": 10 * budget.FLOOR_FLOAT32, "bfloat16": 10 * budget.FLOOR_BFLOAT16}
