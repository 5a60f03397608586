"""Runs under determinism: the same bits whatever computes them, or the same on one machine."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch
from support.runs import made, plain, resumed_after, untimed

from ebc_lab.components import determinism
from ebc_lab.config.choices import changed
from ebc_lab.config.errors import UserError
from ebc_lab.records.streams import read_columns
from ebc_lab.training.outcome import run_and_record
from ebc_lab.training.run import Training
from ebc_lab.verity import engine

SMALL = {"steps": 6, "batch_size": 8, "audit_every": 2, "evaluate": ["val"]}
SMALL |= {"eval_windows": 4, "eval_every": 3}
VERITY = {"determinism": {"name": "verity", "engine": "eager"}, "optimizer": {"lr": 1e-2}}
EBC = {"stabilizer": {"name": "ebc"}, "budget": {"name": "shadow", "target_kl": 2e-3}}
ELSEWHERE = [
    {"threads_per_run": 2, "determinism": {"micro_batches": 2}},
    {"determinism": {"micro_batches": 4}},
    {"determinism": {"engine": "auto"}},
    {"threads_per_run": 2, "determinism": {"engine": "auto", "micro_batches": 4}},
]


@pytest.fixture(params=[pytest.param("none", marks=pytest.mark.slow), "ebc"])
def exact(run, request):
    """A run under verity, with and without EBC."""
    return changed(plain(run), SMALL | VERITY | (EBC if request.param == "ebc" else {}))


def rows(folder):
    """steps.csv and evals.csv, without the times in the latter."""
    evals = pd.read_csv(folder / "evals.csv").drop(columns="train_s").to_csv()
    return (folder / "steps.csv").read_bytes(), evals


@pytest.mark.thorough
def test_threads_engine_and_the_split_of_a_batch_change_no_bit(exact, tmp_path):
    first = run_and_record(exact, tmp_path / "first", "x")
    assert first["outcome"] == "completed"
    assert len(first["weights_checksum"]) == 16
    for nth, settings in enumerate(ELSEWHERE):
        folder = tmp_path / str(nth)
        found = run_and_record(changed(exact, settings), folder, "x")
        assert untimed(found) == untimed(first), settings
        assert rows(folder) == rows(tmp_path / "first"), settings


@pytest.mark.thorough
def test_it_resumes_after_any_step_to_the_same_bits(exact, tmp_path):
    whole = run_and_record(exact, tmp_path / "whole", "x")
    resumed = resumed_after(exact, tmp_path / "broken", range(1, exact.steps))
    assert untimed(whole) == untimed(resumed)
    assert rows(tmp_path / "whole") == rows(tmp_path / "broken")


@pytest.mark.thorough
def test_it_trains_as_well_as_the_plain_mode_and_holds_the_budget(run, tmp_path):
    run = changed(run, EBC | {"audit_every": 1, "optimizer": {"lr": 1e-2}})
    found = run_and_record(changed(run, {"determinism": {"name": "verity"}}), tmp_path / "verity", "x")
    usual = run_and_record(run, tmp_path / "plain", "x")
    assert found["val_loss"] == pytest.approx(usual["val_loss"], abs=0.1)  # from other initial weights
    assert found["clip_rate"] > 0.5
    assert 0.5 < found["kl_ratio_median"] < 2


def test_a_value_that_is_not_finite_ends_the_run_and_moves_no_weight(exact, tmp_path):
    training = Training(exact, made(tmp_path / "run"))
    training.advance(2)
    weight = training.model.blocks[0].mlp_in.weight
    with torch.no_grad():
        weight[3, 5] = math.nan
    before = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    cause = training.advance(3)
    assert cause == "the loss is nan at step 2"
    assert training.step == 3
    for name, p in training.model.named_parameters():
        assert torch.equal(p, before[name]) or name.endswith("mlp_in.weight"), name
        assert p.grad is None
    training.recording.close()


@pytest.mark.thorough
def test_a_loss_that_explodes_is_the_same_in_any_split_and_a_diverged_run(run, tmp_path):
    """Losses of more than 2^31 nats, whose sums an int64 of 2^-32 nats would not hold."""
    run = changed(plain(run), SMALL | VERITY | {"optimizer": {"lr": 1e5}})
    for parts in (1, 4):
        split = changed(run, {"determinism": {"micro_batches": parts}})
        found = run_and_record(split, tmp_path / str(parts), "x")
        assert found["outcome"] == "diverged"
    assert rows(tmp_path / "1") == rows(tmp_path / "4")
    assert read_columns(tmp_path / "1/steps.csv")["loss"].max() > 2**31


def test_weights_that_no_forward_can_use_at_the_end_are_a_diverged_run(exact, tmp_path):
    training = Training(exact, made(tmp_path / "run"))

    def spoil(step):
        if step == exact.steps:
            training.model.head.weight.data.fill_(math.inf)

    result = training.run(on_progress=spoil)
    assert (result["outcome"], result["cause"]) == ("diverged", "the loss is not finite on held-out text")


@pytest.mark.parametrize("damage", [{"sites": []}, {"sites": [{"e": "x", "hist": []}], "redone": 0}, {}])
def test_damaged_grids_in_a_checkpoint_are_named(exact, tmp_path, monkeypatch, damage):
    begun = Training(exact, made(tmp_path))
    begun.advance(2)
    monkeypatch.setattr(begun.numerics, "state_dict", lambda: damage)
    begun.save_checkpoint()
    begun.recording.close()
    with pytest.raises(UserError, match=r"checkpoint.pt is damaged \(.*grids.*\): delete it, and the run"):
        Training(exact, tmp_path)


def test_a_platform_that_drops_subnormal_numbers_is_refused(run, tmp_path, monkeypatch):
    run = changed(plain(run), VERITY)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU always keeps them")
    Training(run, made(tmp_path / "kept"))  # it asks for them itself
    torch.set_flush_denormal(True)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "set_flush_denormal", lambda mode: False)  # where asking does not help
        with pytest.raises(UserError, match=r"determinism=verity: .*subnormal numbers are kept"):
            Training(run, made(tmp_path / "dropped"))


@pytest.mark.parametrize(("name", "kept"), [("verity", True), ("torch", False)])
def test_a_run_sets_the_mode_of_all_threads_whatever_ran_before_it(run, tmp_path, beside_a_pool, name, kept):
    asked = changed(plain(run), {"determinism": {"name": name, "engine": "eager"}, "threads_per_run": 2})

    def kept_by_each():
        Training(asked, made(tmp_path / name)).recording.close()
        products = torch.full((1 << 17,), 2.0**-126) * 2.0**-10
        return (products > 0).unique().tolist()

    assert beside_a_pool(kept_by_each, flushes=kept) == [kept]


def test_a_pool_whose_mode_cannot_be_set_is_refused(run, tmp_path, beside_a_pool, monkeypatch):
    monkeypatch.setattr(determinism, "openmp_team", lambda: None)
    asked = changed(plain(run), VERITY | {"threads_per_run": 2})

    def refused():
        with pytest.raises(UserError, match=r"determinism=verity: .* a new process"):
            Training(asked, made(tmp_path))

    beside_a_pool(refused, flushes=True)


def test_an_engine_that_cannot_be_had_is_refused_and_auto_says_which_it_took(run, tmp_path, monkeypatch):
    run = changed(plain(run), SMALL | VERITY | {"steps": 1})
    run_and_record(run, tmp_path / "eager", "x")
    assert "determinism=verity, engine eager" in (tmp_path / "eager/log.txt").read_text()
    monkeypatch.setattr(engine, "why_not_native", lambda: "there is no compiler")
    with pytest.raises(UserError, match=r"determinism=verity: .*there is no compiler"):
        Training(changed(run, {"determinism": {"engine": "c"}}), made(tmp_path / "c"))


def test_deterministic_kernels_are_on_for_their_run_alone(run, tmp_path):
    run = changed(plain(run), SMALL)
    strict = changed(run, {"determinism": {"name": "torch"}})
    for chosen, on in ((strict, True), (run, False), (strict, True)):
        Training(chosen, made(tmp_path / chosen.determinism.name)).recording.close()
        assert torch.are_deterministic_algorithms_enabled() == on
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    found = [run_and_record(strict, tmp_path / name, "x")["weights_checksum"] for name in ("a", "b")]
    assert found[0] == found[1]
    Training(run, made(tmp_path / "after")).recording.close()
    assert not torch.are_deterministic_algorithms_enabled()
