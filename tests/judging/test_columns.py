"""Which column is what: found by name, said in a line each, asked for where it cannot be told."""

import numpy as np
import pandas as pd
import pytest
from support.runs_of_others import row_a_run, row_a_step, with_cell

from ebc_lab.config.errors import UserError
from ebc_lab.judging.judgement import judge

RUNS = row_a_run()
CURVES = row_a_step()


def taken(frame, **asked):
    """Return role -> column of what was taken."""
    return {one["role"]: one["column"] for one in judge(frame, **asked).record["taken"]}


def said(frame, **asked):
    """Return role -> the sentence about it."""
    return {one["role"]: one["sentence"] for one in judge(frame, **asked).record["taken"]}


def complaint(frame, **asked):
    """Return the one sentence with which a frame is refused."""
    with pytest.raises(UserError) as refused:
        judge(frame, **asked)
    sentence = str(refused.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


@pytest.mark.parametrize(
    ("names", "roles"),
    [
        (["optimizer", "seed", "step", "val_loss"], "arm seed step loss"),
        (["Optimizer", "Random Seed", "global_step", "eval/loss"], "arm seed step loss"),
        (["optimizer.name", "config.seed", "_step", "valid/loss"], "arm seed step loss"),
        (["method", "torch_seed", "epoch", "test_error"], "arm seed step loss"),
        (["algo", "rng_seed", "tokens_seen", "validation_perplexity"], "arm seed step loss"),
        (["group", "seed", "iteration", "dev accuracy"], "arm seed step loss"),
    ],
)
def test_columns_are_found_by_the_names_that_trackers_give_them(names, roles):
    found = taken(CURVES.set_axis(names, axis=1))
    assert [found[role] for role in roles.split()] == names


def test_columns_that_are_asked_for_are_taken_whatever_they_are_called():
    frame = CURVES.set_axis(["a", "b", "c", "d"], axis=1)
    found = said(frame, arm="a", seed="b", step="c", loss="d", better="lower")
    assert all(found[role].endswith("as asked") for role in ("arm", "seed", "step", "loss"))


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (
            RUNS.assign(method=["x", "y"] * 5),
            "optimizer or method could each be the arm: say which with --arm",
        ),
        (RUNS.assign(Seed=range(10)), "seed or Seed could each be the seed: say which with --seed"),
        (RUNS.assign(eval_loss=RUNS.val_loss + 1), "val_loss or eval_loss could each be the loss"),
        (CURVES.assign(iteration=CURVES.step // 200), "step or iteration could each be the step"),
        (RUNS.rename(columns={"val_loss": "loss"}), "loss may be of training: say --loss loss"),
        (RUNS.rename(columns={"val_loss": "train_loss"}), "train_loss may be of training"),
        (RUNS.rename(columns={"val_loss": "x"}), "say which with --loss, among x."),
        (RUNS.drop(columns="val_loss"), "none of its columns holds numbers"),
        (RUNS.drop(columns="optimizer"), "names the arm (the optimizer or method): say which with --arm"),
        (RUNS.assign(val_loss=RUNS.val_loss > 3), "none of its columns holds numbers"),
        (pd.DataFrame(), "a frame of 0 rows"),
        (RUNS.iloc[:0], "a frame of 0 rows"),
        (pd.concat([RUNS, RUNS.val_loss], axis=1), "two columns are called val_loss: rename one"),
    ],
)
def test_what_cannot_be_told_is_asked_for_in_one_sentence(frame, words):
    assert words in complaint(frame)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"loss": "val_los"}, "no column val_los, which --loss names (did you mean val_loss?)"),
        ({"settings": "wd"}, "no column wd, which --setting names"),
        ({"choose": "x"}, "no column x, which --choose names"),
        ({"arm": 3}, "no column 3, which --arm names"),
        ({"arm": "seed", "seed": "seed"}, "--arm and --seed both name column seed"),
        ({"seed": "seed", "settings": ["seed"]}, "--seed and --setting both name column seed"),
        ({"optimiser": "adam"}, "judge has no option optimiser"),
        ({"paired": "yes"}, "paired is True or False, not 'yes'"),
        ({"margin": "x"}, "margin is a number"),
        ({"target": float("-inf")}, "--target is a loss that can be reached, not -inf"),
        ({"at": ["adam=3"]}, "at is a step, or {arm: step}"),
        ({"where": ["seed=x"]}, "has seed = x: there are 0, 1"),
        ({"where": ["blank=x"]}, "has blank = x: there are none."),
    ],
)
def test_options_that_cannot_be_are_refused_in_one_sentence(asked, words):
    assert words in complaint(RUNS.assign(blank=None), **asked)


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (
            with_cell(RUNS, "val_loss", 4, "crashed"),
            "column val_loss is taken as the loss and holds crashed in row 4",
        ),
        (with_cell(CURVES, "step", 4, "end"), "column step is taken as the step and holds end in row 4"),
        (
            with_cell(CURVES, "step", 4, "1,000"),
            "holds 1,000 in row 4: write numbers with a decimal point and",
        ),
        (with_cell(RUNS, "val_loss", 4, "3,25"), "holds 3,25 in row 4: write numbers with a decimal point"),
        (
            with_cell(RUNS, "optimizer", 4, None),
            "1 row without a value in column optimizer, which names the arm",
        ),
        (with_cell(RUNS, "optimizer", 4, " "), "(the first in row 4)"),
        (
            CURVES.assign(step=CURVES.step.where(CURVES.index > 1)),
            "2 rows with a val_loss lack the step (the first is row 1)",
        ),
        (
            CURVES.drop(columns="seed"),
            "name the column that tells runs apart (--run COLUMN or --seed COLUMN)",
        ),
    ],
)
def test_cells_that_do_not_fit_are_named_with_their_row(frame, words):
    assert words in complaint(frame)


