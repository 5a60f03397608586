from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebc_lab.config import (
    Config,
    RunConfig,
    UserError,
    canonical_json,
    compose,
    digest,
    from_dict,
    groups,
    identity,
    run_part,
    to_dict,
)


def resolved(*overrides: str, study: bool = False) -> Config:
    config = compose(["scale=smoke", "device=cpu", *overrides], study=study)
    return replace(config, data=replace(config.data, sha256="0" * 64))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["scal=smoke"], ["scal", "did you mean scale"]),
        (["scale=smok"], ["did you mean smoke", "laptop, paper or smoke"]),
        (["+extra=1"], ["extra is not a setting"]),
        (["++model.widht=3"], ["did you mean model.width"]),
        (["~seeds"], ["cannot be deleted"]),
        (["optimizer=adan"], ["did you mean adam"]),
        (["steps"], ["KEY=VALUE"]),
        (["model.width=abc"], ["model.width", "abc"]),
        (["optimizer.lr=-1"], ["optimizer.lr", "> 0", "-1"]),
        (["optimizer.lr=inf"], ["optimizer.lr", "finite"]),
        (["optimizer.lr=nan"], ["optimizer.lr", "finite"]),
        (["model.heads=3"], ["multiple of model.heads"]),
        (["budget.probe_sequences=24"], ["probe_sequences", "1 to 23"]),
        (["study.name=../x"], ["study.name", "plain folder name"]),
        (["study.name='a b'"], ["study.name"]),
        (["study.name=.."], ["study.name"]),
        (["seeds=[]"], ["seeds"]),
        (["seeds=[1,1]"], ["twice"]),
        (["data=path"], ["data.file"]),
        (["data.file=x"], ["data=path"]),
        (["lr_sweep.grids.adam=[2e-3,1e-3]"], ["increasing"]),
        (["lr_scale.scales=[2.0]"], ["must contain 1"]),
        (["study.band=[0.7,0.5]"], ["study.band"]),
        (["lr_sweep.optimizers=[lion]"], ["lion"]),
    ],
)
def test_a_mistake_is_refused_in_one_sentence_that_names_it(overrides, words):
    with pytest.raises(UserError) as caught:
        compose(["scale=smoke", *overrides] if "scal" not in overrides[0] else overrides, study=False)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("override", ["optimizer.lr=1e-3", "seed=3", "steps=10", "budget.target_kl=0.1", "stabilizer=none"])
def test_a_study_refuses_settings_that_it_decides_itself(override):
    with pytest.raises(UserError):
        compose(["scale=smoke", override])
    compose(["scale=smoke", override], study=False)


def test_groups_narrow_what_a_study_covers():
    config = compose(["scale=laptop", "optimizer=muon", "projection=spectral", "budget=surrogate"])
    assert config.lr_sweep.optimizers == ["muon"]
    assert config.lr_sweep.projections == ["spectral"]
    assert config.calibrate.budgets == ["surrogate"]


def test_scales_hold_what_their_table_says():
    laptop, paper = compose(["scale=laptop"]), compose(["scale=paper"])
    assert (laptop.batch_size, laptop.model.context, laptop.lr_sweep.steps, laptop.finals.steps) == (16, 64, 200, 600)
    assert laptop.lr_sweep.grids["adam"] == [1e-3, 2e-3, 4e-3, 8e-3]
    assert (paper.batch_size, paper.model.context, paper.finals.steps, len(paper.seeds)) == (64, 256, 2000, 5)
    assert paper.lr_sweep.projections == ["none", "spectral"]
    assert compose([]).scale == "laptop"  # no GPU in tests


def test_every_choice_of_every_group_composes():
    for group, choices in groups().items():
        for choice in choices:
            extra = ["data.file=README.md"] if choice == "path" else []
            compose(["scale=smoke", f"{group}={choice}", *extra] if group != "scale" else [f"scale={choice}"], study=False)


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
