import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ebc_lab.components import optimizers, stabilizers
from ebc_lab.config.choices import changed
from ebc_lab.config.compose import compose
from ebc_lab.config.dicts import run_part
from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import digest, identity, resolve_controller
from ebc_lab.records.columns import STEP_COLUMNS
from ebc_lab.records.json_files import read_json, write_checksummed
from ebc_lab.records.streams import read_columns
from ebc_lab.training import outcome as outcome_module
from ebc_lab.training import process
from ebc_lab.training import run as run_module
from ebc_lab.training.outcome import run_and_record
from ebc_lab.training.run import Training
from ebc_lab.training.turns import Interrupted
from ebc_lab.workloads import gpt
from ebc_lab.workloads import losses as losses_module
from ebc_lab.workloads.batches import windows
from ebc_lab.workloads.corpus import locate
from ebc_lab.workloads.losses import evaluate, token_losses


@pytest.fixture
def run(tiny):
    config = compose(
        [o for o in tiny if not o.startswith(("lr_s", "cal", "fin"))] + ["optimizer.lr=1e-2", "steps=30"],
        study=False,
    )
    return resolved(run_part(config))


def resolved(run):
    return replace(run, data=replace(run.data, sha256=locate(run.data).sha256))


def ebc(run, **budget):
    return replace(run, stabilizer=replace(run.stabilizer, name="ebc"), budget=replace(run.budget, **budget))


def plain(run):
    return replace(run, stabilizer=replace(run.stabilizer, name="none"))


def test_a_run_learns_and_records_every_step(run, tmp_path):
    result = run_and_record(ebc(run, target_kl=0.005), tmp_path, "x")
    steps, evals = read_columns(tmp_path / "steps.csv"), read_columns(tmp_path / "evals.csv")
    assert result["outcome"] == "completed"
    assert result["val_loss"] < steps["loss"][0] - 0.3
    assert steps["step"].tolist() == list(range(30))
    assert set(steps) == set(STEP_COLUMNS)
    for column in (
        "loss",
        "lr",
        "c",
        "eta_eff",
        "delta",
        "target_kl",
        "trial",
        "trial_kl",
        "grad_norm",
        "skipped",
    ):
        assert not np.isnan(steps[column]).any(), column
    assert np.flatnonzero(~np.isnan(steps["applied_kl"])).tolist() == [0, 10, 20]
    assert evals["step"].tolist() == [10, 20, 30]
    assert [p[:2] for p in result["curve"]] == [
        [s, v] for s, v in zip(evals["step"], evals["val_loss"], strict=True)
    ]
    assert not (tmp_path / "checkpoint.pt").exists()
    assert read_json(tmp_path / "result.json")["val_loss"] == result["val_loss"]


def test_an_edited_result_is_refused_with_the_remedy(run, tmp_path):
    write_checksummed(
        tmp_path / "result.json", {"identity": digest(identity(run)), "outcome": "completed", "val_loss": 2.0}
    )
    assert run_and_record(run, tmp_path, "x")["val_loss"] == 2.0
    (tmp_path / "result.json").write_text((tmp_path / "result.json").read_text().replace("2.0", "1.0"))
    with pytest.raises(
        UserError, match=rf"result\.json was edited.*delete {tmp_path}, and the same command trains the run"
    ):
        run_and_record(run, tmp_path, "x")


def test_the_same_run_gives_the_same_bits(run, tmp_path):
    results = [run_and_record(ebc(run), tmp_path / str(i), "x") for i in range(2)]
    assert (tmp_path / "0/steps.csv").read_bytes() == (tmp_path / "1/steps.csv").read_bytes()
    assert results[0]["test_loss"] == results[1]["test_loss"]


