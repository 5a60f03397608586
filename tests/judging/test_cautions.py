"""What warns about runs that somebody else made: each kind fires where it should, and is silent on like runs
without the fault."""

import numpy as np
import pandas as pd
import pytest

from ebc_lab.judging.asked import Asked
from ebc_lab.judging.cautions import cautions
from ebc_lab.judging.outcomes import only
from ebc_lab.judging.runs import Runs
from ebc_lab.judging.tuning import configurations_of, tuning_of

STEPS = np.arange(100.0, 3001.0, 100.0)


def curve(number, length=30, noise=0.002):
    """Return a falling curve with independent noise: a row each hundred steps."""
    rng = np.random.default_rng(number)
    return 3.0 + 2.0 * np.exp(-np.arange(length) / 6) + noise * rng.standard_normal(length)


def runs(per_arm=None, *, curves=True, loss="val_loss", better="lower", settings=(), **columns):
    """Return runs, by default four of `adam` and four of `muon`; `columns` replace those of their table."""
    arms = [arm for arm, n in (per_arm or {"adam": 4, "muon": 4}).items() for _ in range(n)]
    made = columns.pop("losses", None) or [curve(i) for i in range(len(arms))]
    steps = columns.pop("steps", None) or [STEPS[: len(x)] for x in made]
    table = pd.DataFrame(
        {"arm": arms, "planned": np.nan, "started": pd.NaT, "seed": None, "source": "runs.csv"}
    )
    table["run"] = [f"{arm}-{i}" for i, arm in enumerate(arms)]
    table["length"] = [x[-1] for x in steps] if curves else np.nan
    table["rows"] = [len(x) if curves else 0 for x in made]
    table["outcome"] = [x[-1] for x in made]
    for name, values in columns.items():
        table[name] = values
    if "chosen_by" not in columns:
        table["chosen_by"] = table["outcome"]
    rows = pd.DataFrame({"run": np.empty(0, int), "step": np.empty(0), "loss": np.empty(0)})
    if curves:
        numbers = np.repeat(np.arange(len(made)), [len(x) for x in made])
        rows = pd.DataFrame({"run": numbers, "step": np.concatenate(steps), "loss": np.concatenate(made)})
    return Runs(table, rows, tuple(settings), loss, better, "step" if curves else "")


def warned(of, asked=None, kept=None):
    """Return kind -> caution. `kept`: a flag a run, of those that are compared; default all."""
    tried = configurations_of(of.table, of.settings)
    tuned = tuning_of(tried, chosen_by=(asked or Asked()).choose or of.loss, reported=of.loss)
    judged = of if kept is None else only(of, kept)
    found = cautions(of, judged, asked or Asked(), tuned)
    assert all(one["sentence"].endswith(".") and set(one["runs"]) <= set(of.table["run"]) for one in found)
    assert len({one["kind"] for one in found}) == len(found)
    return {one["kind"]: one for one in found}


def test_clean_runs_are_not_warned_about():
    assert warned(runs()) == {}
    assert warned(runs(curves=False)) == {}
    assert warned(runs(seed=list("01230123"), settings=("lr",), lr=[0.1] * 4 + [0.2] * 4)) == {}


def test_arms_of_one_and_of_two_runs_are_counted_among_those_that_are_compared():
    found = warned(runs({"adam": 4, "muon": 2, "sgd": 1}))
    assert found["one_run"]["runs"] == ["sgd-6"]
    assert found["few_runs"]["runs"] == ["muon-4", "muon-5"]
    kept = [True, False, False, False] + [True] * 4
    assert warned(runs(), kept=kept)["one_run"]["runs"] == ["adam-0"]


def test_a_loss_that_chooses_its_own_configuration_and_unequal_budgets():
    lr = [0.1, 0.2, 0.3, 0.4, 0.1, 0.1, 0.2, 0.2]
    found = warned(runs(settings=("lr",), lr=lr))
    assert "adam 4 and muon 2" in found["chosen_by_reported"]["sentence"]
    assert "muon 2 and adam 4" in found["unequal_tuning"]["sentence"]
    other = runs(settings=("lr",), lr=lr, chosen_by=np.arange(8.0))
    assert "chosen_by_reported" not in warned(other, Asked(choose="val_loss"))
    assert "unequal_tuning" not in warned(runs(settings=("lr",), lr=[0.1, 0.1, 0.2, 0.2] * 2))


