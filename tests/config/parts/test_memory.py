"""Memory settings: what is refused, and what they imply."""

import sys

import pytest
from support.named import run

from ebc_lab.config.checks import validate_run
from ebc_lab.config.compose import compose, implied
from ebc_lab.config.errors import UserError

HOOKED = {"optimizer": {"name": "axiom"}, "memory": {"name": "hooks"}, "stabilizer": {"name": "none"}}
LAGGED = {**HOOKED, "stabilizer": {"name": "ebc"}, "budget": {"name": "lagged"}}


def test_what_goes_together_is_accepted():
    for settings in (HOOKED, LAGGED, {"memory": {"name": "int4"}}, HOOKED | {"memory": {"name": "all"}}):
        validate_run(run(settings))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"stabilizer": {"name": "norm_clip"}}, "stabilizer=norm_clip: .* stabilizer=ebc with budget=lagged"),
        ({"stabilizer": {"name": "ebc"}}, "budget=tracked: .* choose budget=lagged"),
        ({"model": {"dropout": 0.1}}, "model.dropout: .* leave it at 0"),
        ({"curve_every": 10}, "curve_every: .* leave curve_every=0"),
        ({"quantizer": {"gradients": "five"}}, "quantizer.gradients: no gradient is left"),
        ({"policy": {"name": "random"}}, "choose policy=constant"),
        (LAGGED | {"budget": {"name": "lagged", "probe_tokens": "held"}}, "budget.probe_tokens: leave it"),
        (LAGGED | {"budget": {"name": "lagged", "grouping": "matrices"}}, "matrices: .* another grouping"),
        (LAGGED | {"controller": {"name": "agreement"}}, "compares no losses"),
    ],
)
def test_what_needs_more_than_hooks_leave_is_refused(settings, told):
    with pytest.raises(UserError, match=told):
        validate_run(run(HOOKED, settings))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"memory": {"name": "int4"}, "compile": "on"}, "leave compile at off"),
        ({"optimizer": {"name": "galore", "rank": 0}}, "galore needs optimizer.rank >= 1"),
        ({"optimizer": {"name": "ldog"}, "param_dtype": "bfloat16"}, "ldog begins with steps of a millionth"),
        ({"optimizer": {"name": "axiom", "rank": -1}}, "optimizer.rank must be a whole number >= 0"),
        ({"memory": {"name": "none", "activations": "int3"}}, "memory.activations=int3 is unknown"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, told):
    with pytest.raises(UserError, match=told):
        validate_run(run(settings))


def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    words = r"needs the library torchao: pip install 'ebc-lab\[axiom\]'"
    with pytest.raises(UserError, match=f"^optimizer=adam8bit {words}"):
        compose(["scale=smoke", "stabilizer=none", "optimizer=adam8bit"], study=False)
    swept = ["lr_sweep.optimizers=[adam,adam8bit]", "+lr_sweep.grids.adam8bit=[1e-3]"]
    asked = {r"ablation\.arms\.adam8bit": ["study=memory"], r"lr_sweep\..*=adam8bit": swept}
    for where, study in asked.items():
        with pytest.raises(UserError, match=rf"^{where}: optimizer=adam8bit {words}"):
            compose(["scale=smoke", *study])


def test_hooks_imply_the_plain_optimizer_where_nothing_else_is_asked_for():
    assert implied(["memory=hooks"])[1:] == ["stabilizer=none"]
    assert implied(["memory.hooks=true"])[1:] == ["stabilizer=none"]
    ebc = (["memory=hooks", "stabilizer=ebc"], ["memory=all", "budget=lagged"])
    for given in (["memory=int4"], ["memory=all", "memory.hooks=false"], *ebc):
        assert implied(given) == given
