"""Tables with what nobody should write: commands to the terminal, losses beyond bounds, words for numbers."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from ebc_lab.config.errors import UserError
from ebc_lab.judging.judgement import judge


def frame(**columns: Any) -> pd.DataFrame:
    losses = [2.0, 2.1, 2.05, 1.8, 1.9, 1.87]
    arms = ["adam"] * 3 + ["muon"] * 3
    return pd.DataFrame({"arm": arms, "seed": [0, 1, 2] * 2, "val_loss": losses, **columns})


def test_names_of_arms_hold_no_command_to_a_terminal_and_no_line_break() -> None:
    evil = "\x1b]0;title\x07 a\n\u202eb "
    record = judge(frame(arm=["adam"] * 3 + [evil] * 3)).record
    assert {arm["arm"] for arm in record["arms"]} == {"adam", r"\x1b]0;title\x07 a \u202eb"}


def test_names_of_columns_hold_no_command_to_a_terminal() -> None:
    table = frame(**{"\x1b[2J": [1, 2, 3] * 2, "\x00": [0.1] * 3 + [0.2] * 3})
    assert r"not used: \x1b[2J, \x00" in {one["sentence"] for one in judge(table).record["taken"]}
    assert judge(table, settings=(r"\x00",)).record["arms"][0]["configuration"] == {r"\x00": 0.2}


@pytest.mark.parametrize("far", [1e101, 1e300, 1.7e308, -1e300])
def test_a_loss_beyond_all_bounds_counts_as_not_finite(far: float) -> None:
    record = judge(frame(val_loss=[2.0, 2.1, far, 1.8, 1.9, 1.87])).record
    assert {arm["arm"]: arm["diverged"] for arm in record["arms"]} == {"adam": 1, "muon": 0}


def test_a_refusal_is_one_line_whatever_a_column_is_called() -> None:
    with pytest.raises(UserError, match=r"say which with --arm, among a\\nb, ") as caught:
        judge(frame().rename(columns={"arm": "a\nb"}))
    assert "\n" not in str(caught.value)


def test_a_refusal_keeps_both_its_ends_where_a_name_is_as_long_as_a_page() -> None:
    curves = pd.concat([frame(run="x" * 9000, step=1)] * 2).assign(val_loss=range(12))
    with pytest.raises(
        UserError, match=r"rows repeat a step of the same run .* name the column that"
    ) as caught:
        judge(curves)
    assert len(str(caught.value)) < 4000


def test_a_loss_with_a_word_among_its_numbers_is_named() -> None:
    with pytest.raises(UserError, match="column val_loss is taken as the loss and holds oom in row 2"):
        judge(frame(val_loss=["2.0", "oom", "2.1", "1.8", "1.9", "1.87"]))


def test_a_setting_called_n_steps_is_not_a_length_where_there_are_no_curves() -> None:
    judged = judge(frame(n_steps=[128] * 3 + [256] * 3), settings=("n_steps",))
    assert not any(one["role"] == "planned" for one in judged.record["taken"])


@pytest.mark.parametrize("nothing", [pd.NA, pd.NaT, None, float("nan"), " "])
def test_a_run_without_an_arm_is_no_arm_of_that_name(nothing: Any) -> None:
    with pytest.raises(UserError, match="arm"):
        judge(frame(arm=pd.Series(["adam"] * 3 + ["muon"] * 2 + [nothing], dtype=object)))


def test_one_arm_of_several_runs_is_not_said_to_lack_them() -> None:
    record = judge(frame(arm="adam", seed=range(6))).record
    assert record["method"] == "There is one arm, and so nothing is compared."


def test_losses_without_any_scatter_are_not_said_to_scatter() -> None:
    record = judge(frame(val_loss=1.5)).record
    assert "unequal_spread" not in {caution["kind"] for caution in record["cautions"]}


@pytest.mark.parametrize("first", [2**53, 2**63, 2**70])
def test_large_seeds_stay_apart_and_pair(first: int) -> None:
    record = judge(frame(seed=pd.Series([first, first + 1, first + 2] * 2, dtype=object))).record
    assert "paired" in record["pairing"]


@pytest.mark.parametrize("far", [2**54, 1e300])
def test_a_step_that_no_run_has_is_named(far: float) -> None:
    curves = pd.concat([frame(run=range(6), step=step) for step in (1.0, 2.0)], ignore_index=True)
    with pytest.raises(
        UserError, match=r"taken as the step and holds [\d.e+]+ in row 4, more than any run has"
    ):
        judge(curves.assign(step=curves.step.where(curves.index != 3, far)))


def test_differences_that_only_rounding_parts_are_one_difference() -> None:
    losses = pd.Series([2e12, 3e12, 4e12, 3e12, 4e12 + 2**-11, 5e12])
    [difference] = judge(frame(val_loss=losses)).record["differences"]
    assert (difference["mean"], difference["method"]) == (1e12, None)
    assert "all runs of an arm agree" in difference["note"]


def test_losses_too_small_to_be_shown_are_refused() -> None:
    small = frame()
    with pytest.raises(UserError, match=r"no val_loss is larger than 1e-08: multiply"):
        judge(small.assign(val_loss=small.val_loss * 1e-300))
    assert judge(small.assign(val_loss=small.val_loss * 1e-6)).record["differences"][0]["method"]
