"""`judge` whole: its figures are scipy's, its answer follows from them, and nothing hangs on how rows lie."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from support.runs_of_others import row_a_run, row_a_step

from ebc_lab.config.errors import UserError
from ebc_lab.judging.judgement import judge

RUNS = row_a_run(seeds=6)
CURVES = row_a_step()
THREE = row_a_run(["sgd", "adam", "muon"], gap=0.005)


def of(frame, arm, column="val_loss"):
    return frame[column][frame.optimizer == arm].to_numpy()


def only_difference(frame, **asked):
    [found] = judge(frame, **asked).record["differences"]
    return found


def what_is_said(found):
    """Return a record without the places that it was read from, its runs in the order of their names."""
    record = {k: v for k, v in found.record.items() if k not in ("sources", "runs", "cautions")}
    runs = [{k: v for k, v in run.items() if k != "source"} for run in found.record["runs"]]
    cautions = {one["kind"]: sorted(one["runs"]) for one in found.record["cautions"]}
    return {**record, "runs": sorted(runs, key=lambda run: run["run"]), "cautions": cautions}


# -- figures -------------------------------------------------------------------------------------------------


def test_paired_figures_are_those_of_scipy():
    found = only_difference(RUNS)
    expected = stats.ttest_rel(of(RUNS, "muon"), of(RUNS, "adam"))
    interval = expected.confidence_interval(0.95)
    assert found["p"] == pytest.approx(expected.pvalue)
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high))
    assert (found["joint_low"], found["joint_high"]) == pytest.approx((interval.low, interval.high))
    assert found["mean"] == pytest.approx((of(RUNS, "muon") - of(RUNS, "adam")).mean())


def test_unpaired_figures_are_those_of_scipy():
    uneven = RUNS[(RUNS.optimizer == "adam") | (RUNS.seed < 4)]
    for found in (only_difference(uneven), only_difference(uneven, paired=False)):
        expected = stats.ttest_ind(of(uneven, "muon"), of(uneven, "adam"), equal_var=False)
        interval = expected.confidence_interval(0.95)
        assert found["method"] == "welch"
        assert found["p"] == pytest.approx(expected.pvalue)
        assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high))


def test_an_arm_has_the_figures_of_its_runs():
    [arm] = [arm for arm in judge(RUNS).record["arms"] if arm["arm"] == "adam"]
    losses = of(RUNS, "adam")
    low, high = stats.t.interval(0.95, 5, losses.mean(), stats.sem(losses))
    assert (arm["mean"], arm["sd"]) == pytest.approx((losses.mean(), losses.std(ddof=1)))
    assert (arm["low"], arm["high"]) == pytest.approx((low, high))
    assert (arm["lowest"], arm["highest"], arm["runs"]) == (losses.min(), losses.max(), 6)


def test_the_joint_interval_of_several_comparisons_is_wider_and_holds_for_all():
    found = judge(THREE, reference="adam").record["differences"]
    for one in found:
        difference = of(THREE, one["arm"]) - of(THREE, "adam")
        half = stats.t.ppf(1 - 0.025 / 2, 4) * stats.sem(difference)  # Bonferroni's
        assert one["joint_high"] == pytest.approx(difference.mean() + half)
        assert one["joint_low"] < one["low"] < one["high"] < one["joint_high"]
        assert one["comparisons"] == 2


@pytest.mark.parametrize("by", [{}, {"paired": False}, {"pairs": True}])
def test_higher_is_better_mirrors_lower(by):
    lost = [0, 7]
    for frame in (THREE, RUNS.assign(val_loss=RUNS.val_loss.where(~RUNS.index.isin(lost), np.inf))):
        lower = judge(frame, **by).record
        higher = judge(frame.assign(val_loss=-frame.val_loss), better="higher", **by).record
        assert [arm["arm"] for arm in lower["arms"]] == [arm["arm"] for arm in higher["arms"]]
        signs = [("mean", "mean"), ("median", "median"), ("low", "high"), ("joint_low", "joint_high")]
        signs += [("lowest", "highest"), ("median_low", "median_high")]
        for one, other in zip(
            [*lower["arms"], *lower["differences"]], [*higher["arms"], *higher["differences"]], strict=True
        ):
            for a, b in (*signs, *(pair[::-1] for pair in signs)):
                if a in one:
                    assert one[a] == (None if other[b] is None else pytest.approx(-other[b])), (a, one, other)
            for same in ("sd", "p", "verdict", "seeds_needed", "detectable", "arm", "runs", "diverged"):
                if same in one:
                    assert one[same] == pytest.approx(other[same])


# -- verdicts ------------------------------------------------------------------------------------------------


def test_the_verdict_follows_from_the_joint_interval_and_the_margin():
    assert "muon is worse than adam" in judge(RUNS).answer
    assert "muon is better than adam" in judge(RUNS.assign(val_loss=-RUNS.val_loss)).answer
    near = row_a_run(gap=0.0)
    undecided = judge(near)
    assert only_difference(near)["verdict"] == "undecided"
    assert "it is undecided whether" in undecided.answer
    level = judge(near, margin=0.1)
    assert level.record["differences"][0]["verdict"] == "level"
    assert "muon is level with adam, within 0.1" in level.answer


def test_the_runs_that_would_decide_are_about_as_many_as_it_says():
    frame = row_a_run(gap=0.008)
    found = only_difference(frame, paired=False)
    assert found["verdict"] == "undecided"
    text = f"About {found['seeds_needed']} fresh runs an arm would decide it"
    assert text in judge(frame, paired=False).answer
    sd = np.sqrt(np.mean([of(frame, arm).var(ddof=1) for arm in ("adam", "muon")]))
    rng = np.random.default_rng(0)
    decided = 0
    for _ in range(400):
        a, b = sd * rng.standard_normal((2, found["seeds_needed"]))
        decided += stats.ttest_ind(a, b + found["mean"], equal_var=False).pvalue < 0.05
    assert 0.7 < decided / 400 < 0.9


def test_one_run_an_arm_has_no_interval_unless_a_sigma_is_given():
    ones = row_a_run(seeds=1)
    found = judge(ones)
    assert found.record["differences"][0]["verdict"] == "undecided"
    assert "one run" in found.answer
    assert found.record["differences"][0]["low"] is None
    assert found.record["arms"][0]["sd"] is None
    given = only_difference(ones, sigma=0.01)
    half = stats.norm.ppf(0.975) * 0.01 * math.sqrt(2)
    assert (given["low"], given["high"]) == pytest.approx((given["mean"] - half, given["mean"] + half))
    assert only_difference(ones, sigma="0.01") == given


def test_a_pooled_sigma_comes_from_the_arms_that_have_several_runs():
    frame = pd.concat([row_a_run(["adam"], 6), row_a_run(["sgd"], 3, number=1), row_a_run(["muon"], 1)])
    found = judge(frame, reference="adam", sigma="pooled").record["differences"]
    [of_muon] = [one for one in found if one["arm"] == "muon"]
    squares = sum((n - 1) * of(frame, arm).var(ddof=1) for arm, n in (("adam", 6), ("sgd", 3)))
    sigma = math.sqrt(squares / 7)
    assert of_muon["method"] == "sigma"
    low, high = of_muon["low"], of_muon["high"]
    own = of(frame, "adam").var(ddof=1) / 6 + sigma**2
    pooled = sigma**2 * (1 + 1 / 6)
    halves = [stats.t.ppf(0.975, 7) * math.sqrt(variance) for variance in (own, pooled)]
    assert min(halves) * 0.8 < (high - low) / 2 < max(halves) * 1.25
    with pytest.raises(UserError, match="--sigma pooled needs an arm with two finished runs"):
        judge(row_a_run(seeds=1), sigma="pooled")


def test_a_diverged_run_ranks_behind_and_takes_the_mean_away():
    frame = row_a_run(seeds=8)
    frame.loc[frame.index == 9, "val_loss"] = np.nan
    for paired in (None, False):
        found = judge(frame, paired=paired)
        muon = found.record["arms"][1]
        assert (muon["arm"], muon["runs"], muon["completed"], muon["mean"]) == ("muon", 8, 7, None)
        assert found.record["differences"][0]["verdict"] == "worse"
        assert any("diverged" in sentence for sentence in found.problems)
    rank_sum = only_difference(frame, paired=False)
    ranked = [np.nan_to_num(of(frame, arm), nan=np.inf) for arm in ("muon", "adam")]
    assert rank_sum["p"] == pytest.approx(stats.mannwhitneyu(*ranked, method="exact").pvalue)


def test_runs_that_all_diverged_have_no_better_arm():
    for frame in (RUNS.assign(val_loss=np.nan), CURVES.assign(val_loss=np.inf), RUNS.assign(val_loss=np.inf)):
        found = judge(frame)
        assert "no run of any arm has a finite outcome" in found.answer
        assert found.record["differences"][0]["verdict"] not in ("better", "worse")
    assert "no run of any arm reached the target" in judge(CURVES, outcome="target", target=1.0).answer
    assert "no run of adam" in judge(RUNS[RUNS.optimizer == "adam"].assign(val_loss=np.nan)).answer


def test_one_arm_has_nothing_to_be_compared_with():
    found = judge(RUNS[RUNS.optimizer == "adam"])
    assert found.record["differences"] == []
    assert "the only arm" in found.answer
    assert found.differences().empty
    assert found.verdict.empty
    assert found.record["pairing"] == "There is one arm, so nothing is paired."


def test_many_arms_are_all_compared():
    found = judge(row_a_run(["baseline", *(f"a{i}x" for i in range(29))], 3))
    assert len(found.record["differences"]) == 29
    assert "joint over 29 comparisons" in found.answer
    pairs = judge(row_a_run([f"a{i}x" for i in range(12)], 3))
    assert len(pairs.record["differences"]) == 66
    assert "of the 11 other arms" in pairs.answer


# -- the reference and pairs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arms", "asked", "reference"),
    [
        (["muon", "adam"], {}, "adam"),
        (["zeta", "eta"], {}, "eta"),
        (["a", "b", "Baseline"], {}, "Baseline"),
        (["a", "control"], {}, "control"),
        (["a", "adam", "c"], {}, ""),
        (["a", "b", "c"], {"reference": "b"}, "b"),
        (["a", "b"], {"pairs": True}, "a"),
    ],
)
def test_the_reference_is_asked_for_or_called_so_and_told(arms, asked, reference):
    found = judge(row_a_run(arms), **asked).record
    assert found["reference"] == reference
    told = [one["sentence"] for one in found["taken"] if one["role"] == "reference"]
    assert told == [] if not reference else reference in told[0]
    n = len(arms)
    assert len(found["differences"]) == (n - 1 if reference else n * (n - 1) / 2)


def test_an_arm_that_is_not_there_is_no_reference():
    with pytest.raises(
        UserError, match=r"there is no arm Adam \(did you mean adam\?\): there are adam or muon"
    ):
        judge(RUNS, reference="Adam")


@pytest.mark.parametrize(
    ("frame", "asked", "paired", "why"),
    [
        (RUNS, {}, True, "same 6 seeds"),
        (RUNS, {"paired": False}, False, "as asked"),
        (RUNS.drop(columns="seed"), {}, False, "No column gives every run a seed"),
        (RUNS[RUNS.index != 0], {}, False, "do not have the same seeds"),
        (RUNS[RUNS.index != 0], {"paired": True}, True, "as asked"),
        (RUNS[RUNS.seed == 0], {}, False, "Each arm has one run"),
        (RUNS.assign(seed=0), {}, False, "two runs of one seed"),
    ],
)
def test_runs_are_paired_where_arms_have_the_same_seeds(frame, asked, paired, why):
    record = judge(frame, **asked).record
    assert record["paired"] is paired
    assert why in record["pairing"]


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (RUNS.drop(columns="seed"), "--paired needs a seed for each run: say with --seed"),
        (RUNS.assign(seed=0), "--paired needs one run for each arm and seed"),
    ],
)
def test_pairs_that_cannot_be_made_are_refused(frame, words):
    with pytest.raises(UserError, match=words):
        judge(frame, paired=True)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"sigma": "x"}, "--sigma is pooled or a number above 0, not x"),
        ({"sigma": -1}, "--sigma is pooled or a number above 0"),
        ({"margin": -0.1}, "--margin is a difference of at least 0"),
        ({"margin": math.nan}, "--margin is a difference of at least 0"),
        ({"better": "smaller"}, "--better is lower or higher, not smaller"),
        ({"rule": "track4"}, "--rule is track3, not track4"),
        ({"pairs": True, "reference": "adam"}, "give one of --reference, --pairs and --chain"),
    ],
)
def test_options_that_cannot_be_are_refused(asked, words):
    with pytest.raises(UserError, match=words):
        judge(RUNS, **asked)


# -- how rows lie --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frame",
    [RUNS, CURVES, THREE, RUNS.drop(columns="seed").assign(run=[f"r{i}" for i in range(12)])],
    ids=["runs", "curves", "three arms", "unpaired"],
)
def test_the_order_of_rows_columns_and_categories_changes_nothing(frame):
    expected = what_is_said(judge(frame))
    shuffled = frame.sample(frac=1, random_state=3)
    upside_down = frame.iloc[::-1]
    columns = frame[frame.columns[::-1]]
    arms = sorted(set(frame.optimizer), reverse=True)
    categories = frame.assign(optimizer=pd.Categorical(frame.optimizer, [*arms, "unused"]))
    for other in (shuffled, upside_down, columns, categories):
        assert what_is_said(judge(other)) == expected


def test_a_csv_of_the_frame_gives_the_same_judgement(tmp_path):
    grid = pd.concat([row_a_run(number=i).assign(lr=lr) for i, lr in enumerate((0.1, 0.2))])
    lost = CURVES.assign(val_loss=CURVES.val_loss.where((CURVES.seed != 2) | (CURVES.step < 300), np.inf))
    for number, frame in enumerate((RUNS, CURVES, grid, lost)):
        file = tmp_path / f"{number}.csv"
        frame.to_csv(file, index=False)
        assert what_is_said(judge(file)) == what_is_said(judge(frame))
        assert what_is_said(judge([str(file)])) == what_is_said(judge(frame))


# -- what a caller gets --------------------------------------------------------------------------------------


def test_the_record_is_strict_json():
    grid = pd.concat([CURVES.assign(lr=lr, started=pd.Timestamp("2026-01-01")) for lr in (0.1, 0.2)])
    grid.loc[grid.index == 5, "val_loss"] = np.inf
    for found in (judge(grid, target=3.3), judge(row_a_run(seeds=1)), judge(RUNS.assign(lr=pd.Timestamp(0)))):
        assert json.loads(json.dumps(found.record, allow_nan=False)) == found.record


def test_tables_are_those_of_the_record():
    found = judge(CURVES)
    assert list(found.arms()["arm"]) == ["adam", "muon"]
    assert len(found.runs()) == 8
    assert found.differences().iloc[0]["p"] == found.record["differences"][0]["p"]
    assert found.verdict.iloc[0][["name", "question", "verdict"]].tolist() == [
        "muon",
        "Is muon better than adam?",
        "worse",
    ]
    mine = found.evals("adam", 2)
    expected = CURVES[(CURVES.optimizer == "adam") & (CURVES.seed == 2)]
    assert list(mine.columns) == ["run", "arm", "seed", "step", "val_loss"]
    assert mine.val_loss.tolist() == expected.val_loss.tolist()
    assert len(found.evals()) == len(CURVES)
    with pytest.raises(UserError, match="no run has arm sgd"):
        found.evals("sgd")
    copy = found.runs()
    copy["arm"] = "x"
    assert set(found.runs()["arm"]) == {"adam", "muon"}


def test_it_shows_in_a_notebook_without_markup_from_names():
    found = judge(row_a_run(["<b>x", "adam"]))
    assert "&lt;b&gt;x" in found._repr_html_()
    assert "<b>x" not in found._repr_html_()
    assert found.answer.split("\n")[0] in repr(found)


def test_it_is_called_from_the_package():
    import ebc_lab

    assert (
        ebc_lab.judge(RUNS, arm="optimizer", loss="val_loss", reference="adam").answer == judge(RUNS).answer
    )


def test_of_arms_with_equal_means_none_is_called_the_best():
    frame = row_a_run(["adam", "muon", "sgd"], seeds=1).assign(val_loss=[2.0, 2.0, 3.0])
    assert "adam and muon have the same mean, 2, the best of 3 arms;" in judge(frame).answer
    assert "adam and muon have the same mean, 2;" in judge(frame[:2]).answer
    assert "adam is the best of 2 arms;" in judge(frame[1:].assign(optimizer=["adam", "sgd"])).answer


def test_arms_of_which_every_run_diverged_are_not_compared():
    frame = row_a_run(["adam", "muon", "sgd"], seeds=4)
    lost = frame.assign(val_loss=frame.val_loss.where(frame.optimizer == "adam", np.inf))
    found = {one["arm"]: one for one in judge(lost, reference="muon").record["differences"]}
    assert (found["adam"]["verdict"], found["sgd"]["verdict"]) == ("undecided", "undecided")
    assert "no run of either arm" in found["sgd"]["note"]
    assert "joint over 1 comparison." in judge(lost, reference="muon").answer