@pytest.mark.parametrize("budget", ["shadow", "surrogate"])
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_an_interrupted_run_resumes_bit_for_bit(run, tmp_path, optimizer, budget):
    run = ebc(run, name=budget, target_kl=0.005)
    run = replace(
        run, optimizer=replace(run.optimizer, name=optimizer), model=replace(run.model, dropout=0.1)
    )
    whole = run_and_record(run, tmp_path / "whole", "x")
    for stop_at in (7, 23):
        broken = Training(run, made(tmp_path / "broken"))
        with pytest.raises(Interrupted):
            broken.run(should_stop=lambda broken=broken, stop_at=stop_at: broken.step == stop_at)
        torch.manual_seed(99)  # whatever else happened in between
    resumed = run_and_record(run, tmp_path / "broken", "x")
    assert (tmp_path / "whole/steps.csv").read_bytes() == (tmp_path / "broken/steps.csv").read_bytes()
    timing = ("wall_s", "train_s", "tokens_per_s", "probe_pct", "curve")
    assert {k: v for k, v in whole.items() if k not in timing} == {
        k: v for k, v in resumed.items() if k not in timing
    }


def made(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    return path


def test_rows_written_after_the_checkpoint_are_cut_back(run, tmp_path):
    whole = run_and_record(run, tmp_path / "whole", "x")
    killed = Training(run, made(tmp_path / "killed"))
    for _ in range(12):
        killed.advance(1)
    killed.save_checkpoint()
    for _ in range(5):
        killed.advance(1)
    killed.recording.close()  # what a kill leaves: rows past the checkpoint
    assert run_and_record(run, tmp_path / "killed", "x")["val_loss"] == whole["val_loss"]
    assert (tmp_path / "whole/steps.csv").read_bytes() == (tmp_path / "killed/steps.csv").read_bytes()


@pytest.mark.parametrize("damage", ["truncated", "foreign", "pickle"])
def test_a_bad_checkpoint_is_named_with_its_remedy_and_never_executed(run, tmp_path, damage):
    training_ = Training(run, tmp_path)
    training_.advance(1)
    training_.save_checkpoint()
    path = tmp_path / "checkpoint.pt"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "foreign":
        run = replace(run, seed=run.seed + 1)
    else:
        torch.save({"identity": Evil()}, path)
    with pytest.raises(UserError, match=r"checkpoint\.pt (is damaged|belongs to another run).*delete it"):
        run_and_record(run, tmp_path, "x")
    assert path.exists()
    assert not (tmp_path / "result.json").exists()


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was executed')",))


def test_a_non_finite_loss_ends_the_run_as_diverged(run, tmp_path):
    huge = plain(replace(run, optimizer=replace(run.optimizer, name="sgd", lr=1e30, momentum=0.0)))
    result = run_and_record(huge, tmp_path, "x")
    assert result["outcome"] == "diverged"
    assert result["steps"] < 30
    assert result["val_loss"] is None
    assert "step" in result["cause"]


def test_a_loss_that_ends_above_its_start_is_diverged(run, tmp_path):
    result = run_and_record(plain(replace(run, optimizer=replace(run.optimizer, lr=2.0))), tmp_path, "x")
    assert result["outcome"] == "diverged"
    assert "above the initial loss" in result["cause"]
    assert result["steps"] == 30


def test_ten_skipped_steps_in_a_row_are_diverged(run, tmp_path, monkeypatch):
    original = stabilizers.build

    def poisoned(model, *others):
        for p in model.parameters():
            p.register_hook(lambda grad: grad * math.nan)
        return original(model, *others)

    monkeypatch.setattr(stabilizers, "build", poisoned)
    result = run_and_record(plain(run), tmp_path, "x")
    assert (result["outcome"], result["steps"], result["skipped_steps"]) == ("diverged", 10, 10)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(MemoryError("no"), "oom"), (torch.OutOfMemoryError("no"), "oom"), (RuntimeError("a bug"), "failed")],
)
def test_a_crash_becomes_an_outcome_with_its_traceback(run, tmp_path, monkeypatch, error, outcome):
    def crash(*_):
        raise error

    monkeypatch.setattr(optimizers, "build", crash)
    result = run_and_record(run, tmp_path, "x")
    assert result["outcome"] == outcome
    assert type(error).__name__ in result["cause"]
    assert "Traceback" in (tmp_path / "log.txt").read_text()