def test_the_bias_of_the_best_over_steps_is_that_of_the_lowest_of_noisy_values():
    rng = np.random.default_rng(0)
    flat = [3.0 + 0.01 * rng.standard_normal(400) for _ in range(100)]
    steps = [np.arange(400.0)] * 100
    of = runs({"adam": 50, "muon": 50}, losses=flat, steps=steps)
    sentence = warned(of, Asked(outcome="best"))["best_over_steps"]["sentence"]
    named = float(sentence.split("here by ")[1].split()[0])
    assert named == pytest.approx(3.0 - np.min(flat, axis=1).mean(), rel=0.1)
    bowl = [np.abs(np.arange(-15.0, 15.0)) ** 2 / 100 + i for i in range(8)]  # without noise: no bias
    sentence = warned(runs(losses=bowl), Asked(outcome="best"))["best_over_steps"]["sentence"]
    assert "here by" not in sentence
    assert "best_over_steps" in warned(runs(loss="best_val_loss"))
    assert "best_over_steps" not in warned(runs(loss="val_loss"))


def test_unequal_lengths_are_told_between_arms_and_within_one():
    between = [curve(i, 30 if i < 4 else 20) for i in range(8)]
    assert "2000 steps (muon) and 3000 (adam)" in warned(runs(losses=between))["unequal_lengths"]["sentence"]
    # a longer run's value at the other's last step has not had the end of its schedule
    assert "unequal_lengths" in warned(runs(losses=between), Asked(at={"": 2000.0}))
    within = [curve(i, 30 - (i == 0)) for i in range(8)]
    assert "adam 2900 to 3000" in warned(runs(losses=within))["unequal_lengths"]["sentence"]


def test_runs_that_end_before_they_were_to_are_named_unless_a_last_row_is_merely_missing():
    losses = [curve(i, 25 if i == 5 else 30) for i in range(8)]
    found = warned(runs(losses=losses, planned=3000.0))["ended_early"]
    assert found["runs"] == ["muon-5"]
    assert "(muon 1)" in found["sentence"]
    assert "ended_early" not in warned(runs(planned=3050.0))
    every = [curve(i, 30 if i < 4 else 25) for i in range(8)]
    assert "All runs of muon ended" in warned(runs(losses=every, planned=3000.0))["ended_early"]["sentence"]


def test_unequal_cadence_counts_where_a_best_value_or_a_first_step_is_looked_for():
    steps = [np.linspace(100, 3000, 30 if i < 4 else 60) for i in range(8)]
    of = runs(losses=[curve(i, len(x)) for i, x in enumerate(steps)], steps=steps)
    assert "unequal_cadence" not in warned(of)
    assert "unequal_cadence" in warned(of, Asked(outcome="best"))
    assert "unequal_cadence" in warned(of, Asked(target=3.1))
    assert "unequal_cadence" not in warned(runs(), Asked(target=3.1))


def test_identical_curves_are_named_and_a_shared_first_or_last_value_is_not_enough():
    losses = [curve(i) for i in range(8)]
    losses[6] = losses[1].copy()
    assert warned(runs(losses=losses))["identical"]["runs"] == ["adam-1", "muon-6"]
    losses[6] = np.r_[losses[1][:1], curve(6)[1:-1], losses[1][-1:]]
    assert "identical" not in warned(runs(losses=losses))


def test_identical_outcomes_are_a_copy_only_where_rounding_does_not_explain_them():
    outcome = [3.27819, 3.28012, 3.27653, 3.27901, 3.29021, 3.28811, 3.29102, 3.28955]
    full = [x + 1e-9 * i for i, x in enumerate(outcome)]
    full[3] = full[1]
    assert warned(runs(curves=False, outcome=full))["identical"]["runs"] == ["adam-1", "adam-3"]
    rounded = [3.278, 3.280, 3.277, 3.280, 3.290, 3.288, 3.291, 3.290]
    assert "identical" not in warned(runs(curves=False, outcome=rounded))
    far = rounded[:4] + [x + 900 for x in rounded[4:]]  # the spread that counts is that within an arm
    assert "identical" not in warned(runs(curves=False, outcome=far))
    single = dict.fromkeys("abcdefgh", 1)  # where it is unknown, that of all
    assert "identical" not in warned(runs(single, curves=False, outcome=rounded))
    alike = [x + 9 * i for i, x in enumerate(full[:-1])] + [full[0]]
    assert "identical" in warned(runs(single, curves=False, outcome=alike))


def test_a_seed_that_occurs_twice_in_an_arm_and_configuration():
    found = warned(runs(seed=list("01120123")))["seed_twice"]
    assert found["runs"] == ["adam-1", "adam-2"]
    other = runs(seed=list("01120123"), settings=("lr",), lr=[1, 1, 2, 1, 1, 1, 1, 1])
    assert "seed_twice" not in warned(other)
    lengths = [1e3, 1e3, 2e3, 1e3] * 2  # one seed at two lengths
    assert "seed_twice" not in warned(runs(seed=list("01120112"), planned=lengths))


