"""What a step launches, reads, forwards, copies and syncs: a guard on speed that does not depend on a clock.

The bounds are what was counted when they were set, and little more: raise one for a reason only, and say why.
"""

import os

import pytest
from support.runs import resolved
from support.tapes import Counting

from ebc_lab.config.choices import changed
from ebc_lab.config.compose import compose
from ebc_lab.config.dicts import run_part
from ebc_lab.training.run import Training

pytestmark = pytest.mark.thorough

USUAL = range(21, 30)  # past the refinement; the surrogate's groups are due at 40
AUDITED = 30
SHAPE = ["device=cpu", "dtype=float32", "threads_per_run=1", "compile=off", "data=path"]
SHAPE += ["audit_every=10", "budget.measure=every"]
SHAPE += ["batch_size=6", "model.context=32"]  # few activations, so that copies of weights stand out


@pytest.mark.parametrize(
    ("budget", "forwards", "launches", "reads", "copies"),
    [
        (None, 1, 115, 4, 0.5),
        # on a CPU the rules for c are in floats: a read costs less there than a launch on a 0-dim tensor
        ("tracked", 2, 179, 19, 1.5),
        ("shadow", 2, 168, 10, 1.5),
        ("surrogate", 1, 148, 8, 1.5),
        ("fisher", 2, 904, 8, 3),  # one of them forward-mode, hence its launches
    ],
)
def test_a_step_does_no_more_than_it_did(
    tmp_path, text_file, monkeypatch, budget, forwards, launches, reads, copies
):
    ebc = {"stabilizer": {"name": "ebc"}, "budget": {"name": budget}}
    run = resolved(run_part(compose([*SHAPE, f"data.file={text_file}"], study=False)))
    training = Training(changed(run, ebc if budget else {"stabilizer": {"name": "none"}}), tmp_path)
    size = sum(p.nbytes for p in training.model.parameters())
    training.advance(USUAL.start)
    forwarded, synced = [], []
    training.model.register_forward_hook(lambda *_: forwarded.append(1))
    monkeypatch.setattr(os, "fsync", synced.append)
    for step in (*USUAL, AUDITED):
        audit = step == AUDITED
        forwarded.clear()
        with Counting() as count:
            training.advance(1)
        assert len(forwarded) == forwards + audit
        # an audit's are a forward, and the slope over the tensors; it reads what it records
        assert count.launches <= launches + 160 * audit, count.ops
        assert count.reads <= reads + 6 * audit
        assert count.bytes <= copies * size or audit
    assert synced == []  # steps do not wait for the disk
    training.save_checkpoint()
    assert len(synced) == 3  # both streams and the checkpoint
