"""Settings of determinism and of several processes: what is refused, what names a run, and what follows.

What of two choices do not go together is in test_golden_ids: every pair of choices."""

import re

import pytest
from support.named import name_of, run

from ebc_lab.bench.speeds import chosen_by_rule
from ebc_lab.config.checks import validate_run
from ebc_lab.config.compose import compose, implied
from ebc_lab.config.dicts import run_part
from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import identity
from ebc_lab.config.modes import MOST_TOKENS

VERITY = {"determinism": {"name": "verity"}, "stabilizer": {"name": "none"}}
EBC = {"stabilizer": {"name": "ebc"}, "budget": {"name": "shadow"}}


def test_what_can_be_exact_is_accepted():
    for settings in (
        EBC | {"budget": {"name": "shadow", "schedule": "linear", "grouping": "matrices"}},
        {"optimizer": {"name": "adamw", "weight_decay": 0.1}},
        {"final_windows": 3},
        {"dtype": "auto", "compile": "auto"},
        {"determinism": {"engine": "eager", "micro_batches": 8}},
    ):
        validate_run(run(VERITY, settings))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"dtype": "bfloat16"}, "dtype=bfloat16: .* choose dtype=float32"),
        ({"param_dtype": "bfloat16"}, "choose param_dtype=float32"),
        ({"compile": "on"}, "choose compile=off"),
        ({"model": {"dropout": 0.1}}, "model.dropout: .* leave it at 0"),
        ({"accumulate": 2}, "determinism.micro_batches splits a batch"),
        ({"optimizer": {"name": "adam", "weight_decay": 0.1}}, "choose optimizer=adamw"),
        ({"lr_schedule": {"name": "replay", "source": "x"}}, "lr_schedule=replay"),
        ({"stabilizer": {"name": "ebc"}}, "determinism=verity .* budget=tracked: choose budget=shadow"),
        (EBC | {"controller": {"name": "rsl"}}, "controller=rsl: choose controller=fixed"),
        (EBC | {"budget": {"name": "shadow", "exponent": "auto"}}, "choose budget.exponent=square"),
        (EBC | {"budget": {"name": "shadow", "measure_every": 2}}, "choose budget.measure_every=1"),
        (EBC | {"budget": {"name": "shadow", "sensitivity_every": 5}}, "choose budget.sensitivity_every=0"),
        (
            EBC | {"budget": {"name": "shadow", "schedule": "hold_decay"}},
            "choose budget.schedule=constant or",
        ),
        ({"determinism": {"micro_batches": 3}}, "micro_batches=3 must divide batch_size=16"),
        ({"batch_size": 65536, "model": {"width": 4}}, "2,097,151 tokens a step .* 4,194,304: make"),
        ({"determinism": {"engine": "fast"}}, "determinism.engine=fast is unknown"),
        ({"sharpness_every": 10}, "sharpness_every: .* leave it at 0"),
        ({"stabilizer": {"name": "gen"}}, "stabilizer=gen: choose stabilizer=none"),
    ],
)
def test_what_is_not_exact_is_refused_with_the_way_out(settings, told):
    with pytest.raises(UserError, match=told):
        validate_run(run(VERITY, settings))


def test_what_changes_no_bit_names_no_run():
    for settings in ({"threads_per_run": 2}, {"determinism": {"engine": "eager", "micro_batches": 4}}):
        assert name_of(VERITY, settings) == name_of(VERITY)
    assert "threads_per_run" in identity(run({"determinism": {"name": "torch"}}))


@pytest.mark.thorough
def test_ebc_has_the_budget_that_is_exact_where_none_is_asked_for():
    given = ["determinism=verity"]
    assert implied(given) == [*given, "budget=shadow"]
    assert implied([*given, "stabilizer=ebc"]) == [*given, "stabilizer=ebc", "budget=shadow"]
    for other in (["determinism=torch"], [*given, "stabilizer=none"], [*given, "budget=tracked"]):
        assert implied(other) == other


def test_precision_and_compiling_are_chosen_without_a_measurement():
    chosen, why = chosen_by_rule(run(VERITY, {"dtype": "auto", "compile": "auto"}), 2, None)
    assert (chosen.dtype, chosen.compile, why["dtype"]) == ("float32", "off", "determinism=verity")


def test_a_batch_may_have_as_many_tokens_as_the_sums_can_hold():
    from ebc_lab.verity import grids  # config itself knows no torch

    assert MOST_TOKENS == grids.MOST_TOKENS


