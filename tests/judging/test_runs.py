"""Rows as runs and curves: what makes a run, where it ends, and what is said of odd rows."""

import math

import numpy as np
import pandas as pd
import pytest
from support.runs_of_others import row_a_run, row_a_step

from ebc_lab.config.errors import UserError
from ebc_lab.judging.judgement import judge
from ebc_lab.judging.runs import LARGEST

RUNS = row_a_run()
CURVES = row_a_step()


def kinds(found):
    return {one["kind"]: one["runs"] for one in found.record["cautions"]}


def test_a_run_is_an_arm_and_a_seed_and_its_curve_is_in_order():
    found = judge(CURVES.sample(frac=1, random_state=1))
    runs, curves = found.data.table, found.data.curves
    assert len(runs) == 8
    assert set(runs["length"]) == {500}
    assert set(runs["rows"]) == {6}
    in_order = curves.sort_values(["run", "step"])
    assert (curves[["run", "step"]].to_numpy() == in_order[["run", "step"]].to_numpy()).all()
    for number, run in runs.iterrows():
        mine = CURVES[(CURVES.optimizer == run.arm) & (CURVES.seed == int(run.seed))]
        assert list(curves.loss[curves.run == number]) == list(mine.val_loss)
        assert run.outcome == mine.val_loss.iloc[-1]


@pytest.mark.parametrize(
    "seeds", [[0.0, 1.0, 2.0, 3.0], ["0", "1", "2", "3"], pd.array([0, 1, 2, 3], "Int64")]
)
def test_a_seed_is_the_same_as_int_float_and_text(seeds):
    frame = CURVES.assign(seed=pd.Series(seeds).take(CURVES.seed).to_numpy())
    assert list(judge(frame).data.table["seed"]) == ["0", "1", "2", "3"] * 2


def test_a_loss_that_is_not_finite_is_behind_all_others_and_is_not_dropped():
    for lost in (math.nan, math.inf, -math.inf, LARGEST, "NaN", "inf"):
        frame = RUNS.assign(val_loss=RUNS.val_loss.astype(object).where(RUNS.index != 3, lost))
        found = judge(frame)
        assert len(found.data.table) == 10
        assert found.data.table["outcome"][3] == math.inf
        assert [arm["diverged"] for arm in found.record["arms"]] == [0, 1]  # muon is first
        assert found.record["arms"][0]["arm"] == "muon"
        assert found.record["runs"][3]["outcome"] is None
        score = judge(frame.rename(columns={"val_loss": "val_acc"}))
        assert score.data.table["outcome"][3] == -math.inf


def test_blanks_between_evaluations_are_no_losses():
    """A tracker's export has a row for each step that logged anything."""
    blank = CURVES.assign(step=CURVES.step + 50, val_loss=np.nan)
    both = pd.concat([CURVES, blank[blank.step < 500]]).sort_values(["optimizer", "seed", "step"])
    assert judge(both).record["differences"] == judge(CURVES).record["differences"]
    assert not kinds(judge(both))
    late = pd.concat([both, blank[blank.step > 500]])  # after the last evaluation, at no step of the others
    assert not kinds(judge(late))
    beyond = pd.concat([both, CURVES[CURVES.step == 500].assign(step=700, val_loss=np.nan)])
    assert not kinds(judge(beyond))


def test_a_blank_at_the_end_where_other_runs_have_a_loss_is_a_divergence_and_said():
    frame = CURVES.assign(val_loss=CURVES.val_loss.where((CURVES.index > 5) | (CURVES.step < 300)))
    found = judge(frame)
    assert kinds(found)["blank_end"] == ["adam, seed 0"]
    assert found.data.table["outcome"][0] == math.inf
    assert found.record["arms"][1]["diverged"] == 1
    assert found.data.curves.loss[:6].map(math.isinf).tolist() == [False] * 3 + [True] * 3