def test_seeds_that_count_through_all_runs_are_no_seeds_that_pair():
    assert "seed_is_an_index" in warned(runs(seed=list("01234567")))
    assert "seed_is_an_index" not in warned(runs(seed=list("01230123")))
    assert "seed_is_an_index" not in warned(runs(seed=["17", "4", "23", "5", "99", "31", "2", "8"]))


def test_arms_that_differ_in_more_than_their_name():
    columns = {
        "batch_size": [32] * 4 + [64] * 4,
        "lr": [0.1] * 4 + [0.2] * 4,
        "optimizer_name": list("aaaabbbb"),
    }
    found = warned(runs(settings=tuple(columns), **columns))["confounded"]
    assert "batch_size: adam 32 and muon 64" in found["sentence"]
    assert "lr" not in found["sentence"].split("(")[1].split(")")[0]
    own = runs(settings=("ns_steps", "batch_size"), ns_steps=[None] * 4 + [5] * 4, batch_size=[32, 64] * 4)
    assert "confounded" not in warned(own)


def smooth(values, weight):
    """Return a running mean as W&B draws it, freed of its start."""
    mean, out = 0.0, []
    for n, x in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * x
        out.append(mean / (1 - weight**n))
    return np.array(out)


def noisy(number, weight, own, size):
    """Return a curve with noise of this size: independent, and `own` times it a walk of the run's own."""
    rng = np.random.default_rng(number)
    noise = rng.standard_normal(60) + own * np.cumsum(rng.standard_normal(60))
    raw = 3 + 2 * np.exp(-np.arange(60) / 12) + size * noise
    return smooth(raw, weight) if weight else raw


@pytest.mark.parametrize(("own", "size"), [(0.5, 0.0002), (3.0, 0.002)])
def test_smoothed_curves_are_told_from_curves_as_they_were_logged(own, size):
    steps, arms = [100 * np.arange(1.0, 61)] * 16, {"adam": 8, "muon": 8}
    logged = runs(arms, losses=[noisy(i, 0.0, own, size) for i in range(16)], steps=steps)
    assert "smoothed" not in warned(logged)
    shown = runs(arms, losses=[noisy(i, 0.9, own, size) for i in range(16)], steps=steps)
    assert len(warned(shown)["smoothed"]["runs"]) == 16


@pytest.mark.parametrize("own", [0.0, 0.5, 1.0, 100.0])
@pytest.mark.parametrize("size", [1e-7, 0.0001, 0.002])
def test_noise_that_walks_and_runs_that_are_no_replicates_are_not_called_smoothed(own, size):
    steps, arms = [100 * np.arange(1.0, 61)] * 16, {"adam": 8, "muon": 8}
    for first in range(0, 160, 16):
        losses = [noisy(first + i, 0.0, own, size) for i in range(16)]
        assert "smoothed" not in warned(runs(arms, losses=losses, steps=steps)), first
    rng = np.random.default_rng(0)
    sweep = [x + 0.1 * rng.random() * np.arange(60) / 60 for x in losses]
    assert own == 100.0 or size < 1e-5 or "smoothed" not in warned(runs(arms, losses=sweep, steps=steps))


def test_a_training_loss_is_named_and_a_validation_loss_is_not():
    for loss in ("train_loss", "training/loss", "loss", "trainLoss"):
        assert "training_loss" in warned(runs(loss=loss)), loss
    for loss in ("val_loss", "eval/loss", "perplexity", "validLoss", "train_run/val_loss"):
        assert "training_loss" not in warned(runs(loss=loss)), loss


def test_a_loss_that_is_an_accuracy():
    rising = [0.9 - curve(i) / 10 for i in range(8)]
    assert "accuracy" in warned(runs(losses=rising))
    assert "accuracy" not in warned(runs(losses=rising, better="higher"))
    for loss in ("eval/top1_acc", "val_accuracy", "F1"):
        assert "accuracy" in warned(runs(loss=loss)), loss
    assert "accuracy" not in warned(runs(loss="acceptance_loss"))


def test_shares_and_percentages_are_not_mixed_unseen():
    outcome = [0.931, 0.928, 0.934, 0.929, 93.2, 93.5, 92.9, 93.1]
    found = warned(runs(curves=False, loss="accuracy", better="higher", outcome=outcome))
    assert "mixed_units" in found
    alike = [x if x < 1 else x / 100 for x in outcome]
    assert "mixed_units" not in warned(runs(curves=False, loss="accuracy", better="higher", outcome=alike))


def hours(*values):
    return pd.Timestamp("2026-03-01", tz="UTC") + pd.to_timedelta(list(values), unit="h")