def test_a_full_disk_is_not_the_runs_fault(run, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(optimizers, "build", full)
    with pytest.raises(OSError, match="No space"):
        run_and_record(run, tmp_path, "x")
    assert not (tmp_path / "result.json").exists()


def test_a_run_that_evaluates_to_nan_is_diverged(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        run_module, "evaluate", lambda *_: {"loss": math.nan, "se": math.nan, "accuracy": 0.0, "tokens": 1.0}
    )
    result = run_and_record(plain(run), tmp_path, "x")
    assert (result["outcome"], result["val_loss"]) == ("diverged", None)


def test_another_runs_result_is_not_taken_for_ones_own(run, tmp_path):
    run_and_record(run, tmp_path, "x")
    with pytest.raises(UserError, match="another run's result"):
        run_and_record(replace(run, seed=run.seed + 1), tmp_path, "x")


def test_a_finished_run_is_not_trained_again(run, tmp_path, monkeypatch):
    first = run_and_record(run, tmp_path, "x")
    monkeypatch.setattr(outcome_module, "Training", None)
    assert run_and_record(run, tmp_path, "x")["val_loss"] == first["val_loss"]


def test_arms_of_one_seed_share_initial_weights_and_data(run, tmp_path):
    a = Training(plain(run), made(tmp_path / "a"))
    b = Training(ebc(replace(run, optimizer=replace(run.optimizer, lr=2e-2))), made(tmp_path / "b"))
    assert all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))
    assert torch.equal(a.batches.at(5)[0], b.batches.at(5)[0])


def test_infinite_budget_and_plain_arm_are_the_same_training(run, tmp_path):
    """The baseline arm, audits included, against the base optimizer alone."""
    lab = Training(plain(run), tmp_path)
    bare = Training(plain(run), made(tmp_path / "bare"))
    for step in range(12):
        lab.advance(1)
        x, y = bare.batches.at(step)
        token_losses(bare.model(x), y).mean().backward()
        for base in bare.optimizer.bases:
            base.step()
            base.zero_grad()
    assert all(
        torch.equal(p, q) for p, q in zip(lab.model.parameters(), bare.model.parameters(), strict=True)
    )


def test_evaluation_is_the_mean_over_every_token_whatever_the_batching(run, tmp_path, monkeypatch):
    state = Training(run, tmp_path)
    pairs = windows(state.workload.tokens["val"], run.model.context)
    found = evaluate(state.model, run, pairs)
    monkeypatch.setitem(losses_module.EVAL_TOKENS, "cpu", 1)
    single = evaluate(state.model, run, pairs)
    assert found["loss"] == pytest.approx(single["loss"], rel=1e-6)
    assert found["tokens"] == len(state.workload.tokens["val"]) - 1
    losses = []
    with torch.no_grad():
        for x, y in pairs:
            for row, target in zip(x, y, strict=True):
                losses.append((len(row), token_losses(state.model(row[None]), target[None]).mean().item()))
    full = [loss for n, loss in losses if n == run.model.context]
    assert found["se"] == pytest.approx(np.std(full, ddof=1) / math.sqrt(len(full)), rel=0.1)


@pytest.mark.parametrize("controller", ["fixed", "log_pi", "pi"])
def test_surrogate_runs_record_contributions_where_measured(run, tmp_path, controller):
    run = ebc(run, name="surrogate", target_kl=0.02)
    run = replace(run, controller=replace(run.controller, name=controller))
    result = run_and_record(run, tmp_path, "x")
    steps = read_columns(tmp_path / "steps.csv")
    shares = [c for c in steps if c.startswith("s_")]
    assert shares == ["s_embeddings", "s_block0", "s_head"]
    total = sum(steps[c] for c in shares)
    assert np.allclose(total, steps["surrogate"], rtol=1e-6)
    measured = ~np.isnan(steps["beta_block0"])
    assert measured[0]
    assert not measured[1]
    assert result["tightness_median"] > 0


def test_warmup_and_decay_reach_the_optimizer(run, tmp_path):
    decayed = plain(replace(run, lr_schedule=replace(run.lr_schedule, name="warmup_linear", warmup_steps=5)))
    run_and_record(decayed, tmp_path, "x")
    lr = read_columns(tmp_path / "steps.csv")["lr"]
    assert lr[0] == pytest.approx(1e-2 / 5)
    assert lr[5] == lr.max() == pytest.approx(1e-2)
    assert lr[-1] == pytest.approx(1e-2 / 25)