def test_percentages_are_numbers_and_said_to_be_percentages():
    scores = RUNS.assign(val_acc=[f" {90 + x:.3f} %" for x in RUNS.val_loss]).drop(columns="val_loss")
    plain = RUNS.assign(val_acc=[float(f"{90 + x:.3f}") for x in RUNS.val_loss]).drop(columns="val_loss")
    assert judge(scores).record["differences"] == judge(plain).record["differences"]
    assert said(scores)["unit"] == "unit: val_acc is in percent"
    assert "unit" not in said(plain)
    mixed = with_cell(scores, "val_acc", 7, "0.93")
    assert "percentages in some rows and plain numbers in others (row 7)" in complaint(mixed)


def test_the_direction_is_told_and_by_what():
    score = RUNS.rename(columns={"val_loss": "val_acc"})
    assert said(score)["better"] == "better: higher val_acc is better, by its name"
    assert said(RUNS)["better"] == "better: lower val_loss is better, by its name"
    assert said(RUNS, better="higher")["better"] == "better: higher val_loss is better, as asked"
    unknown = complaint(RUNS.rename(columns={"val_loss": "x"}), loss="x")
    assert "say --better lower or --better higher" in unknown


def test_a_loss_that_behaves_as_an_accuracy_is_questioned():
    rising = CURVES.assign(metric=6 - CURVES.val_loss).drop(columns="val_loss")
    assert any(
        "--better higher" in sentence for sentence in judge(rising, loss="metric", better="lower").problems
    )
    assert not any("--better higher" in sentence for sentence in judge(CURVES).problems)


def test_a_test_loss_is_judged_and_the_validation_loss_chooses():
    rng = np.random.default_rng(1)
    grid = pd.concat([RUNS.assign(lr=lr, val_loss=RUNS.val_loss + lr) for lr in (0.0, 0.1)])
    grid["test_loss"] = 9 - grid.val_loss + 0.01 * rng.standard_normal(len(grid))
    found = judge(grid)
    assert taken(grid)["loss"] == "test_loss"
    assert taken(grid)["choose"] == "val_loss"
    assert [arm["configuration"] for arm in found.record["arms"]] == [{"lr": 0.0}] * 2


