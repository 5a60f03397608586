from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebc_lab.config import Config, RunConfig, UserError, canonical_json, digest, from_dict, identity, run_part, to_dict
from ebc_lab.overrides import compose


def resolved(*overrides: str, study: bool = False) -> Config:
    config = compose(["scale=smoke", "device=cpu", *overrides], study=study)
    return replace(config, data=replace(config.data, sha256="0" * 64))


def test_identity_keeps_what_changes_numbers_and_nothing_else():
    base = resolved()
    name = digest(identity(base))
    for change in ("launcher=inline", "output_dir=elsewhere", "study.name=other", "seeds=[7]", "lr_sweep.steps=99"):
        assert digest(identity(resolved(change))) == name, change
    changes = ["seed=1", "steps=61", "optimizer.lr=1e-3", "batch_size=25", "threads_per_run=2", "dtype=bfloat16"]
    changes += ["budget.target_kl=0.02", "stabilizer=none", "projection=spectral", "lr_schedule=warmup_linear"]
    names = {digest(identity(resolved(c))) for c in changes}
    assert len(names) == len(changes)
    assert name not in names
    assert identity(replace(base, data=replace(base.data, sha256="1" * 64))) != identity(base)


def test_settings_without_effect_do_not_split_a_run_in_two():
    plain = resolved("stabilizer=none")
    assert identity(plain) == identity(resolved("stabilizer=none", "budget.target_kl=0.5", "controller=pi"))
    assert identity(plain) == identity(resolved("stabilizer=none", "lr_schedule.warmup_steps=7", "projection.bound=9"))
    assert identity(plain) == identity(resolved("stabilizer=none", "optimizer.momentum=0.5"))
    assert identity(resolved()) == identity(resolved("budget.aggregate=l2", "budget.probe=fd", "budget.cadence=published"))
    assert identity(resolved("budget=surrogate")) != identity(resolved("budget=surrogate", "budget.aggregate=l2"))


def test_pi_audits_every_20_steps_and_auto_follows_the_budget():
    assert identity(resolved("controller=pi"))["audit_every"] == 20
    assert identity(resolved())["controller"]["name"] == "fixed"
    assert identity(resolved("budget=surrogate"))["controller"]["name"] == "log_pi"


def test_identity_wants_everything_resolved():
    with pytest.raises(UserError):
        identity(compose(["scale=laptop"], study=False))


def test_dict_round_trip_and_unknown_key():
    run = run_part(resolved())
    assert from_dict(RunConfig, to_dict(run)) == run
    with pytest.raises(UserError, match="another version"):
        from_dict(RunConfig, {**to_dict(run), "surprise": 1})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@settings(derandomize=True, deadline=None)
@given(st.dictionaries(st.text(), json_values))
def test_canonical_json_does_not_depend_on_the_order_of_keys(value):
    backwards = dict(reversed(list(value.items())))
    assert canonical_json(value) == canonical_json(backwards)
