"""What of a curve a run is judged by, and which of an arm's runs."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from support.runs_of_others import row_a_run, row_a_step

from ebc_lab.config.errors import UserError
from ebc_lab.judging.asked import exchange_of, steps_at
from ebc_lab.judging.judgement import judge

CURVES = row_a_step()
SCORES = CURVES.assign(val_acc=1 - CURVES.val_loss / 6).drop(columns="val_loss")


def outcomes(found):
    """Return (arm, seed) -> outcome of the judged runs."""
    return {(run["arm"], int(run["seed"])): run["outcome"] for run in found.record["runs"]}


def by_run(frame):
    return frame.groupby(["optimizer", "seed"])


def kinds(found):
    return {one["kind"]: one["runs"] for one in found.record["cautions"]}


def test_the_last_value_is_judged_unless_another_is_asked_for():
    assert outcomes(judge(CURVES)) == by_run(CURVES).val_loss.last().to_dict()
    assert judge(CURVES).record["outcome"] == "the last val_loss of each run"


def test_the_best_value_is_named_as_such_and_warned_about():
    noisy = row_a_step(noise=0.5)
    found = judge(noisy, outcome="best")
    assert outcomes(found) == by_run(noisy).val_loss.min().to_dict()
    assert "best val_loss over the steps" in found.answer
    assert any("too good" in sentence for sentence in found.problems)
    score = noisy.assign(val_acc=-noisy.val_loss).drop(columns="val_loss")
    assert outcomes(judge(score, outcome="best")) == by_run(score).val_acc.max().to_dict()


def test_steps_to_a_target_are_judged_and_fewer_are_better():
    found = judge(CURVES, outcome="target", target=3.4)
    first = by_run(CURVES[CURVES.val_loss <= 3.4]).step.first()
    assert outcomes(found) == first.to_dict()
    assert found.record["unit"] == "steps"
    assert "steps to the first val_loss ≤ 3.4" in found.answer


def test_a_target_that_is_never_reached_ranks_behind():
    found = judge(CURVES, outcome="target", target=3.2)
    muon = next(arm for arm in found.record["arms"] if arm["arm"] == "muon")
    assert muon["diverged"] == 4
    assert muon["mean"] is None
    assert found.record["arms"][0]["arm"] == "adam"


def test_for_an_accuracy_the_target_is_reached_from_below_and_fewer_steps_are_better():
    loss, score = (
        judge(CURVES, outcome="target", target=3.3),
        judge(SCORES, outcome="target", target=1 - 3.3 / 6),
    )
    assert outcomes(loss) == outcomes(score)
    assert "≥" in score.answer
    assert [arm["mean"] for arm in loss.record["arms"]] == [arm["mean"] for arm in score.record["arms"]]
    assert loss.record["differences"] == score.record["differences"]


def test_steps_to_the_target_are_a_part_of_every_judgement_that_has_one():
    found = judge(CURVES, target=3.3)
    first = by_run(CURVES[CURVES.val_loss <= 3.3]).step.first()
    assert found.record["steps"]["arms"]["adam"]["mean"] == first["adam"].mean()
    assert judge(CURVES).record["steps"] is None


def test_a_step_is_asked_for_of_all_arms_or_of_one():
    at_300 = CURVES[CURVES.step == 300].set_index(["optimizer", "seed"]).val_loss.to_dict()
    last = by_run(CURVES).val_loss.last().to_dict()
    assert outcomes(judge(CURVES, at={"": 300})) == outcomes(judge(CURVES, at=300)) == at_300
    of_one = {key: (at_300 if key[0] == "adam" else last)[key] for key in last}
    assert outcomes(judge(CURVES, at={"adam": 300})) == of_one
    both = {key: (last if key[0] == "adam" else at_300)[key] for key in last}
    assert outcomes(judge(CURVES, at={"": 300, "adam": 500})) == both
    assert {arm["arm"]: arm["at"] for arm in judge(CURVES, at={"adam": 300}).record["arms"]} == {
        "adam": 300,
        "muon": None,
    }


def test_a_run_without_an_evaluation_at_the_step_ranks_behind_and_is_named():
    short = CURVES[(CURVES.optimizer != "muon") | (CURVES.seed != 2) | (CURVES.step < 400)]
    found = judge(short, at=500)
    assert outcomes(found)["muon", 2] is None
    assert kinds(found)["no_step"] == ["muon, seed 2"]


@pytest.mark.parametrize(
    ("frame", "asked", "words"),
    [
        (CURVES, {"at": {"adam": 333}}, "adam has no evaluation at step 333: the nearest is 300"),
        (CURVES, {"at": {"adm": 300}}, "--at names the arm adm, which is not there: there are adam or muon"),
        (row_a_run(), {"at": 300}, "--at needs curves"),
        (row_a_run(), {"outcome": "best"}, "--outcome best needs curves"),
        (CURVES, {"outcome": "target"}, "needs a --target"),
        (CURVES, {"outcome": "first"}, "--outcome is last, target or best, not first"),
        (CURVES, {"chain": ("adam", "sgd")}, "--chain names sgd, which is no arm: there are adam or muon"),
        (CURVES, {"chain": "adam,muon,adam"}, "--chain names adam twice"),
        (CURVES, {"exchange": -1}, "--exchange is a loss of at least 0"),
        (row_a_run(), {"target": 3}, "--target needs curves"),
        (row_a_run(), {"rule": "track3"}, "--rule needs curves"),
        (SCORES, {"rule": "track3"}, "--rule track3 is one of losses"),
        (CURVES, {"chain": ("adam",)}, "--chain names the arms from the first to the last"),
    ],
)
def test_outcomes_that_cannot_be_are_refused_in_one_sentence(frame, asked, words):
    with pytest.raises(UserError) as refused:
        judge(frame, **asked)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_steps_and_exchanges_are_read_as_they_are_typed():
    assert steps_at(["300", "a=b=400"]) == {"": 300, "a=b": 400}
    assert exchange_of("0.0045/100") == pytest.approx(4.5e-5)
    assert exchange_of("0.1") == 0.1
    assert exchange_of("") is None
    for wrong in ("x", "1/0", "-1", "nan", "1/x"):
        with pytest.raises(UserError, match=r"^--exchange .*0\.0045/100"):
            exchange_of(wrong)
    with pytest.raises(UserError, match="--at is STEP or ARM=STEP"):
        steps_at(["adam="])


# -- several lengths -----------------------------------------------------------------------------------------


def of_lengths(lengths, slope=5e-5):
    """Return arm -> lengths as curves with a planned length; a run is lower by `slope` a planned step."""
    made = [
        row_a_step([arm], last=last, number=last).assign(
            planned=last, val_loss=lambda f, last=last: f.val_loss - slope * last
        )
        for arm, of_arm in lengths.items()
        for last in of_arm
    ]
    return pd.concat(made)


def test_of_several_lengths_the_one_that_most_arms_have_is_compared():
    frame = of_lengths({"adam": (500, 1000), "muon": (500,), "sgd": (500,)})
    found = judge(frame)
    assert {run["length"] for run in found.record["runs"]} == {500}
    assert sorted(kinds(found)["lengths"]) == [f"adam, seed {i}, planned 1000" for i in range(4)]
    assert found.record["lengths"]["rates"].keys() == {"adam"}


def test_the_exchange_of_loss_for_steps_is_estimated_or_given():
    frame = of_lengths({"adam": (500, 1000), "muon": (1000,)})
    estimated, given = judge(frame).record["lengths"], judge(frame, exchange="0.0045/100").record["lengths"]
    finals = (
        frame.groupby(["optimizer", "planned", "seed"])
        .val_loss.last()
        .groupby(["optimizer", "planned"])
        .mean()
    )
    assert estimated["exchange"] == pytest.approx((finals["adam", 500] - finals["adam", 1000]) / 500)
    assert estimated["by"] == "from the lengths of adam"
    assert given["exchange"] == pytest.approx(4.5e-5)
    assert given["by"] == "as given"


def test_configurations_that_were_only_tried_at_one_length_do_not_enter_the_exchange():
    frame = of_lengths({"adam": (500, 1000), "muon": (500,)}).assign(lr=0.1)
    tried = frame[(frame.optimizer == "adam") & (frame.planned == 500)]
    tried = tried.assign(lr=0.9, val_loss=tried.val_loss + 1)
    rate, both = (judge(x).record["lengths"]["rates"]["adam"] for x in (frame, pd.concat([frame, tried])))
    assert both == rate


def test_arms_of_unequal_lengths_are_compared_at_equal_steps_with_an_exchange():
    frame = of_lengths({"adam": (500,), "muon": (800,)}, slope=0)
    [plain] = judge(frame, reference="adam").record["differences"]
    [equal] = judge(frame, reference="adam", exchange=1e-4).record["lengths"]["differences"]
    assert equal["mean"] - plain["mean"] == pytest.approx(300 * 1e-4)
    scores = frame.assign(val_acc=1 - frame.val_loss / 9).drop(columns="val_loss")
    found = judge(scores, reference="adam", exchange=1e-5).record
    [plain], [equal] = found["differences"], found["lengths"]["differences"]
    assert equal["mean"] - plain["mean"] == pytest.approx(
        -300 * 1e-5
    )  # more is better, and steps are charged


def test_the_luck_of_a_tuning_is_in_the_intervals_at_equal_steps_too():
    frame = of_lengths({"adam": (500,), "muon": (800,)}, slope=0).assign(lr=0.1)
    both = pd.concat([frame, frame.assign(lr=0.2, val_loss=frame.val_loss + np.arange(len(frame)) % 7 / 700)])
    found = judge(both, reference="adam", exchange=1e-4).record
    assert found["tuning"]["arms"]["adam"]["luck"]["sd"] > 0
    [plain], [equal] = found["differences"], found["lengths"]["differences"]
    assert equal["high"] - equal["low"] == pytest.approx(plain["high"] - plain["low"])


def test_a_diverged_run_that_stopped_early_is_no_length_of_its_own():
    frame = CURVES[(CURVES.optimizer != "muon") | (CURVES.seed < 2) | (CURVES.step < 400)].copy()
    frame.loc[(frame.optimizer == "muon") & (frame.seed >= 2) & (frame.step == 300), "val_loss"] = math.inf
    found = judge(frame)
    assert len(found.record["runs"]) == 8
    assert found.record["arms"][1]["diverged"] == 2


# -- which runs ----------------------------------------------------------------------------------------------


def test_a_chain_compares_each_arm_with_the_one_before():
    frame = row_a_run(["a", "b", "c", "d"])
    found = judge(frame, chain=("c", "a", "b"))
    assert [(x["arm"], x["reference"]) for x in found.record["differences"]] == [("a", "c"), ("b", "a")]
    assert {arm["arm"] for arm in found.record["arms"]} == {"a", "b", "c"}
    a, c = (frame.val_loss[frame.optimizer == arm].to_numpy() for arm in "ac")
    assert found.record["differences"][0]["p"] == pytest.approx(stats.ttest_rel(a, c).pvalue)


def test_copies_of_a_run_are_left_out_if_asked():
    copy = CURVES[(CURVES.optimizer == "adam") & (CURVES.seed == 0)].assign(seed=9)
    both = pd.concat([CURVES, copy])
    assert len(judge(both).record["runs"]) == 9
    found = judge(both, distinct=True)
    assert len(found.record["runs"]) == 8
    assert kinds(found)["copies"] == ["adam, seed 9"]
    assert len(judge(CURVES, distinct=True).record["runs"]) == 8
    seldom = judge(pd.concat([CURVES, copy[copy.step % 200 == 100]]), distinct=True)  # of fewer evaluations
    assert kinds(seldom)["copies"] == ["adam, seed 9"]
    other = judge(pd.concat([CURVES, copy.assign(optimizer="muon")]), distinct=True)  # of another arm
    assert len(other.record["runs"]) == 9
    rows = row_a_run()
    twice = judge(pd.concat([rows, rows[:1].assign(seed=9)]), distinct=True)  # without curves
    assert kinds(twice)["copies"] == ["adam, seed 9"]


def test_a_configuration_is_chosen_by_the_column_asked_for_and_judged_by_the_other():
    rng = np.random.default_rng(0)
    grid = pd.concat([row_a_run(number=i).assign(lr=lr) for i, lr in enumerate((0.1, 0.2, 0.3))])
    grid["val_loss"] += abs(grid.lr - 0.2)
    grid["late"] = 5 - grid.val_loss + 0.001 * rng.standard_normal(len(grid))  # would choose another one
    found = judge(grid, loss="late", choose="val_loss", better="lower")
    assert [arm["configuration"]["lr"] for arm in found.record["arms"]] == [0.2, 0.2]
    expected = grid[grid.lr == 0.2].groupby("optimizer").late.mean()
    assert {arm["arm"]: arm["mean"] for arm in found.record["arms"]} == pytest.approx(expected.to_dict())


def test_a_configuration_is_chosen_by_the_outcome_that_is_asked_for():
    fast, slow = row_a_step(number=1).assign(lr=0.2), row_a_step(number=2).assign(lr=0.1)
    slow["val_loss"] += 0.5 - slow.step / 500  # behind at step 0, ahead at the end
    grid = pd.concat([fast, slow])
    for at, lr in ((100, 0.2), (500, 0.1)):
        assert [arm["configuration"]["lr"] for arm in judge(grid, at=at).record["arms"]] == [lr, lr]


def test_a_search_before_the_finals_is_counted_as_tuning_and_its_finals_are_judged():
    search = [
        {
            "optimizer": arm,
            "stage": "search",
            "lr": lr,
            "seed": 0,
            "max_steps": 100,
            "val_loss": 3 + lr + i / 10,
        }
        for i, arm in enumerate(("adam", "muon"))
        for lr in (0.1, 0.2, 0.3)
    ]
    finals = [
        {
            "optimizer": arm,
            "stage": "final",
            "lr": 0.1,
            "seed": s,
            "max_steps": steps,
            "val_loss": 2 + i / 10 + s / 99,
        }
        for i, (arm, steps) in enumerate((("adam", 300), ("muon", 400)))
        for s in range(1, 5)
    ]
    both = judge(pd.DataFrame(search + finals), reference="adam")
    alone = judge(pd.DataFrame(search + finals), reference="adam", where="stage=final")
    assert [arm["runs"] for arm in both.record["arms"]] == [4, 4]
    assert both.record["differences"] == alone.record["differences"]
    kinds = {caution["kind"] for caution in both.record["cautions"]}
    assert {"lengths", "unequal_lengths"} <= kinds
    assert "unequal_tuning" not in kinds
    with pytest.raises(UserError, match=r"no row of .* has stage = finals: there are search or final"):
        judge(pd.DataFrame(search + finals), where="stage=finals")


def test_what_a_step_is_worth_is_of_the_judged_configuration_and_its_error_widens_the_comparison():
    rng = np.random.default_rng(5)
    rows = [
        {"optimizer": arm, "lr": lr, "seed": s, "planned": n, "step": t, "val_loss": 4 - n / 400 + lr + bump}
        for arm, lengths in (("adam", (300, 400)), ("muon", (310,)))
        for n in lengths
        for lr in (0.1, 0.9 if n == 300 else 0.5)
        for s in range(4 if arm == "adam" else 12)
        for bump in [rng.normal() * 0.01]
        for t in (0, n)
    ]
    found = judge(pd.DataFrame(rows), reference="adam").record["lengths"]
    rate = found["rates"]["adam"]
    assert rate["per_step"] == pytest.approx(1 / 400, rel=0.1)  # of lr 0.1 alone, not of 0.5 and 0.9
    [estimated] = found["differences"]
    given = judge(pd.DataFrame(rows), reference="adam", exchange=rate["per_step"]).record["lengths"]
    [exact] = given["differences"]
    assert estimated["mean"] == pytest.approx(exact["mean"])
    widths = [d["joint_high"] - d["joint_low"] for d in (estimated, exact)]
    assert widths[0] > 1.1 * widths[1]


def test_logs_of_a_single_evaluation_that_repeat_the_ends_of_others_are_copies_and_rounding_makes_none():
    rng = np.random.default_rng(3)
    whole = [
        {"arm": "muon", "run": i, "step": t, "val_loss": round(3 - t / 300 + bump, 5)}
        for i in range(8)
        for bump in [rng.normal() * 1e-3]
        for t in (100, 200, 300)
    ]
    ends = [{**row, "run": row["run"] + 8} for row in whole if row["step"] == 300]
    once = judge(pd.DataFrame(whole + ends), distinct=True)
    assert [arm["runs"] for arm in once.record["arms"]] == [8]
    # a pair of equal ends among as many others, rounded to four digits, is to be expected
    alone = [
        {"arm": "muon", "run": i, "step": 300, "val_loss": round(2 + rng.normal() * 1e-3, 4)}
        for i in range(16)
    ]
    alone[1]["val_loss"] = alone[0]["val_loss"]
    assert [arm["runs"] for arm in judge(pd.DataFrame(alone), distinct=True).record["arms"]] == [16]


def test_a_line_over_lengths_is_not_used_where_the_loss_bends_nor_beyond_them():
    rng = np.random.default_rng(8)

    def lengths_of(law, lion):
        rows = [
            {"optimizer": arm, "seed": s, "planned": n, "step": n, "val_loss": law(n) + rng.normal() * 1e-3}
            for arm, lengths in (("adam", (1000, 2000, 3000)), ("lion", (lion,)))
            for n in lengths
            for s in range(3)
        ]
        return judge(pd.DataFrame(rows), reference="adam").record["lengths"]

    bent = lengths_of(lambda n: 3 + 100 / n, 2500)
    assert bent["rates"]["adam"]["bends"] < 1e-6
    assert (bent["exchange"], bent["differences"], bent["by"]) == (
        None,
        [],
        "the loss bends over the lengths of every arm that has several",
    )
    straight = lengths_of(lambda n: 3 - n / 50_000, 2500)
    [difference] = straight["differences"]
    assert difference["verdict"] == "undecided"
    beyond = lengths_of(lambda n: 3 - n / 50_000, 4000)
    assert beyond["exchange"] is None
    assert "reach beyond" in beyond["by"]
