"""A hook of one's own is called at every turn of a step; Training knows none by name."""

import pytest
import torch
from support.runs import made, plain, resumed_after, untimed

from ebc_lab import components
from ebc_lab.components.hook import Hook
from ebc_lab.records.streams import read_columns
from ebc_lab.training.outcome import run_and_record
from ebc_lab.training.run import Training


class Halved(Hook):
    """Halves the gradients, and counts its steps."""

    name = "halved"
    columns = ("halved",)

    def __init__(self, run, built):
        self.model = built.model
        self.count = 0

    def gradients(self, t, loss, lr):
        for p in self.model.parameters():
            p.grad *= 0.5
        self.count += 1
        return {"halved": torch.tensor(self.count)}

    def figures(self, bases):
        return {"halvings": self.count}

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


@pytest.fixture
def halving(run, monkeypatch):
    monkeypatch.setattr(components, "HOOKS", [*components.HOOKS, lambda: Halved])
    return plain(run)


@pytest.mark.thorough
def test_its_column_figure_and_gradients_are_those_of_the_run(halving, tmp_path, monkeypatch):
    result = run_and_record(halving, tmp_path / "with", "x")
    assert result["halvings"] == 30
    rows = read_columns(tmp_path / "with/steps.csv")
    assert rows["halved"].tolist() == list(range(1, 31))
    monkeypatch.undo()
    monkeypatch.setattr(components, "HOOKS", [])
    assert "halvings" not in run_and_record(halving, tmp_path / "without", "x")
    norms = read_columns(tmp_path / "without/steps.csv")["grad_norm"]
    assert rows["grad_norm"][0] == pytest.approx(norms[0] / 2)


@pytest.mark.thorough
def test_its_state_is_in_the_checkpoint(halving, tmp_path):
    whole = run_and_record(halving, tmp_path / "whole", "x")
    assert untimed(resumed_after(halving, tmp_path / "broken", (7, 23))) == untimed(whole)
    assert (tmp_path / "whole/steps.csv").read_bytes() == (tmp_path / "broken/steps.csv").read_bytes()


def test_hooks_without_a_state_leave_the_checkpoint_as_it_was(run, tmp_path):
    assert list(Training(plain(run), made(tmp_path))._parts()) == ["model", "optimizer"]
