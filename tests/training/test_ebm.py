"""Runs of workload=ebm under every optimizer, stabilizer and projection, through interruptions and events.

A new optimizer, stabilizer, budget or projection is in the table as soon as it is in its registry.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from support.ebm_runs import eventful, tiny_ebm
from support.pairwise import contract
from support.runs import made, plain, resumed_after, untimed
from torch import Tensor

from ebc_lab.components.optimizer import OPTIMIZERS
from ebc_lab.components.projection import PROJECTIONS
from ebc_lab.components.stabilizers import STABILIZERS
from ebc_lab.config.choices import changed
from ebc_lab.config.identity import with_derived_settings as choices_resolved
from ebc_lab.ebc.options import BUDGETS
from ebc_lab.records.streams import read_columns
from ebc_lab.training.outcome import run_and_record
from ebc_lab.training.run import Training

RIVALS = [name for name in STABILIZERS if name not in ("ebc", "gen", "cdat")]  # these two are refused
LIMITS = {name: (name, "tracked") for name in RIVALS} | {b: ("ebc", b) for b in BUDGETS}


@pytest.fixture(scope="module")
def small(text_file):
    """A run of an ebm whose steps take hundredths of a second."""
    return tiny_ebm(text_file, "eval_every=30", "audit_every=1")


@pytest.fixture(scope="module")
def busy(text_file):
    """One of 30 steps with revivals, avalanches, phases and new indices in them."""
    return eventful(tiny_ebm(text_file, "ebm.splats=60", "audit_every=5"))


@pytest.mark.thorough
@contract(
    ("optimizer", "limit", "projection"),
    [name for name in OPTIMIZERS if name != "muonclip"],  # refused: it needs attention's logits
    LIMITS,
    list(PROJECTIONS),
    pairs=False,
)
def test_it_steps_and_resumes_bit_for_bit(small, tmp_path, optimizer, limit, projection):
    stabilizer, budget = LIMITS[limit]
    settings = {
        "optimizer": {"name": optimizer},
        "stabilizer": {"name": stabilizer},
        "budget": {"name": budget, "target_kl": 1e-3},
        "projection": {"name": projection},
    }
    run = choices_resolved(changed(small, settings))
    if optimizer in ("prodigy", "d_adaptation", "dog", "ldog", "mechanic"):
        # a factor on a rate that starts at about 1e-6, and that this limit divides at first
        run = changed(run, {"optimizer": {"lr": 1000.0 if limit == "adaptive_warmup" else 10.0}})
    training = Training(run, made(tmp_path / "run"))
    before = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    training.advance(2)
    training.save_checkpoint()
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    resumed = Training(run, tmp_path / "copy")
    assert resumed.step == 2
    for one in (training, resumed):
        one.advance(2)
        one.recording.flush()
    assert (tmp_path / "run/steps.csv").read_bytes() == (tmp_path / "copy/steps.csv").read_bytes()
    for p, q in zip(training.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)
    rows = read_columns(tmp_path / "run/steps.csv")
    assert not rows["skipped"].any()
    assert ((rows["c"] > 0) & (rows["c"] <= 1)).all()
    assert (rows["applied_kl"] >= 0).all()
    for name, p in training.model.named_parameters():
        assert p.isfinite().all()
        assert not torch.equal(p, before[name]), name
    if projection == "sphere":
        for rows in training.workload.directions(training.model):
            torch.testing.assert_close(rows.detach().norm(dim=-1), torch.ones(len(rows)))


def written(folder):
    """What a run left, clocks aside."""
    evals = pd.read_csv(folder / "evals.csv").drop(columns="train_s").to_csv()
    return evals, *((folder / name).read_bytes() for name in ("steps.csv", "model.pt"))


@pytest.mark.thorough
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"index": {"name": "hnsw", "rebuild_every": 9}}, id="hnsw"),
        pytest.param(
            {"stabilizer": {"name": "ebc"}, "budget": {"name": "shadow", "target_kl": 0.005}}, id="shadow"
        ),
        pytest.param(
            {"ebm": {"adapt": "gradient", "temperature": [4.0, 2.0, 1.0]}, "optimizer": {"name": "soap"}},
            marks=pytest.mark.slow,
            id="gradient",
        ),
        pytest.param(
            {"decoder": {"name": "transformer"}, "optimizer": {"name": "schedule_free"}, "dtype": "bfloat16"},
            marks=pytest.mark.slow,
            id="transformer",
        ),
        pytest.param(
            {"index": {"name": "ivf", "rebuild_every": 9}, "optimizer": {"name": "lion"}},
            marks=pytest.mark.slow,
            id="ivf",
        ),
        pytest.param({"accumulate": 2}, marks=pytest.mark.slow, id="accumulate"),
    ],
)
def test_events_leave_a_resumed_run_the_same_bytes(busy, tmp_path, settings):
    """Interrupted before and after revivals, avalanches, phases and rebuilt indices."""
    if "index" in settings:
        pytest.importorskip("faiss")
    run = choices_resolved(changed(busy, settings))
    whole = run_and_record(run, tmp_path / "whole", "x")
    assert whole["outcome"] == "completed", whole
    seen = read_columns(tmp_path / "whole/steps.csv")
    assert np.nansum(seen["revived"]) > 0
    assert np.nansum(seen["consolidations"]) > 0
    assert (seen["splats"].min(), seen["splats"].max()) == (16, 60)
    resumed = resumed_after(run, tmp_path / "broken", (7, 8, 10, 20))
    assert written(tmp_path / "whole") == written(tmp_path / "broken")
    assert untimed(whole) == untimed(resumed)


# -- parts of a batch ----------------------------------------------------------------------------------------


def after_steps(run, folder, steps):
    training = Training(run, made(folder))
    training.advance(steps)
    training.recording.flush()
    return training, read_columns(folder / "steps.csv")


GPT = {"workload": {"name": "gpt"}}
# an ebm's other losses hold draws for each part, and its splats follow each
WITHOUT_DRAWS = {"ebm": {"score": 0.0, "noised": 0.0, "balance": 0.0, "z": 0.0}}


@pytest.mark.parametrize("parts", [2, 5])
@pytest.mark.parametrize(
    ("settings", "steps", "columns"),
    [
        (GPT, 4, ("loss", "grad_norm")),
        (WITHOUT_DRAWS, 1, ("loss", "loss_mle", "energy", "loss_total", "router_z")),
    ],
    ids=["gpt", "ebm"],
)
def test_parts_of_a_batch_are_one_batch_up_to_rounding(small, tmp_path, settings, steps, columns, parts):
    run = changed(plain(small), {**settings, "optimizer": {"name": "sgd"}})
    run = replace(run, audit_every=10**6, budget=replace(run.budget, probe_sequences=1))
    whole, one = after_steps(run, tmp_path / "whole", steps)
    parted, several = after_steps(replace(run, accumulate=parts), tmp_path / "parted", steps)
    for column in columns:
        np.testing.assert_allclose(several[column], one[column], rtol=1e-5, err_msg=column)
    for (name, p), q in zip(whole.model.named_parameters(), parted.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)


# -- what an audit sees --------------------------------------------------------------------------------------


def buffers(training):
    return [b.clone() for b in training.model.buffers()]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.thorough
@pytest.mark.parametrize("budget", ["shadow", "surrogate", "fisher"])
def test_between_the_forwards_of_an_audit_only_the_optimizer_moves_anything(busy, tmp_path, budget):
    settings = {"stabilizer": {"name": "ebc"}, "budget": {"name": budget, "target_kl": 1e-3}}
    training = Training(choices_resolved(changed(busy, settings)), made(tmp_path / "run"))
    take = training.optimizer.take_step
    kept = []

    def watched(inputs):
        kept.append(buffers(training))
        found = take(inputs)
        assert same(kept[-1], buffers(training))
        return found

    training.optimizer.take_step = watched
    for _ in range(12):
        before = buffers(training)
        training.advance(1)
        assert same(before, kept[-1])  # nor did the forward and the loss
        assert not same(before, buffers(training))  # statistics follow it


def test_events_are_no_part_of_the_audit_and_have_a_column_of_their_own(busy, tmp_path, monkeypatch):
    """The same step with and without what comes after it."""
    run = replace(busy, audit_every=7)
    first = Training(run, made(tmp_path / "with"))
    first.advance(7)
    first.save_checkpoint()
    shutil.copytree(tmp_path / "with", tmp_path / "without")
    bare = Training(run, tmp_path / "without")
    monkeypatch.setattr(bare.workload, "_events", lambda step, states, renew: {})
    for training in (first, bare):
        training.advance(1)
        training.recording.flush()
    moved, still = (read_columns(tmp_path / name / "steps.csv") for name in ("with", "without"))
    after = {"event_kl", "splats", "revived", "kappa_median"}
    for column in set(moved) - after:
        np.testing.assert_array_equal(moved[column], still[column], err_msg=column)
    assert still["event_kl"][7] == 0
    assert moved["event_kl"][7] > 0
    assert moved["applied_kl"][7] > 0
    assert moved["revived"][7] > 0
    assert moved["score_shift"][7] > 0


# -- rows that hold something new ----------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize("optimizer", ["adam", "lion", "soap", "schedule_free"])
def test_a_splat_that_moves_leaves_no_memory_of_the_old_one(small, tmp_path, optimizer):
    run = changed(small, {"optimizer": {"name": optimizer}})
    training = Training(run, made(tmp_path / "run"))
    training.advance(2)
    mu = training.model.store.mu
    [state] = [base.state[mu] for base in training.optimizer.bases if mu in base.state]
    rows = torch.tensor([1, 5])
    others = torch.ones(len(mu), dtype=torch.bool).index_fill_(0, rows, False)
    before = {k: v.clone() for k, v in state.items() if isinstance(v, Tensor) and v.shape == mu.shape}
    assert before
    with torch.no_grad():
        mu[rows] = torch.nn.functional.normalize(torch.randn(2, 8), dim=-1)
    training.optimizer.renew_rows(mu, rows)
    for key, old in before.items():
        copy = key in getattr(training.optimizer.bases[0], "weight_copies", ())
        assert torch.equal(state[key][rows], mu[rows].detach() if copy else torch.zeros(2, 8)), key
        assert torch.equal(state[key][others], old[others]), key
        assert old[rows].any() or key == "z", key
    there = mu.detach().clone()
    training.advance(1)
    far = (mu.detach() - there).norm(dim=-1)[rows].max()
    assert far < 3 * run.optimizer.lr * math.sqrt(8)  # no memory, and no leap for the lack of one


@pytest.mark.thorough
def test_revived_and_new_splats_are_told_to_the_optimizer(busy, tmp_path):
    training = Training(busy, made(tmp_path / "run"))
    renewed = {}
    training.optimizer.renew_rows = lambda mu, rows: renewed.update({training.step: len(rows)})
    training.advance(20)
    assert {7, 10, 19} & set(renewed)
    assert renewed[9] >= 20  # the second phase's splats
