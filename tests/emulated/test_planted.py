"""Faults planted in the lab itself: a trial on the emulated device notices each of them."""

import pytest
import torch
from support.emulated.arms import ARMS
from support.emulated.own import HalfAfterTen

from ebc_lab.axiom.optimizer import AXIOM
from ebc_lab.training.process import OwnRandomness
from ebc_lab.workloads import batches
from ebc_lab.workloads.batches import Batches

trials = pytest.importorskip("support.emulated.trials", exc_type=ImportError)


@pytest.fixture
def tried(tmp_path, text_file):
    def try_arm(name):
        return trials.trial(ARMS[name], tmp_path / "runs", text_file)

    return try_arm


def test_a_checkpoint_that_forgets_the_random_numbers_of_the_gpu(monkeypatch, tried):
    restore = OwnRandomness.load_state_dict
    monkeypatch.setattr(
        OwnRandomness, "load_state_dict", lambda self, state: restore(self, {**state, "cuda_rng": None})
    )
    found = tried("plain, dropout")
    assert (found.graphed, found.resumed) == (True, False)


def test_a_number_that_python_counts_within_a_captured_step(monkeypatch, tried):
    monkeypatch.setattr(HalfAfterTen, "capturable", True)
    monkeypatch.setattr(
        HalfAfterTen, "_share", lambda self, like: torch.full_like(like, 1.0 if self.steps <= 10 else 0.5)
    )
    found = tried("own stabilizer")
    assert found.kinds
    assert not found.graphed


def test_a_step_that_reads_a_number_within_a_capture(monkeypatch, tried):
    monkeypatch.setattr(HalfAfterTen, "capturable", True)
    monkeypatch.setattr(HalfAfterTen, "_share", lambda self, like: torch.full_like(like, float(like)))
    with pytest.raises(RuntimeError, match=r"capture .*the host waits: a number is read"):
        tried("own stabilizer")


def test_a_batch_that_is_read_on_the_host_between_two_steps(monkeypatch, tried):
    source_at = Batches.source_at

    def looked_at(self, step):
        starts = source_at(self, step)
        assert starts.min().item() >= 0
        return starts

    monkeypatch.setattr(Batches, "source_at", looked_at)
    found = tried("stabilizer=none")
    assert set(found.graph_waits) == {"a number is read"}
    assert found.graphed


def test_a_batch_that_another_stream_brings_and_nobody_waits_for(monkeypatch, tried):
    aside = torch.cuda.Stream()
    brought = batches.brought

    def brought_aside(numbers, device):
        with torch.cuda.stream(aside):
            return brought(numbers, device)

    monkeypatch.setattr(batches, "brought", brought_aside)
    found = tried("stabilizer=none")
    assert any(sentence.startswith("order: ") for sentence in found.findings)


@pytest.mark.slow
def test_a_hook_that_keeps_the_optimizer(monkeypatch, tried):
    monkeypatch.setattr(
        AXIOM, "_hook", lambda self, group: lambda p: self._move_inside(p, self.param_groups[group])
    )
    assert not tried("memory=hooks").given_back