def test_seeds_that_were_added_after_the_other_arm_was_over():
    found = warned(runs(started=hours(0, 1, 30, 31, 2, 3, 4, 5)))["seeds_added"]
    assert found["runs"] == ["adam-2", "adam-3"]
    assert "2026-03-02 06:00" in found["sentence"]
    assert warned(runs(started=hours(0, 3, 30, 31, 1, 2, 4, 5)))["seeds_added"]["runs"] == [
        "adam-2",
        "adam-3",
    ]
    for planned in (
        (0, 1, 2, 3, 4, 5, 60, 61),
        (0, 1, 2, 3, 4, 5, 6, 7),
        (0, 2, 4, 6, 1, 3, 5, 7),
        (0, 1, 6, 7, 2, 3, 4, 5),
        (0,) * 8,
    ):
        assert "seeds_added" not in warned(runs(started=hours(*planned))), planned


def test_an_arm_that_scatters_far_more_widely_than_another():
    rng = np.random.default_rng(1)
    outcome = np.r_[3 + 0.001 * rng.standard_normal(6), 3 + 0.03 * rng.standard_normal(6)]
    found = warned(runs({"adam": 6, "muon": 6}, outcome=outcome))["unequal_spread"]
    assert found["runs"][0].startswith("muon")
    alike = np.r_[outcome[:6], 3 + 0.001 * rng.standard_normal(6)]
    assert "unequal_spread" not in warned(runs({"adam": 6, "muon": 6}, outcome=alike))
    twice = np.r_[3 + 0.001 * rng.standard_normal(60), 3 + 0.003 * rng.standard_normal(60)]
    assert "unequal_spread" not in warned(runs({"adam": 60, "muon": 60}, outcome=twice))
    assert "unequal_spread" not in warned(runs({"adam": 2, "muon": 2}, outcome=outcome[4:8]))


@pytest.mark.parametrize("better", ["lower", "higher"])
def test_diverged_runs_are_counted_with_the_step_at_which_their_curve_ends(better):
    worst = np.inf if better == "lower" else -np.inf
    losses = [curve(i) for i in range(8)]
    losses[2][20:] = worst
    losses[7][25:] = worst
    found = warned(runs(losses=losses, better=better))["diverged"]
    assert found["runs"] == ["adam-2", "muon-7"]
    assert "adam 1 and muon 1" in found["sentence"]
    assert "the earliest from step 2100 on" in found["sentence"]
    losses[2][20:], losses[7][25:] = 3.0, 3.1
    losses[3][4] = worst  # a spike that it came back from
    assert "diverged" not in warned(runs(losses=losses, better=better))


def test_a_column_that_does_not_vary():
    assert "constant" in warned(runs(curves=False, outcome=3.0))
    assert "identical" not in warned(runs(curves=False, outcome=3.0))
    assert "constant" not in warned(runs(curves=False, outcome=[np.inf] * 8))


@pytest.mark.thorough
def test_two_million_rows_cost_less_than_reading_them():
    import time

    rng = np.random.default_rng(0)
    losses = [3 + rng.standard_normal(5000) for _ in range(400)]
    of = runs(
        {f"arm{i}": 20 for i in range(20)}, losses=losses, steps=[np.arange(5000.0)] * 400, planned=4999.0
    )
    tuned = tuning_of(configurations_of(of.table, ()), chosen_by="val_loss", reported="val_loss")
    begin = time.process_time()
    cautions(of, of, Asked(outcome="best"), tuned)
    assert time.process_time() - begin < 1.0  # 0.3 s where nothing else runs


def test_noise_alone_is_seldom_taken_for_a_rise_or_for_unequal_spreads():
    rng = np.random.default_rng(81)
    level = [[3 + 0.01 * rng.standard_normal(30) for _ in range(6)] for _ in range(60)]
    seen = [warned(runs({"adam": 3, "muon": 3}, losses=losses)) for losses in level]
    assert sum("rising" in found for found in seen) <= 5  # of 60, at 1% an arm
    arms = {f"arm {i}": 3 for i in range(31)}
    alike = [list(3 + 0.01 * rng.standard_normal((93, 1))) for _ in range(60)]
    seen = [warned(runs(arms, losses=losses, curves=False)) for losses in alike]
    assert sum("unequal_spread" in found for found in seen) <= 3


def test_short_curves_of_unequal_slopes_are_not_called_smoothed():
    rng = np.random.default_rng(81)
    slopes = [0.4, 0.41, 0.402, 0.4, 0.41, 0.401]
    for _ in range(20):
        losses = [5 - slope * np.arange(11) + 0.001 * rng.standard_normal(11) for slope in slopes]
        assert "smoothed" not in warned(runs({"adam": 3, "muon": 3}, losses=losses, steps=[STEPS[:11]] * 6))