def test_the_only_column_named_as_a_loss_is_taken_though_it_holds_words():
    words = complaint(RUNS.assign(val_loss="oops"))
    assert "column val_loss is taken as the loss and holds oops in row 1" in words


def test_names_of_more_than_fifty_runs_without_an_arm_are_asked_about():
    def named(count):
        return pd.DataFrame(
            {"file": [f"{chr(97 + i % 26)}{chr(97 + i // 26)}x" for i in range(count)], "loss": 1.0}
        )

    assert "51 names in column file and no arm in them" in complaint(named(51), loss="loss", better="lower")
    assert len(judge(named(50).assign(loss=range(50)), loss="loss").record["arms"]) == 50


def test_what_is_not_used_is_said():
    assert "note" in said(RUNS.assign(note=range(10)))["not used"]
    assert "Unnamed: 0" in said(RUNS.assign(**{"Unnamed: 0": range(10)}))["not used"]


def test_two_columns_that_say_the_same_are_no_question():
    assert taken(CURVES.assign(global_step=2 * CURVES.step))["step"] == "step"
    assert taken(RUNS.assign(eval_loss=RUNS.val_loss))["loss"] == "val_loss"
    assert taken(RUNS.assign(method=RUNS.optimizer.str.upper()))["arm"] == "optimizer"
    assert taken(RUNS.assign(method="the same"))["arm"] == "optimizer"


def test_categories_are_no_measurement_even_if_they_are_numbers():
    grouped = RUNS.assign(val_loss_of=pd.Categorical([str(i % 2) for i in range(len(RUNS))]))
    assert taken(grouped)["loss"] == "val_loss"


def test_names_of_runs_are_parted_into_arm_seed_and_settings():
    names = [
        f"{arm}-lr={lr}-s{seed}" for arm, seed in zip(RUNS.optimizer, RUNS.seed, strict=True) for lr in (1, 2)
    ]
    frame = pd.DataFrame({"name": names, "val_loss": np.repeat(RUNS.val_loss, 2) + np.tile([0, 0.2], 10)})
    found = judge(frame)
    assert {arm["arm"]: arm["configuration"] for arm in found.record["arms"]} == {
        "adam": {"lr": "1"},
        "muon": {"lr": "1"},
    }
    assert found.record["paired"]


def test_a_frame_of_any_make_is_read_as_its_plain_form():
    plain = judge(RUNS).record
    levels = RUNS.set_index(["optimizer", "seed"])
    odd = RUNS.set_index(np.full(10, 7))
    categories = RUNS.astype({"optimizer": "category"})
    objects = RUNS.astype(object)
    text = RUNS.astype(str)
    one_level = RUNS.set_index("seed", drop=False)
    for frame in (levels, odd, categories, objects, text, one_level, RUNS.convert_dtypes()):
        assert judge(frame).record["differences"] == plain["differences"]
    joined = RUNS.set_axis(
        pd.MultiIndex.from_tuples([("optimizer", ""), ("seed", ""), ("val_loss", "last")]), axis=1
    )
    assert taken(joined)["loss"] == "val_loss/last"
    assert (
        judge(RUNS.assign(lr=[[1, 2]] * 10, config=[{"a": 1}] * 10)).record["differences"]
        == plain["differences"]
    )
    numbered = RUNS.set_axis([0, 1, 2], axis=1)
    assert (
        judge(numbered, arm=0, seed=1, loss=2, better="lower").record["differences"] == plain["differences"]
    )


def test_the_frame_of_the_caller_is_left_as_it_was():
    frame = RUNS.assign(lr=[[1, 2]] * 10).set_index("seed")
    before = frame.copy(deep=True)
    judge(frame)
    pd.testing.assert_frame_equal(frame, before)


def test_what_is_no_frame_and_no_path_is_refused():
    for wrong in ([RUNS], None, 3, [None]):
        assert "judge takes a frame" in complaint(wrong) or "give the files" in complaint(wrong)
