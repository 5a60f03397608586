"""The rules that every stage shares."""

import math

import pytest
from support.played import config_of, done

from ebc_lab.study.stages.rules import (
    FORM,
    best,
    decision_problem,
    make_decision,
    val_loss,
)
from ebc_lab.study.stages.stage import stage_of


@pytest.mark.parametrize(
    "result",
    [
        None,
        {},
        {"outcome": "completed", "val_loss": math.nan},
        {"outcome": "completed", "val_loss": None},
        {"outcome": "diverged", "val_loss": 0.1},
        {"outcome": "failed", "val_loss": 0.1},
        {"outcome": "lost"},
    ],
)
def test_nothing_but_a_completed_finite_loss_can_win(result):
    assert val_loss(result) == math.inf
    specs = stage_of("lr_sweep").runs(config_of("optimizer=adam"), {}, {})
    results = {s.run_id: result or {} for s in specs}
    assert best(specs, results) is None
    results[specs[2].run_id] = done(9.0)
    assert best(specs, results) == specs[2]


def test_a_decision_of_another_form_or_with_another_figure_cannot_be_used():
    config = config_of("optimizer=adam")
    decision = make_decision("lr_sweep", "any", config, [], {}, {}, tracks={"adam_none": {}}, notes=[])
    assert decision_problem(decision) is None
    edited = {**decision, "notes": ["mine"]}
    assert decision_problem(edited) == "its record in auto_decisions.json was edited"
    unmarked = {k: v for k, v in decision.items() if k != "decision_sha256"}
    from ebc_lab.records.json_files import with_checksum

    earlier = with_checksum({**unmarked, "form": FORM - 1}, "decision_sha256")
    assert decision_problem(earlier) == "it was recorded by another version of ebc-lab"
