import functools
from dataclasses import replace

import pytest

from ebc_lab.config import identity as names
from ebc_lab.config.compose import compose
from ebc_lab.config.dicts import from_dict, run_part, to_dict
from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import canonical_json, digest, environment, identity, run_id
from ebc_lab.config.parts.optimizer import OptimizerConfig
from ebc_lab.config.schema import Config, RunConfig
from ebc_lab.study.store.reuse import environment_changes


@functools.cache
def config_with(*overrides: str, study: bool = False) -> Config:
    config = compose(["scale=smoke", "device=cpu", *overrides], study=study)
    return replace(config, data=replace(config.data, sha256="0" * 64))


@pytest.mark.thorough
def test_identity_keeps_what_changes_numbers_and_nothing_else():
    base = config_with()
    name = digest(identity(base))
    for change in ("launcher=inline", "output_dir=elsewhere", "seeds=[7]", "lr_sweep.steps=99"):
        assert digest(identity(config_with(change))) == name, change
    changes = ("seed=1", "steps=61", "optimizer.lr=1e-3", "threads_per_run=2", "dtype=bfloat16", "compile=on")
    names = {digest(identity(config_with(c))) for c in changes}
    assert len(names) == len(changes)
    assert name not in names
    assert identity(replace(base, data=replace(base.data, sha256="1" * 64))) != identity(base)


def test_identity_wants_everything_resolved():
    for still_open in ("threads_per_run=0", "dtype=auto", "compile=auto", "device=auto"):
        with pytest.raises(UserError, match="must be resolved before a run can be named"):
            identity(config_with(still_open))


def test_canonical_json_does_not_depend_on_the_order_of_keys():
    assert canonical_json({"b": {"d": 1, "c": [2]}, "a": 3}) == canonical_json(
        {"a": 3, "b": {"c": [2], "d": 1}}
    )


def test_axiom_without_a_momentum_reads_nothing_of_it_and_the_others_read_their_momentum():
    of_momentum = {"beta1", "momentum_weight", "streak_boost", "snr_floor"}
    for name, rank, unread in (("axiom", 0, of_momentum), ("axiom", 2, set()), ("adam", 0, set())):
        assert set(OptimizerConfig(name, rank=rank).unread()) == unread


@pytest.mark.thorough
def test_a_warmup_given_as_a_share_is_the_warmup_in_steps():
    share = config_with("lr_schedule=trapezoid", "lr_schedule.warmup_share=0.1")
    steps = config_with("lr_schedule=trapezoid", "lr_schedule.warmup_steps=6")  # of 60
    assert identity(share) == identity(steps)
    assert run_id("train", run_part(share)) == run_id("train", run_part(steps))
    assert identity(share)["lr_schedule"] == {"name": "trapezoid", "warmup_steps": 6, "decay_share": 0.4}


@pytest.mark.thorough
def test_a_replay_is_named_by_its_record_where_that_is_known():
    by_id = config_with("lr_schedule=replay", "lr_schedule.source=x")
    assert identity(by_id) != identity(config_with("lr_schedule=replay", "lr_schedule.source=y"))
    known = ["lr_schedule=replay", "lr_schedule.sha256=abc"]
    x, y = (config_with(*known, f"lr_schedule.source={source}") for source in ("x", "y"))
    assert identity(x) == identity(y) != identity(by_id)


# -- libraries -----------------------------------------------------------------------------------------------

LIBRARIES = {"optimizer=lion": "pytorch-optimizer", "optimizer=adam8bit": "torchao"}
LIBRARIES |= {"stabilizer=agc": "pytorch-optimizer"}


def name_with(choice):
    return run_id("train", run_part(config_with("stabilizer=none", choice)))


@pytest.mark.thorough
@pytest.mark.parametrize("choice", LIBRARIES)
def test_a_run_is_named_by_the_library_that_computes_it_too(choice, monkeypatch):
    before = name_with(choice)
    others = {c: name_with(c) for c, library in LIBRARIES.items() if library != LIBRARIES[choice]}
    real = names.library_version
    newer = lambda name: "99.1.0" if name == LIBRARIES[choice] else real(name)  # noqa: E731
    monkeypatch.setattr(names, "library_version", newer)
    monkeypatch.setattr(names, "_NAMES", {})  # as in another process
    assert name_with(choice) != before
    assert name_with(choice).rpartition("-")[0] == before.rpartition("-")[0]
    assert {c: name_with(c) for c in others} == others


@pytest.mark.thorough
def test_records_made_before_libraries_were_named_keep_their_names():
    soap = run_part(config_with("stabilizer=none", "optimizer=soap"))
    now = identity(soap)
    before = {k: v for k, v in now.items() if k != "libraries"}
    with names.recorded_environment(environment(before)):
        assert names.identity_of("train", soap) == before
    with names.recorded_environment(environment({**now, "libraries": {"pytorch-optimizer": "3.0"}})):
        assert names.identity_of("train", soap)["libraries"] == {"pytorch-optimizer": "3.0"}
        adam = run_part(config_with("stabilizer=none", "optimizer=adam"))
        assert names.identity_of("train", adam) == identity(adam)


def test_a_record_from_before_a_setting_keeps_its_name_and_means_what_it_did():
    run = run_part(config_with("stabilizer=ebc", "budget=tracked"))
    recorded = to_dict(replace(run, budget=replace(run.budget, stretch=None)))
    del recorded["budget"]["stretch"]
    earlier = from_dict(RunConfig, recorded)
    assert earlier.budget.stretch is None
    assert "stretch" not in identity(earlier)["budget"]
    assert identity(run)["budget"] == {**identity(earlier)["budget"], "stretch": 1.5}


@pytest.mark.thorough
def test_an_arms_library_is_part_of_what_a_study_was_made_with(monkeypatch):
    config = config_with("study=stabilizers", study=True)
    assert set(names.study_environment(config)["libraries"]) == {"pytorch-optimizer"}  # that of its arm agc
    finetune = config_with("study=finetune", study=True)
    finetune = replace(finetune, tokens=replace(finetune.tokens, sha256="0" * 64))
    assert set(names.study_environment(finetune)["libraries"]) == {"peft"}  # of its arm lora's adapter
    assert "libraries" not in names.study_environment(config_with("study=controls", study=True))
    both = config_with("lr_sweep.optimizers=[adam8bit,lion]", study=True)
    header = {"environment": names.study_environment(both)}
    assert environment_changes(both, header) == []
    monkeypatch.setattr(names, "library_version", lambda name: "99.1.0")
    assert {(what, now) for what, _, now in environment_changes(both, header)} == {
        ("pytorch-optimizer", "99.1.0"),
        ("torchao", "99.1.0"),
    }