def test_a_blank_sooner_than_a_loss_was_due_is_none_that_is_missing():
    """One arm is evaluated each 100 steps and logs a training loss in between, the other each 50."""
    often = CURVES[CURVES.optimizer == "muon"]
    often = pd.concat([often, often.assign(step=often.step + 50, val_loss=often.val_loss - 0.01)])
    seldom = CURVES[CURVES.optimizer == "adam"]
    between = seldom.assign(step=seldom.step + 50, val_loss=np.nan)
    found = judge(pd.concat([often, seldom, between]).sort_values(["optimizer", "seed", "step"]))
    assert "blank_end" not in kinds(found)
    assert found.record["arms"][0]["diverged"] == found.record["arms"][1]["diverged"] == 0


def test_what_is_not_finite_in_a_curve_is_the_worst_value():
    for lost in (math.inf, -math.inf):
        frame = CURVES.assign(val_loss=CURVES.val_loss.where(CURVES.index != 3, lost))
        assert judge(frame).data.curves.loss[3] == math.inf
        assert judge(frame, better="higher").data.curves.loss[3] == -math.inf


def test_of_a_step_that_was_logged_again_the_last_value_counts_and_the_run_is_named():
    again = CURVES.iloc[[3, 4, 5]].assign(val_loss=[2.5, 2.4, 2.3])
    found = judge(pd.concat([CURVES, again]))
    assert found.data.table["outcome"][0] == 2.3
    assert kinds(found)["resumed"] == ["adam, seed 0"]
    copied = judge(pd.concat([CURVES.iloc[:6], CURVES.iloc[5:6], CURVES.iloc[6:]]))
    assert kinds(copied) == {"row_twice": ["adam, seed 0"]}
    assert copied.record["differences"] == judge(CURVES).record["differences"]


def test_two_rows_of_one_arm_and_seed_are_said_and_not_paired():
    found = judge(pd.concat([RUNS, RUNS.iloc[[2]].assign(val_loss=3.02)]))
    assert not found.record["paired"]
    assert "two runs of one seed" in found.record["pairing"]
    assert any("--setting COLUMN" in sentence for sentence in found.problems)


def test_a_seed_that_is_a_running_number_pairs_nothing_and_is_said():
    found = judge(RUNS.assign(seed=range(10)))
    assert not found.record["paired"]
    assert any("running number" in sentence for sentence in found.problems)


def test_a_seed_that_is_missing_somewhere_pairs_nothing():
    found = judge(RUNS.assign(seed=RUNS.seed.where(RUNS.index != 4)))
    assert not found.record["paired"]
    assert "every run a seed" in found.record["pairing"]


def test_the_same_seed_in_runs_of_several_lengths_is_several_runs():
    longer = row_a_step(last=800, number=1).assign(planned=800)
    both = pd.concat([CURVES.assign(planned=500), longer])
    found = judge(both)
    assert len(found.data.table) == 16
    assert sorted(found.data.table["length"].unique()) == [500, 800]
    assert set(found.data.table["planned"]) == {500, 800}
    assert judge(CURVES.assign(planned=500)).data.table["run"][0] == "adam, seed 0"


def test_a_column_of_runs_tells_runs_apart_where_arm_and_seed_do_not():
    twice = pd.concat([CURVES.assign(trial="a"), CURVES.assign(trial="b", val_loss=CURVES.val_loss + 0.001)])
    found = judge(twice)
    assert len(found.data.table) == 16
    assert found.data.table["run"].is_unique
    with pytest.raises(UserError, match="tells runs apart"):
        judge(twice.drop(columns="trial"))


def test_a_learning_rate_that_is_logged_as_a_schedule_is_no_setting():
    logged = CURVES.assign(lr=1e-3 * (1 - CURVES.step / 600))
    found = judge(logged)
    assert found.data.settings == ()
    assert found.record["tuning"] is None
    assert not kinds(found)
    assert len(found.data.table) == 8


def test_a_setting_that_varies_within_runs_makes_no_configuration_and_is_said():
    found = judge(CURVES.assign(momentum=0.9 + CURVES.step / 10000))
    assert found.data.settings == ()
    assert any("momentum varies within runs" in sentence for sentence in found.problems)


