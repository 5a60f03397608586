"""Steps that were logged more than once, before there is a table of runs."""

import numpy as np
import pytest

from ebc_lab.config.errors import UserError
from ebc_lab.judging.repeats import repeated_steps

STEPS = np.arange(100.0, 3001.0, 100.0)


def kept_of(run, step, loss):
    """Return the rows (run, step, loss) that are kept, sorted, and kind -> caution."""
    run, step, loss = np.array(run), np.array(step, float), np.array(loss, float)
    kept, found = repeated_steps(run, step, loss, [f"r{i}" for i in range(run.max() + 1)], "step")
    rows = np.arange(len(run)) if kept is None else kept
    rows = list(zip(run[rows].tolist(), step[rows].tolist(), loss[rows].tolist(), strict=True))
    return rows, {one["kind"]: one for one in found}


def test_of_a_step_that_was_logged_twice_the_last_value_is_kept_as_a_dictionary_keeps_it():
    rng = np.random.default_rng(0)
    run, step = rng.integers(0, 5, 300), rng.integers(0, 200, 300)
    loss = rng.random(300)
    last = {(r, s): x for r, s, x in zip(run.tolist(), step.tolist(), loss.tolist(), strict=True)}
    rows, found = kept_of(run, step, loss)
    assert rows == sorted((r, s, x) for (r, s), x in last.items())
    assert set(found) <= {"resumed", "step_twice", "row_twice"}


def test_rows_in_order_are_kept_as_they_are_and_interleaved_runs_do_not_go_back():
    assert repeated_steps(*map(np.array, ([0, 0, 1], [1.0, 2.0, 1.0], [3.0, 2.0, 3.0])), "ab", "step") == (
        None,
        [],
    )
    rows, found = kept_of([0, 1, 0, 1], [1, 1, 2, 2], [4, 5, 6, 7])
    assert rows == [(0, 1, 4), (0, 2, 6), (1, 1, 5), (1, 2, 7)]
    assert found == {}


def test_a_resumed_run_is_named_with_its_steps_and_a_row_that_is_there_twice_is_said():
    rows, found = kept_of([0] * 6 + [1] * 4, [1, 2, 3, 4, 3, 4, 1, 2, 2, 3], [9, 8, 7, 6, 5, 4, 9, 8, 8, 7])
    assert [x for r, _, x in rows if r == 0] == [9, 8, 5, 4]
    assert found["resumed"]["runs"] == ["r0"]
    assert "r0 from step 4 to 3" in found["resumed"]["sentence"]
    assert found["row_twice"]["runs"] == ["r1"]
    assert set(found) == {"resumed", "row_twice"}
    _, found = kept_of([0] * 5, [1, 2, 2, 3, 4], [9, 8, 7, 6, 5])
    assert found["step_twice"]["runs"] == ["r0"]


def test_runs_that_no_column_tells_apart_are_asked_for():
    steps = np.tile(STEPS, 3)
    with pytest.raises(UserError, match=r"60 of 90 rows repeat a step.*r0, step 100.*--run COLUMN"):
        kept_of(np.zeros(90, int), steps, np.random.default_rng(0).random(90))
