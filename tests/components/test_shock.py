"""One disturbance at one step: what it changes, nothing else, and the same in paired runs."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.runs import short_run
from torch import nn
from torch.nn.utils import get_total_norm

from ebc_lab.components.shock import Shock, recovery
from ebc_lab.config.parts.shock import ShockConfig
from ebc_lab.records.streams import read_columns
from ebc_lab.training.outcome import run_and_record


@pytest.fixture
def run(tiny):
    return short_run(tiny, "steps=40", "stabilizer=none")


def shocked(run, name, **settings):
    return replace(run, shock=ShockConfig(name, **settings))


def at_20(run, name, model=None, seed=3, **settings):
    """The shock of a run of 40 steps, which strikes half-way unless told otherwise."""
    shocked_run = replace(shocked(run, name, **settings), seed=seed)
    return Shock(shocked_run, SimpleNamespace(model=model, vocabulary=10))


@pytest.mark.thorough
def test_half_the_labels_become_random_ones_the_same_for_every_arm(run):
    targets = torch.zeros(40, 50, dtype=torch.int64)
    shock = at_20(run, "label_noise", size=0.5)
    noisy = shock.targets(20, targets)
    # a tenth of the draws is the old label
    assert (noisy != 0).double().mean() == pytest.approx(0.5 * 0.9, abs=0.03)
    assert noisy.max() == 9
    assert torch.equal(noisy, at_20(run, "label_noise", size=0.5).targets(20, targets))
    assert not torch.equal(noisy, at_20(run, "label_noise", size=0.5, seed=4).targets(20, targets))
    assert shock.targets(19, targets) is targets


def test_a_corrupted_gradient_is_off_by_so_many_times_its_norm(run):
    model = nn.Linear(30, 40)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    at_20(run, "corrupt_gradient", model, size=5.0).gradients(20, torch.tensor(1.0), 0.1)
    off = [p.grad - 1 for p in model.parameters()]
    assert get_total_norm(off) == pytest.approx(5 * (31 * 40) ** 0.5, rel=1e-5)


def test_other_steps_and_other_shocks_change_nothing(run):
    model = nn.Linear(3, 4)
    model.weight.grad = torch.ones_like(model.weight)
    for name, t in (("corrupt_gradient", 19), ("lr_spike", 20)):
        at_20(run, name, model).gradients(t, torch.tensor(1.0), 0.1)
    assert (model.weight.grad == 1).all()
    assert at_20(run, "label_noise").rate(20, 0.1) == 0.1
    spike = at_20(run, "lr_spike", size=7.0)
    assert [t for t in range(40) if spike.rate(t, 0.1) != 0.1] == [20]  # half-way
    assert spike.rate(20, 0.1) == pytest.approx(0.7)
    assert [t for t in range(40) if at_20(run, "lr_spike", step=7).event_at(t)] == [7]
    assert not Shock.acts(run)


@pytest.mark.parametrize(
    ("name", "size"), [("label_noise", 1.0), ("lr_spike", 30.0), ("corrupt_gradient", 1000.0)]
)
def test_a_run_is_undisturbed_until_the_shock_and_says_how_it_recovered(run, tmp_path, name, size):
    run_and_record(run, tmp_path / "calm", "x")
    result = run_and_record(shocked(run, name, size=size, step=20), tmp_path / "hit", "x")
    calm, hit = (read_columns(tmp_path / kind / "steps.csv") for kind in ("calm", "hit"))
    assert hit["loss"][:20].tolist() == calm["loss"][:20].tolist()
    assert hit["loss"][21] != calm["loss"][21]
    assert hit["lr"][20] == pytest.approx(calm["lr"][20] * (size if name == "lr_spike" else 1))
    assert np.delete(hit["lr"], 20).tolist() == np.delete(calm["lr"], 20).tolist()
    assert set(result) >= {"shock_peak", "shock_recovery_steps"}
    assert result["outcome"] == "completed"
    if name == "lr_spike":
        assert result["shock_peak"] > 0.1  # thirty times the learning rate is felt


def test_recovery_counts_the_steps_until_the_loss_is_back():
    losses = np.full(100, 2.0)
    losses[30:50] = np.resize([1.9, 2.1], 20)
    losses[51:61] = 5.0
    found = recovery(losses, 50)
    assert found["shock_peak"] == pytest.approx(3.0)
    assert found["shock_recovery_steps"] == 10
    losses[51:] = 5.0
    assert recovery(losses, 50)["shock_recovery_steps"] is None
    assert recovery(losses, 95) == {"shock_peak": None, "shock_recovery_steps": None}


@pytest.mark.thorough
def test_two_processes_disturb_what_one_does(run, tmp_path):
    run = replace(run, shock=ShockConfig("label_noise", step=5), batch_size=12, steps=10)
    for name, processes in (("alone", 1), ("together", 2)):
        assert run_and_record(run, tmp_path / name, "x", processes=processes)["outcome"] == "completed"
    one, two = (read_columns(tmp_path / name / "steps.csv")["loss"] for name in ("alone", "together"))
    np.testing.assert_allclose(two, one, rtol=2e-4)
