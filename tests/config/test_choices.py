"""Runs of another size."""

from dataclasses import replace

import pytest

from ebc_lab.config.choices import with_size
from ebc_lab.config.compose import compose
from ebc_lab.config.dicts import run_part
from ebc_lab.config.schema import ArmConfig


@pytest.mark.parametrize(
    ("scale", "expected"), [(2.5, (160, 60, 50)), (1.0, (64, 24, 20)), (1e-6, (4, 1, 1))], ids=str
)
def test_a_run_of_another_size_keeps_its_heads_and_is_never_empty(scale, expected):
    run = run_part(compose(["scale=smoke"], study=False))
    run = replace(run, steps=20, batch_size=24, model=replace(run.model, width=64, heads=4))
    arm = ArmConfig(width_scale=scale, batch_scale=scale, steps=scale)
    made = with_size(run, arm)
    assert (made.model.width, made.batch_size, made.steps) == expected
    assert made.model.heads == 4