@pytest.mark.parametrize(
    "settings",
    [
        {"budget": {"name": "fisher"}},
        {"budget": {"name": "calibrated", "grouping": "type"}},
        {
            "budget": {"name": "surrogate", "guard": "shrink_inflate", "aggregate": "l2"},
            "controller": {"name": "rsl"},
        },
        {"budget": {"probe_tokens": "held"}, "controller": {"name": "agreement"}},
        {
            "budget": {"grouping": "matrices", "schedule": "cosine"},
            "controller": {"name": "energy", "a": 0.05},
        },
        {"param_dtype": "bfloat16", "budget": {"target_kl": 0.01}},
        {"optimizer": {"name": "schedule_free"}, "projection": {"name": "stiefel"}},
        {"stabilizer": {"name": "zclip"}, "optimizer": {"name": "soap"}},
    ],
    ids=str,
)
def test_every_new_part_resumes_bit_for_bit(run, tmp_path, settings):
    run = changed(ebc(run, target_kl=0.005), settings)
    whole = run_and_record(run, tmp_path / "whole", "x")
    assert whole["outcome"] == "completed"
    broken = Training(run, made(tmp_path / "broken"))
    with pytest.raises(Interrupted):
        broken.run(should_stop=lambda: broken.step == 23)
    resumed = run_and_record(run, tmp_path / "broken", "x")
    assert (tmp_path / "whole/steps.csv").read_bytes() == (tmp_path / "broken/steps.csv").read_bytes()
    assert whole["test_loss"] == resumed["test_loss"]


def test_what_a_budget_measures_is_recorded_and_nothing_else(run, tmp_path):
    columns = {}
    for name, settings in {
        "shadow": {"budget": {"target_kl": 0.005}},
        "fisher": {"budget": {"name": "fisher", "target_kl": 0.005}},
        "surrogate": {"budget": {"name": "surrogate", "target_kl": 0.005, "grouping": "tensor"}},
        "agreement": {"controller": {"name": "agreement"}},
        "norm_clip": {"stabilizer": {"name": "norm_clip", "strength": 0.1}},
    }.items():
        run_and_record(changed(ebc(run), settings), tmp_path / name, "x")
        steps = read_columns(tmp_path / name / "steps.csv")
        columns[name] = {c for c, values in steps.items() if not np.isnan(values).all()}
        if name == "surrogate":
            measured = [c for c in steps if c.startswith("beta_")]
            at = np.flatnonzero(~np.isnan(steps["beta_head.weight"]))
            assert {0, 10, 20} >= set(at) >= {0, 10, 20}
            assert len(measured) == len([c for c in steps if c.startswith("s_")]) > 10
            assert np.nansum([steps[c.replace("beta_", "s_")] for c in measured], axis=0) == pytest.approx(
                steps["surrogate"], rel=1e-6
            )
    assert columns["fisher"] - columns["shadow"] == {"predicted_kl"}
    assert {"guard", "surrogate", "radius"} <= columns["surrogate"]
    assert {"agreement", "predicted_kl"} <= columns["agreement"]
    assert columns["norm_clip"] & {"delta", "radius", "trial", "guard", "slope"} == set()
    assert "grad_scale" in columns["norm_clip"]
    assert "slope" in columns["shadow"]


def test_held_back_text_is_neither_trained_on_nor_validation(run, tmp_path):
    training_run = Training(ebc(run, probe_tokens="held"), made(tmp_path / "a"))
    train = Training(ebc(run), made(tmp_path / "b")).batches.tokens
    used, held = training_run.batches.tokens, training_run.probe_batches.tokens
    assert len(used) + len(held) == len(train)
    assert torch.equal(torch.cat([used, held]), train)
    assert len(held) == pytest.approx(0.02 * len(train), abs=1)


