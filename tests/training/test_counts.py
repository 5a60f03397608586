"""What a step launches, reads, forwards, copies and syncs: a guard on speed that does not depend on a clock.

The bounds are what was counted when they were set, and little more: raise one for a reason only, and say why.
"""

import os
from dataclasses import replace

import pytest
from support.tapes import Counting

from ebc_lab.config.choices import changed
from ebc_lab.config.compose import compose
from ebc_lab.config.dicts import run_part
from ebc_lab.training.run import Training
from ebc_lab.workloads.corpus import locate

pytestmark = pytest.mark.thorough

EVERY_SECOND = {"stabilizer": {"name": "ebc"}, "budget": {"name": "shadow", "measure_every": 2}}
USUAL = range(21, 30)  # past the refinement; the surrogate's groups are due at 40
AUDITED = 30
SHAPE = ["device=cpu", "dtype=float32", "threads_per_run=1", "compile=off", "data=path"]
SHAPE += ["audit_every=10", "budget.measure=every"]
SHAPE += ["batch_size=6", "model.context=32"]  # few activations, so that copies of weights stand out


@pytest.fixture
def training(tmp_path, text_file):
    def make(settings):
        run = run_part(compose([*SHAPE, f"data.file={text_file}"], study=False))
        run = changed(replace(run, data=replace(run.data, sha256=locate(run.data).sha256)), settings)
        made = Training(run, tmp_path)
        made.advance(USUAL.start)
        return made

    return make


def counted(training):
    forwards = []
    training.model.register_forward_hook(lambda *_: forwards.append(1))
    steps = {}
    for step in (*USUAL, AUDITED):
        forwards.clear()
        with Counting() as count:
            training.advance(1)
        steps[step] = count, len(forwards)
    return steps


@pytest.mark.parametrize(
    ("budget", "forwards", "launches", "reads", "copies"),
    [
        (None, 1, 115, 4, 0.5),
        # the formulas for c have one spelling, on 0-dim tensors: 94 and 45 more launches than with floats,
        # 0.5% and 0.3% of a step of 16×64 tokens on a CPU; 16 more learn the flicker of tracked
        ("tracked", 2, 304, 5, 1.5),
        ("shadow", 2, 210, 5, 1.5),
        ("surrogate", 1, 165, 6, 1.5),
        ("fisher", 2, 950, 6, 3),  # one of them forward-mode, hence its launches
    ],
)
def test_a_step_does_no_more_than_it_did(training, budget, forwards, launches, reads, copies):
    ebc = {"stabilizer": {"name": "ebc"}, "budget": {"name": budget}}
    made = training(ebc if budget else {"stabilizer": {"name": "none"}})
    size = sum(p.numel() * p.element_size() for p in made.model.parameters())
    steps = counted(made)
    for step in USUAL:
        count, forwarded = steps[step]
        assert forwarded == forwards
        assert count.launches <= launches, count.ops
        assert count.reads <= reads
        assert count.bytes <= copies * size
    audit, forwarded = steps[AUDITED]
    assert forwarded == forwards + 1
    assert audit.reads <= reads + 1
    assert audit.launches <= launches + 160, audit.ops  # a forward, and the slope over the tensors


def test_measuring_every_second_step_saves_every_second_probe(training):
    steps = counted(training(EVERY_SECOND))
    assert [steps[t][1] for t in USUAL] == [1, 2, 1, 2, 1, 2, 1, 2, 1]
    assert steps[AUDITED][1] == 2  # audits fall on steps of both kinds: this one does not measure


def test_the_streams_are_not_synced_by_steps(training, monkeypatch):
    made = training(EVERY_SECOND)
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    made.advance(10)
    assert synced == []
    made.save_checkpoint()
    assert len(synced) == 3  # both streams and the checkpoint