def test_a_grid_with_seeds_has_configurations_with_replicates():
    grid = pd.concat([row_a_step(number=i).assign(lr=lr) for i, lr in enumerate((1e-4, 1e-3, 1e-2))])
    grid["val_loss"] += 0.1 * (np.log10(grid.lr) + 3) ** 2
    found = judge(grid)
    assert found.data.settings == ("lr",)
    assert len(found.data.table) == 24
    assert [arm["configuration"]["lr"] for arm in found.record["arms"]] == [1e-3, 1e-3]
    assert {name: of["configurations"] for name, of in found.record["tuning"]["arms"].items()} == {
        "adam": 3,
        "muon": 3,
    }
    assert len(found.record["runs"]) == 8


def test_arms_that_differ_in_spaces_or_capitals_alone_are_pointed_out():
    assert "alike_arms" in kinds(judge(row_a_run(["adam", "Adam "])))
    assert "alike_arms" not in kinds(judge(RUNS))


def test_names_of_runs_are_unique():
    for frame in (
        RUNS.drop(columns="seed"),
        pd.concat([RUNS, RUNS]),
        RUNS.assign(seed=0),
        CURVES.assign(run="x"),
    ):
        assert judge(frame).data.table["run"].is_unique


def test_settings_of_a_name_that_the_table_has_are_kept_apart():
    frame = RUNS.assign(rows=[1, 2] * 5, length=3)
    found = judge(frame, settings=("rows", "length"))
    assert found.data.settings == ("setting rows", "setting length")
    assert list(found.data.table["rows"]) == [0] * 10


def test_several_files_are_one_table(tmp_path):
    for arm, of_arm in CURVES.groupby("optimizer"):
        of_arm.to_csv(tmp_path / f"{arm}.csv", index=False)
    RUNS.to_json(tmp_path / "runs.jsonl", orient="records", lines=True)
    whole, parts = judge(CURVES), judge([tmp_path / "adam.csv", tmp_path / "muon.csv"])
    assert parts.record["differences"] == whole.record["differences"]
    with pytest.raises(UserError, match="the sources differ in what is the step"):
        judge([tmp_path / "adam.csv", tmp_path / "runs.jsonl"])


def test_times_of_runs_are_read_as_text_and_as_seconds():
    days = pd.date_range("2026-01-01", periods=10, tz="UTC")
    for started in (
        days,
        days.strftime("%Y-%m-%d %H:%M:%S"),
        days.astype("int64") / (days.astype("int64") // days.map(lambda t: int(t.timestamp()))),
    ):
        assert list(judge(RUNS.assign(started=started)).data.table["started"].dt.day) == list(range(1, 11))


def test_runs_of_one_name_in_two_sources_stay_two_runs(tmp_path):
    RUNS.to_csv(tmp_path / "a.csv", index=False)
    more = RUNS.assign(val_loss=RUNS.val_loss + 0.001)
    more.to_json(tmp_path / "b.jsonl", orient="records", lines=True)
    found = judge([tmp_path / "a.csv", tmp_path / "b.jsonl"])
    assert [arm["runs"] for arm in found.record["arms"]] == [10, 10]
    assert found.data.table["run"].is_unique


def test_curves_of_two_formats_keep_their_runs(tmp_path):
    adam, muon = (of_arm for _, of_arm in CURVES.groupby("optimizer"))
    adam.to_csv(tmp_path / "adam.csv", index=False)
    muon.to_json(tmp_path / "muon.jsonl", orient="records", lines=True, double_precision=15)
    found = judge([tmp_path / "adam.csv", tmp_path / "muon.jsonl"], target=3.3)
    for arm, expected in judge(CURVES, target=3.3).record["steps"]["arms"].items():
        assert found.record["steps"]["arms"][arm] == expected


def test_rows_of_curves_without_a_known_step_are_asked_about_and_runs_of_one_seed_are_not():
    frame = row_a_step().rename(columns={"step": "date"})
    with pytest.raises(UserError, match=r"every optimizer and seed has 5 rows or more.*--step"):
        judge(frame)
    assert len(judge(row_a_run().assign(seed=42)).runs()) == len(row_a_run())
