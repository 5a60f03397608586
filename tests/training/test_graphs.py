"""Steps from a graph are the eager steps: on a CPU a `Tape` stands in for the CUDA graph."""

import pytest
import torch
from support.runs import short_run
from support.tapes import Tape

from ebc_lab.config.choices import changed
from ebc_lab.records.streams import read_columns
from ebc_lab.training.graphs import WARM, StepGraphs
from ebc_lab.training.run import Training


@pytest.fixture
def run(tiny):
    return short_run(tiny, "optimizer.lr=2e-2", "steps=45", "stabilizer=ebc", "budget.target_kl=0.01")


def made(run, directory, graphs):
    directory.mkdir(exist_ok=True)
    training = Training(run, directory)
    training.graphs = graphs
    training.pending.capacity = 7  # blocks that end anywhere between audits and evaluations
    return training


def trained(run, directory, graphs):
    training = made(run, directory, graphs)
    result = training.run()
    return training, result, (directory / "steps.csv").read_bytes()


def both_kinds(run, tmp_path):
    """A training step by step, and the same from graphs."""
    return made(run, tmp_path / "eager", StepGraphs(None)), made(run, tmp_path / "taped", StepGraphs(Tape))


RAMP = {"radius_unit": "initial", "ramp": 30}
ARMS = {  # a kind of step each; the emulated device tries all others
    "shadow": {},
    "plain": {"stabilizer": {"name": "none"}},
    "muon": {"optimizer": {"name": "muon", "momentum": 0.9, "weight_decay": 0.1}},
    "surrogate": {"budget": {"name": "surrogate"}},
    "tracked": {"budget": {"name": "tracked"}},
    "a radius beside it": {"budget": {"name": "tracked", "radius": 0.01, "schedule": "linear"} | RAMP},
}


@pytest.mark.parametrize("settings", ARMS.values(), ids=ARMS)
def test_a_graphed_run_is_the_eager_one_bit_for_bit(run, tmp_path, settings):
    run = changed(run, settings)
    eager, expected, rows = trained(run, tmp_path / "eager", StepGraphs(None))
    taped, result, taped_rows = trained(run, tmp_path / "taped", StepGraphs(Tape))
    assert taped_rows == rows
    assert taped.graphs.graphs.keys() >= {()} if run.audit_every > 1 else True
    assert len(taped.graphs.graphs) > 1  # audits too
    assert result["val_loss"] == expected["val_loss"]
    for a, b in zip(eager.model.parameters(), taped.model.parameters(), strict=True):
        assert torch.equal(a, b)
    for name, value in eager.optimizer.state_dict()["bases"][0]["state"].items():
        for key, state in value.items():
            assert torch.equal(state, taped.optimizer.state_dict()["bases"][0]["state"][name][key])


@pytest.mark.thorough
def test_a_rate_as_a_tensor_changes_nothing_but_its_last_digits(run, tmp_path):
    """float32 instead of float64 is all that a graph's learning rate loses."""
    _, plain, _ = trained(run, tmp_path / "number", None)
    _, graphed, _ = trained(run, tmp_path / "tensor", StepGraphs(Tape))
    assert graphed["val_loss"] == pytest.approx(plain["val_loss"], rel=1e-4)
    losses = [read_columns(tmp_path / k / "steps.csv")["loss"] for k in ("number", "tensor")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "optimizer", "budget"),
    [("ebc", "adam", "shadow"), ("ebc", "muon", "tracked"), ("none", "adam", "shadow")],
)
def test_a_bad_gradient_inside_a_graph_is_skipped_with_the_state_untouched(
    run, tmp_path, name, optimizer, budget
):
    settings = {"stabilizer": {"name": name}, "optimizer": {"name": optimizer}, "budget": {"name": budget}}
    run = changed(run, {**settings, "steps": 24})
    recorded = []
    for training in both_kinds(run, tmp_path):
        factor = torch.ones(())
        training.model.head.weight.register_hook(lambda g, f=factor: g * f)
        training.advance(22)
        before = [p.clone() for p in training.model.parameters()]
        factor.fill_(torch.nan)
        training.advance(1)
        assert all(torch.equal(a, b) for a, b in zip(before, training.model.parameters(), strict=True))
        assert training.skips == 1
        factor.fill_(1)
        assert training.advance(1) is None
        training.recording.sync()
        recorded.append([p.tolist() for p in training.model.parameters()])
    assert recorded[0] == recorded[1]
    assert (tmp_path / "eager/steps.csv").read_bytes() == (tmp_path / "taped/steps.csv").read_bytes()


def test_a_non_finite_update_inside_a_block_ends_the_run_where_it_happened(run, tmp_path):
    run = changed(run, {"lr_schedule": {"name": "constant"}, "steps": 60})
    for training in both_kinds(run, tmp_path):
        training.pending.capacity = 20
        training.lr_at = lambda step: 2e-2 if step != 33 else float("inf")
        result = training.run()
        assert (result["outcome"], result["steps"]) == ("diverged", 34)
        assert result["cause"] == "step 33: the optimizer proposed a non-finite update."
    assert (tmp_path / "eager/steps.csv").read_bytes() == (tmp_path / "taped/steps.csv").read_bytes()


@pytest.mark.thorough
def test_a_resumed_run_warms_up_and_captures_again(run, tmp_path):
    _, whole, _ = trained(run, tmp_path / "whole", StepGraphs(Tape))
    first = made(run, tmp_path / "broken", StepGraphs(Tape))
    first.advance(31)
    first.save_checkpoint()
    second, result, _ = trained(run, tmp_path / "broken", StepGraphs(Tape))
    assert second.graphs.seen == run.steps - 31 > WARM
    assert result["weights_checksum"] == whole["weights_checksum"]
    assert result["val_loss"] == whole["val_loss"]
    losses = [read_columns(tmp_path / k / "steps.csv")["loss"].tolist() for k in ("whole", "broken")]
    assert losses[0] == losses[1]