@pytest.mark.parametrize(
    "setting",
    [
        "lr_sweep.optimizers=[adam,muon]",
        "lr_sweep.projections=[none,spectral]",
        "lr_sweep.control_shapes=[cosine]",
        "study.lr_schedule=inverse_sqrt",
        "study.kl_schedule=hold_decay",
        "calibrate.budgets=[shadow,tracked]",
    ],
)
def test_what_stages_set_beside_the_run_is_refused_before_anything_is_trained(setting):
    asked = ["scale=smoke", "determinism=verity", "budget=shadow", "study.kl_schedule=linear"]
    compose(asked)
    with pytest.raises(UserError, match="does not go with") as refused:
        compose([*asked, setting])
    assert setting.partition("=")[0] in str(refused.value)


TOGETHER = ["scale=smoke", "device=cpu", "launcher.processes_per_run=2"]
SPREAD = [*TOGETHER[:2], "batch_size=12", "budget.probe_sequences=4", "audit_tokens=64", "model.context=16"]
SPREAD += ["launcher=slurm", "launcher.processes_per_run=4", "launcher.nodes_per_run=2"]


@pytest.mark.thorough
def test_what_several_processes_can_train_together_is_the_same_run():
    for setting in ("stabilizer=trust_region", "optimizer=muon", "accumulate=2"):
        runs = [run_part(compose([*asked, setting], study=False)) for asked in (TOGETHER, TOGETHER[:2])]
        assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["determinism=verity", "budget=shadow"], "determinism=verity: gradients are added up"),
        (["determinism=torch"], "determinism=torch"),
        (["capability=default"], "compare bits"),
        (["model.dropout=0.1"], "leave it at 0"),
        (["workload=ebm"], "choose workload=gpt"),
        (["memory=hooks", "optimizer=axiom", "stabilizer=none"], "choose memory=none"),
        (["memory.activations=int4"], "choose memory=none"),
        (["quantizer.gradients=ternary"], "leave them at none"),
        (["quantizer.state=int8"], "leave them at none"),
        (["policy=random", "stabilizer=none"], "choose policy=constant"),
        (["param_dtype=bfloat16"], "choose param_dtype=float32"),
        (["stabilizer=energy_rms"], "stabilizer=energy_rms: it looks at the rows of one process"),
        (["budget=shadow", "controller=agreement"], "controller=agreement: it looks at the rows"),
        (["batch_size=7"], "must divide batch_size, which is 7"),
        (["batch_size=12", "accumulate=4", "budget.probe_sequences=2"], "parts of batch_size, which is 3"),
        (["budget.probe_sequences=3"], "must divide budget.probe_sequences=3"),
        (["audit_tokens=33", "model.context=16"], "must divide the 3 row"),
    ],
)
def test_what_several_processes_would_train_otherwise_than_one_is_refused(settings, told):
    with pytest.raises(UserError, match=r"launcher\.processes_per_run=2") as refused:
        compose([*TOGETHER, *settings], study=False)
    assert told in str(refused.value)


def test_several_processes_are_refused_for_any_arm_that_they_would_change():
    with pytest.raises(UserError, match=r"launcher\.processes_per_run"):
        compose([*TOGETHER, "study=stabilizers", "ablation.arms.agc.settings.stabilizer.name=energy_raw"])


@pytest.mark.thorough
def test_on_how_many_nodes_a_run_is_trained_is_no_part_of_it():
    spread, together = (compose([*SPREAD, f"launcher.nodes_per_run={n}"]) for n in (2, 1))
    assert run_part(spread) == run_part(together)
    assert compose([*SPREAD, "launcher.cpus_per_task=2"]).launcher.cpus_per_task == 2


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["launcher.nodes_per_run=3"], "nodes_per_run=3 must divide launcher.processes_per_run=4"),
        (["launcher.processes_per_run=1"], "nodes_per_run=2 must divide launcher.processes_per_run=1"),
        (
            ["launcher.cpus_per_task=1"],
            "processes_per_run=4 on 2 nodes needs launcher.cpus_per_task >= 2, not 1",
        ),
        (["launcher=local"], "launcher.nodes_per_run"),
        (["determinism=torch"], "processes_per_run=4 does not go with determinism=torch: gradients are"),
    ],
)
def test_nodes_that_a_run_cannot_be_spread_over_are_refused(settings, told):
    with pytest.raises(UserError, match=re.escape(told)):
        compose([*SPREAD, *settings])