def test_bfloat16_parameters_are_bfloat16_and_lose_small_steps(run, tmp_path):
    made_of = {}
    for kind in ("float32", "bfloat16"):
        r = replace(ebc(run, name="surrogate", target_kl=1e-4), param_dtype=kind)
        fixed = replace(r, controller=replace(r.controller, name="fixed"))
        training_run = Training(fixed, made(tmp_path / kind))
        assert {p.dtype for p in training_run.model.parameters()} == {getattr(torch, kind)}
        training_run.run()
        made_of[kind] = np.nanmedian(read_columns(tmp_path / kind / "steps.csv")["applied_kl"])
    assert made_of["bfloat16"] < made_of["float32"]


def test_a_few_overlapping_windows_are_another_judgement_of_the_same_run(run, tmp_path):
    whole = run_and_record(plain(run), tmp_path / "whole", "x")
    few = run_and_record(replace(plain(run), final_windows=5), tmp_path / "few", "x")
    assert (tmp_path / "whole/steps.csv").read_bytes() == (tmp_path / "few/steps.csv").read_bytes()
    assert few["val_loss"] != whole["val_loss"]


def test_schedule_free_is_judged_at_its_average(run, tmp_path):
    training_run = Training(
        changed(plain(run), {"optimizer": {"name": "schedule_free"}}), made(tmp_path / "x")
    )
    result = training_run.run()
    pairs = windows(training_run.workload.tokens["val"], run.model.context)
    at_y = evaluate(training_run.model, run, pairs)["loss"]
    training_run.optimizer.eval()
    at_x = evaluate(training_run.model, run, pairs)["loss"]
    assert result["val_loss"] == pytest.approx(at_x, rel=1e-6)
    assert abs(at_x - at_y) > 1e-4


COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


def test_stabilizers_that_hook_into_layers_are_known(run):
    """Compiled code may leave hooks out without a word."""
    for name in stabilizers.STABILIZERS:
        shape = replace(run, stabilizer=replace(run.stabilizer, name=name))
        model = gpt.build(shape.model, 20, 0)
        bases = optimizers.build(model, shape.optimizer, gpt.hidden_matrices(model))
        stabilizers.build(model, bases, None, resolve_controller(shape))
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert hooked == (name in stabilizers.HOOKED), name
        assert (process.forward_of(model, replace(shape, compile="on")) is model) == hooked


@COMPILER
@pytest.mark.slow
@pytest.mark.parametrize("budget", ["shadow", "surrogate"])
def test_a_compiled_run_is_the_eager_one_up_to_rounding_and_repeats_its_bits(run, tmp_path, budget):
    run = ebc(run, name=budget, target_kl=0.005)
    eager = run_and_record(run, tmp_path / "eager", "x")
    compiled = [run_and_record(replace(run, compile="on"), tmp_path / str(i), "x") for i in range(2)]
    assert compiled[0]["outcome"] == "completed"
    assert compiled[0]["val_loss"] == pytest.approx(eager["val_loss"], abs=2e-3)
    assert compiled[0]["kl_median"] == pytest.approx(eager["kl_median"], rel=0.05)
    assert (tmp_path / "0/steps.csv").read_bytes() == (tmp_path / "1/steps.csv").read_bytes()


@COMPILER
@pytest.mark.slow
def test_what_is_measured_under_compiling_is_compiled_and_what_is_derived_is_not(run, tmp_path, monkeypatch):
    original, called = run_module.forward_of, []

    class Counted(torch.nn.Module):
        def __init__(self, model, run_):
            super().__init__()
            self.inner = original(model, run_)

        def forward(self, x):
            called.append((len(x), torch.is_grad_enabled()))
            return self.inner(x)

    monkeypatch.setattr(run_module, "forward_of", Counted)
    trained = Training(replace(ebc(run, name="surrogate", target_kl=0.005), compile="on"), tmp_path)
    trained.advance(1)
    audited = min(run.batch_size - run.budget.probe_sequences, -(-run.audit_tokens // run.model.context))
    assert called == [
        (run.batch_size, True),
        (audited, False),
    ]  # the step, the audit; its sensitivities took the model itself
    called.clear()
    trained.advance(1)
    assert called == [(run.batch_size, True)]
