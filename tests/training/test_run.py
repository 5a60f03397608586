"""What a run does from its first step to its last, and what it records."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.runs import ebc, made, plain

from ebc_lab.config.choices import changed
from ebc_lab.records.columns import STEP_COLUMNS
from ebc_lab.records.json_files import read_json
from ebc_lab.records.streams import read_columns
from ebc_lab.training.outcome import run_and_record
from ebc_lab.training.run import Training
from ebc_lab.workloads import losses as losses_module
from ebc_lab.workloads.batches import windows
from ebc_lab.workloads.losses import evaluate, token_losses


def test_a_run_learns_and_records_every_step(run, tmp_path):
    result = run_and_record(ebc(run, target_kl=0.005), tmp_path, "x")
    steps = read_columns(tmp_path / "steps.csv")
    evals = read_columns(tmp_path / "evals.csv")
    assert result["outcome"] == "completed"
    assert result["val_loss"] < steps["loss"][0] - 0.3
    assert steps["step"].tolist() == list(range(30))
    assert set(steps) == set(STEP_COLUMNS)
    for column in ("loss", "lr", "c", "delta", "target_kl", "trial", "trial_kl", "grad_norm", "skipped"):
        assert not np.isnan(steps[column]).any(), column
    assert np.flatnonzero(~np.isnan(steps["applied_kl"])).tolist() == [0, 10, 20]
    assert evals["step"].tolist() == [10, 20, 30]
    assert [p[:2] for p in result["curve"]] == [
        [s, v] for s, v in zip(evals["step"], evals["val_loss"], strict=True)
    ]
    assert not (tmp_path / "checkpoint.pt").exists()
    assert read_json(tmp_path / "result.json")["val_loss"] == result["val_loss"]


def test_arms_of_one_seed_share_initial_weights_and_data(run, tmp_path):
    a = Training(plain(run), made(tmp_path / "a"))
    b = Training(ebc(replace(run, optimizer=replace(run.optimizer, lr=2e-2))), made(tmp_path / "b"))
    assert all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))
    assert torch.equal(a.batches.at(5)[0], b.batches.at(5)[0])


def test_the_plain_arm_audits_included_is_the_base_optimizer_alone(run, tmp_path):
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


def test_warmup_and_decay_reach_the_optimizer_and_a_target_that_follows_them(run, tmp_path):
    settings = {
        "lr_schedule": {"name": "warmup_linear", "warmup_steps": 5},
        "budget": {"target_kl": 0.005, "schedule": "lr_squared"},
    }
    run_and_record(changed(ebc(run), settings), tmp_path, "x")
    steps = read_columns(tmp_path / "steps.csv")
    assert steps["target_kl"] == pytest.approx(0.005 * (steps["lr"] / run.optimizer.lr) ** 2)
    lr = steps["lr"]
    assert lr[0] == pytest.approx(1e-2 / 5)
    assert lr[5] == lr.max() == pytest.approx(1e-2)
    assert lr[-1] == pytest.approx(1e-2 / 25)


@pytest.mark.thorough
def test_what_a_budget_measures_is_recorded_and_nothing_else(run, tmp_path):
    columns = {}
    for name, settings in {
        "shadow": {"budget": {"name": "shadow", "target_kl": 0.005}},
        "tracked": {"budget": {"name": "tracked", "target_kl": 0.005}},
        "fisher": {"budget": {"name": "fisher", "target_kl": 0.005}},
        "surrogate": {"budget": {"name": "surrogate", "target_kl": 0.005}},
        "agreement": {"controller": {"name": "agreement"}},
        "norm_clip": {"stabilizer": {"name": "norm_clip", "strength": 0.1}},
    }.items():
        run_and_record(changed(ebc(run), settings), tmp_path / name, "x")
        steps = read_columns(tmp_path / name / "steps.csv")
        columns[name] = {c for c, values in steps.items() if not np.isnan(values).all()}
        if name == "surrogate":
            groups = ("embeddings", "block0", "head")
            assert [c for c in steps if c.startswith("s_")] == [f"s_{group}" for group in groups]
            assert sum(steps[f"s_{group}"] for group in groups) == pytest.approx(steps["surrogate"], rel=1e-6)
            assert np.flatnonzero(~np.isnan(steps["beta_head"])).tolist() == [0, 10, 20]
    assert columns["tracked"] - columns["shadow"] == {
        *("tracked_log_ratio", "tracked_variance", "tracked_flicker", "tracked_scale", "innovation")
    }
    assert columns["fisher"] - columns["shadow"] == {"predicted_kl"}
    assert {"guard", "surrogate", "radius"} <= columns["surrogate"]
    assert {"agreement", "predicted_kl"} <= columns["agreement"]
    assert columns["norm_clip"] & {"delta", "radius", "trial", "guard", "slope"} == set()
    assert "grad_scale" in columns["norm_clip"]
    assert "slope" in columns["shadow"]


def test_held_back_text_is_neither_trained_on_nor_validation(run, tmp_path):
    training_run = Training(ebc(run, probe_tokens="held"), made(tmp_path / "a"))
    train = Training(ebc(run), made(tmp_path / "b")).batches.tokens
    used = training_run.batches.tokens
    held = training_run.probe_batches.tokens
    assert len(used) + len(held) == len(train)
    assert torch.equal(torch.cat([used, held]), train)
    assert len(held) == pytest.approx(0.02 * len(train), abs=1)


def test_bfloat16_parameters_are_bfloat16_and_lose_small_steps(run, tmp_path):
    applied = {}
    for kind in ("float32", "bfloat16"):
        settings = {"param_dtype": kind, "controller": {"name": "fixed"}}
        training = Training(
            changed(ebc(run, name="surrogate", target_kl=1e-4), settings), made(tmp_path / kind)
        )
        assert {p.dtype for p in training.model.parameters()} == {getattr(torch, kind)}
        training.run()
        applied[kind] = np.nanmedian(read_columns(tmp_path / kind / "steps.csv")["applied_kl"])
    assert applied["bfloat16"] < applied["float32"]


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
