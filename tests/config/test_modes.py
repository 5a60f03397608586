"""Settings of determinism: what is refused, what of them names a run, and what follows from them.

What no other choice of a group goes with, alone, is in test_golden_ids: every pair of choices."""

import re

import pytest
from support.named import name_of, run

from ebc_lab.bench.speeds import chosen_by_rule
from ebc_lab.config.checks import validate_run
from ebc_lab.config.compose import compose, implied
from ebc_lab.config.dicts import run_part
from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import identity
from ebc_lab.config.modes import MOST_TOKENS, check_processes

VERITY = {"determinism": {"name": "verity"}, "stabilizer": {"name": "none"}}
EBC = {"stabilizer": {"name": "ebc"}, "budget": {"name": "shadow"}}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        EBC,
        EBC | {"budget": {"name": "shadow", "schedule": "linear", "grouping": "matrices"}},
        {"optimizer": {"name": "adamw", "weight_decay": 0.1}},
        {"lr_schedule": {"name": "trapezoid"}},
        {"lr_schedule": {"name": "warmup_linear"}},
        {"final_windows": 3},
        {"dtype": "auto", "compile": "auto"},
        {"determinism": {"engine": "eager", "micro_batches": 8}},
        {"determinism": {"name": "none"}, "optimizer": {"name": "muon"}},  # verity alone refuses it
        {"determinism": {"name": "torch"}, "optimizer": {"name": "muon"}},
    ],
)
def test_what_can_be_exact_is_accepted(settings):
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
        ({"quantizer": {"state": "int8"}}, "choose quantizer=none"),
        ({"curve_every": 10}, "curve_every: leave it at 0"),
        ({"stabilizer": {"name": "ebc"}}, "determinism=verity .* budget=tracked: choose budget=shadow"),
        (EBC | {"controller": {"name": "rsl"}}, "controller=rsl: choose controller=fixed"),
        (EBC | {"budget": {"name": "shadow", "exponent": "auto"}}, "choose budget.exponent=square"),
        (EBC | {"budget": {"name": "shadow", "measure_every": 2}}, "choose budget.measure_every=1"),
        (EBC | {"budget": {"name": "shadow", "sensitivity_every": 5}}, "choose budget.sensitivity_every=0"),
        (
            EBC | {"budget": {"name": "shadow", "schedule": "hold_decay"}},
            "choose budget.schedule=constant or budget.schedule=linear",
        ),
        ({"determinism": {"micro_batches": 3}}, "micro_batches=3 must divide batch_size=16"),
        ({"batch_size": 65536, "model": {"width": 4}}, "2,097,151 tokens a step .* 4,194,304: make"),
        ({"determinism": {"name": "torch", "micro_batches": 2}}, "goes with determinism=verity"),
        ({"determinism": {"name": "none", "engine": "c"}}, "goes with determinism=verity"),
        ({"determinism": {"engine": "fast"}}, "determinism.engine=fast is unknown"),
        ({"sharpness_every": 10}, "sharpness_every: .* leave it at 0"),
        ({"stabilizer": {"name": "gen"}}, "stabilizer=gen: choose stabilizer=none"),
    ],
)
def test_what_is_not_exact_is_refused_with_the_way_out(settings, told):
    with pytest.raises(UserError, match=told):
        validate_run(run(VERITY, settings))


def test_what_changes_no_bit_names_no_run():
    exact = name_of(VERITY)
    for settings in (
        {"threads_per_run": 2},
        {"determinism": {"engine": "eager"}},
        {"determinism": {"micro_batches": 4}},
    ):
        assert name_of(VERITY, settings) == exact
    modes = {name_of(VERITY, {"determinism": {"name": name}}) for name in ("none", "torch", "verity")}
    assert len(modes) == 3
    assert name_of(VERITY, {"seed": 1}) != exact
    assert "determinism" not in identity(run())
    assert identity(run(VERITY))["determinism"] == {"name": "verity"}
    assert identity(run(VERITY))["torch"]
    assert "threads_per_run" in identity(run({"determinism": {"name": "torch"}}))


@pytest.mark.thorough
def test_ebc_has_the_budget_that_is_exact_where_none_is_asked_for():
    for given in (["determinism=verity"], ["determinism=verity", "stabilizer=ebc"]):
        assert implied(given)[len(given) :] == ["budget=shadow"]
    for given in (
        ["determinism=torch"],
        ["determinism=verity", "stabilizer=none"],
        ["determinism=verity", "budget=tracked"],
    ):
        assert implied(given) == given
    made = compose(
        implied(["scale=laptop", "determinism=verity", "determinism.micro_batches=4"]), study=False
    )
    assert (made.budget.name, made.determinism.micro_batches) == ("shadow", 4)


def test_precision_and_compiling_are_chosen_without_a_measurement():
    left_open = run_part(compose(["scale=smoke", "determinism=verity", "stabilizer=none"], study=False))
    left_open.device = "cpu"
    left_open.dtype = left_open.compile = "auto"
    for job_cores in (None, 2):
        chosen, why = chosen_by_rule(left_open, 2, job_cores)
        assert (chosen.dtype, chosen.compile) == ("float32", "off")
        assert why["dtype"] == "determinism=verity"


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
@pytest.mark.parametrize(
    "setting", ["budget=shadow", "stabilizer=trust_region", "optimizer=muon", "accumulate=2"]
)
def test_what_several_processes_can_train_together_is_accepted(setting):
    together, alone = (
        run_part(compose([*asked, setting], study=False)) for asked in (TOGETHER, TOGETHER[:2])
    )
    assert together == alone, "nothing that names the run differs"


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
        (
            ["batch_size=12", "accumulate=4", "budget.probe_sequences=2"],
            "each of the accumulate parts of batch_size, which is 3",
        ),
        (["budget.probe_sequences=3"], "must divide budget.probe_sequences=3"),
        (["audit_tokens=33", "model.context=16"], "must divide the 3 row"),
        (["launcher=slurm", "launcher.cpus_per_task=1"], "needs launcher.cpus_per_task >= 2, not 1"),
    ],
)
def test_what_several_processes_would_train_otherwise_than_one_is_refused(settings, told):
    with pytest.raises(UserError, match=r"launcher\.processes_per_run=2") as refused:
        compose([*TOGETHER, *settings], study=False)
    assert told in str(refused.value)


@pytest.mark.parametrize(
    "settings",
    [
        ["study=stabilizers", "ablation.arms.norm_clip.settings.stabilizer.name=energy_raw"],
        ["study=determinism"],
    ],
)
def test_several_processes_are_refused_for_any_arm_or_stage_that_they_would_change(settings):
    with pytest.raises(UserError, match=r"launcher\.processes_per_run"):
        compose([*TOGETHER, *settings])


def test_more_processes_than_gpus_are_refused(machine_with):
    machine_with(1)
    with pytest.raises(UserError, match="takes a GPU for each process, and 1 can be seen here"):
        compose(["scale=smoke", "device=cuda", "launcher.processes_per_run=2"], study=False)


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
        (["launcher.cpus_per_task=1"], "processes_per_run=4 on 2 nodes needs launcher.cpus_per_task >= 2"),
        (["launcher=local"], "launcher.nodes_per_run"),
        (["determinism=torch"], "processes_per_run=4 does not go with determinism=torch: gradients are"),
    ],
)
def test_nodes_that_a_run_cannot_be_spread_over_are_refused(settings, told):
    with pytest.raises(UserError, match=re.escape(told)):
        compose([*SPREAD, *settings])


def test_one_process_is_asked_nothing():
    check_processes(run({"model": {"dropout": 0.5}}), 1)
