"""What an arm's configurations show of its tuning: against brute force, by simulation, by hand."""

import itertools
import json
import math
import statistics

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ebc_lab.judging.tuning import (
    Configuration,
    budgets,
    configurations_of,
    expected_best,
    luck_of,
    tuning_of,
)
from ebc_lab.study.stages.statistics import NO_LUCK, Luck, luck_of_choice, window

INF = math.inf


def tried(*losses, setting="lr", values=None):
    """Return one configuration for each value of a setting; `losses`: of its seeds, which choose and are
    reported, or pairs of both."""
    values = values or [2.0**i for i in range(len(losses))]
    return [
        Configuration(
            {setting: value}, {str(i): x if isinstance(x, tuple) else (x, x) for i, x in enumerate(of_one)}
        )
        for value, of_one in zip(values, losses, strict=True)
    ]


def of_one_arm(*losses, **options):
    return tuning_of({"arm": tried(*losses)}, **options)["arms"]["arm"]


@pytest.mark.parametrize("ties", [False, True])
def test_the_expected_best_is_the_mean_over_all_draws(ties):
    random = np.random.default_rng(0)
    choosing = random.integers(0, 3, 6) / 2 if ties else random.normal(3, 1, 6)
    outcomes = random.normal(3, 1, 6)

    def best(draw):  # among equal ones, chance decides
        lowest = min(choosing[i] for i in draw)
        return statistics.fmean(outcomes[i] for i in draw if choosing[i] == lowest)

    for found in expected_best(choosing, outcomes, range(1, 7)):
        without = [best(draw) for draw in itertools.combinations(range(6), found["k"])]
        assert found["expected"] == pytest.approx(statistics.fmean(without))
        assert found["low"] is found["high"] is None  # another loss is reported


def test_the_median_is_that_of_all_draws():
    losses = [3.0, 1.0, INF, 2.0, 5.0, 4.0, INF]
    for found in expected_best(losses, losses, range(1, 8)):
        draws = [min(draw) for draw in itertools.combinations(losses, found["k"])]
        assert found["median"] == statistics.median_low(draws)


def test_the_expected_best_is_unbiased():
    random = np.random.default_rng(1)
    k, true = 4, statistics.fmean(random.exponential(size=(100_000, 4)).min(axis=1))
    seen = [expected_best(x, x, [k])[0] for x in random.exponential(size=(2000, 5))]
    assert true == pytest.approx(1 / k, abs=0.005)
    error = stats.sem([x["expected"] for x in seen])
    assert statistics.fmean(x["expected"] for x in seen) == pytest.approx(true, abs=3 * error)


@pytest.mark.parametrize(("n", "k"), [(10, 1), (20, 3), (40, 10)])
def test_the_interval_of_the_median_best_covers_it(n, k):
    true = stats.norm.ppf(1 - 0.5 ** (1 / k))
    random = np.random.default_rng(2)
    found = [expected_best(x, x, [k])[0] for x in random.normal(size=(600, n))]
    inside = [
        (x["low"] is None or x["low"] <= true) and (x["high"] is None or true <= x["high"]) for x in found
    ]
    assert statistics.fmean(inside) >= 0.95 - 2 * math.sqrt(0.05 * 0.95 / 600)
    one = random.normal(size=n)
    reference = stats.quantile_test(one, q=0, p=1 - 0.5 ** (1 / k)).confidence_interval(0.95)
    got = expected_best(one, one, [k])[0]
    ends = [None if math.isnan(x) else x for x in reference]
    assert [got["low"], got["high"]] == pytest.approx(ends)


def test_a_diverged_configuration_makes_the_expectation_infinite_and_leaves_the_median():
    losses = [1.0, 2.0, INF]
    one, two, three = expected_best(losses, losses, [1, 2, 3])
    assert (one["expected"], one["median"]) == (None, 2.0)
    assert two["expected"] == pytest.approx((1 + 1 + 2) / 3)  # one of the two is always finite
    assert (three["expected"], three["median"]) == (1.0, 1.0)


def test_arms_are_compared_at_the_smallest_budget():
    found = tuning_of({"few": tried([3.0], [2.0]), "many": tried([4.0], [3.0], [2.0], [1.0])})
    assert (found["budget"], found["equal"]) == (2, False)
    ends = {arm: x["expected"][-1] for arm, x in found["arms"].items()}
    assert ends["few"]["k"] == ends["many"]["k"] == 2
    assert ends["few"]["expected"] == 2.0
    assert ends["many"]["expected"] == pytest.approx((3 * 1 + 2 * 2 + 3) / 6)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_many_budgets_are_thinned_and_keep_both_ends():
    assert budgets(3) == [1, 2, 3]
    assert budgets(1000)[0] == 1
    assert budgets(1000)[-1] == 1000
    assert len(budgets(1000)) <= 50


def test_arms_of_one_configuration_have_no_tuning():
    assert tuning_of({"a": tried([1.0, 2.0]), "b": tried([1.0])}) is None
    assert luck_of(None, "a") == NO_LUCK


def test_the_lowest_mean_of_the_loss_that_chooses_is_chosen_and_the_other_reported():
    found = tuning_of(
        {"arm": tried([(1.0, 9.0), (1.2, 9.2)], [(2.0, 2.0), (2.0, 4.0)])}, chosen_by="val", reported="test"
    )
    assert (found["chosen_by"], found["reported"], found["same"]) == ("val", "test", False)
    arm = found["arms"]["arm"]
    assert arm["chosen"] == {
        "number": 0,
        "settings": {"lr": 1.0},
        "runs": 2,
        "loss": pytest.approx(1.1),
        "outcome": pytest.approx(9.1),
    }
    assert arm["optimism"] is None
    assert [x["expected"] for x in arm["expected"]] == pytest.approx([(9.1 + 3.0) / 2, 9.1])


def test_a_single_lucky_run_does_not_beat_a_mean_of_several():
    found = of_one_arm([2.00, 2.02, 1.98, 2.01, 1.99], [1.99], [2.5])
    assert found["chosen"]["number"] == 0
    # the one that alone was repeated is judged even where a single run lies ahead, or one of its own diverged
    assert of_one_arm([2.00, 2.02, 1.98, 2.01, 1.99], [1.96], [2.5])["chosen"]["number"] == 0
    assert of_one_arm([2.5], [2.00, 2.02, INF], [2.4])["chosen"]["number"] == 1
    # of those that were repeated alike, the lowest
    assert of_one_arm([2.00, 2.02, 1.98], [1.96, 1.97, 1.95], [2.5])["chosen"]["number"] == 1
    # and an extra run of a bad configuration does not make it the winner
    extra = of_one_arm([2.5, 2.52], [2.0], [2.1])
    assert extra["chosen"]["number"] == 1


def test_a_configuration_with_a_diverged_run_ranks_behind_and_ties_are_counted():
    found = of_one_arm([1.0, INF], [3.0, 3.0], [3.0, 3.0])
    assert (found["chosen"]["number"], found["ties"]) == (1, 1)
    hopeless = of_one_arm([INF, INF], [INF, 2.0], [INF, 1.0])
    assert hopeless["chosen"]["number"] == 2
    assert hopeless["chosen"]["loss"] is None
    assert hopeless["window"] is None


def test_the_luck_is_that_of_the_labs_own_tunings():
    losses = [[2.0, 2.1, 2.05], [2.02, 2.09, 2.03], [2.4, 2.5, 2.3], [3.0, 3.2, 3.1]]
    found = tuning_of({"arm": tried(*losses), "one": tried([2.0, 2.1, 2.2])})
    assert luck_of(found, "arm") == luck_of_choice(losses, sigma=0.0)
    assert luck_of(found, "arm").sd > 0
    assert found["arms"]["one"]["luck"] == {"sd": 0.0, "freedom": 1.0}


def test_where_seeds_differ_the_noise_is_pooled_over_the_better_half():
    runs = [{"a": 2.0, "b": 2.1}, {"c": 2.0, "d": 2.3}, {"e": 9.0, "f": 1.0}, {"g": 5.0, "h": 9.0}]
    arm = [Configuration({"lr": i}, {k: (x, x) for k, x in one.items()}) for i, one in enumerate(runs)]
    found = tuning_of({"arm": arm})["arms"]["arm"]
    assert found["noise"] == pytest.approx(math.sqrt((0.1**2 / 2 + 0.3**2 / 2) / 2))
    assert found["luck"]["freedom"] == 2


def test_without_a_second_run_the_luck_is_unknown():
    found = of_one_arm([2.0], [2.1])
    assert found["luck"] is found["noise"] is found["optimism"] is None
    assert luck_of(tuning_of({"arm": tried([2.0], [2.1])}), "arm") == NO_LUCK


def test_luck_is_in_the_unit_of_the_reported_loss():
    pairs = [[(2.0, 200.0), (2.1, 210.0)], [(2.03, 203.0), (2.05, 205.0)]]
    small = of_one_arm(*([a for a, _ in of_one] for of_one in pairs))
    assert of_one_arm(*pairs)["luck"]["sd"] == pytest.approx(100 * small["luck"]["sd"], rel=1e-4)


def test_two_equal_configurations_are_as_much_too_low_as_the_lowest_of_two_normal_means():
    # runs of other seeds, all with a standard deviation of 0.1
    runs = [{"a": 1.9, "b": 2.0, "c": 2.1}, {"d": 1.9, "e": 2.0, "f": 2.1}]
    arm = [Configuration({"lr": i}, {k: (x, x) for k, x in one.items()}) for i, one in enumerate(runs)]
    found = tuning_of({"arm": arm})["arms"]["arm"]
    assert found["optimism"] == pytest.approx(0.1 / math.sqrt(3) / math.sqrt(math.pi), rel=1e-4)
    assert found["luck"] == {"sd": 0.0, "freedom": 4}


def grid(best, wds=(0.0, 0.1), lrs=("1e-3", "2e-3", "4e-3")):
    return [
        Configuration({"optim.lr": lr, "wd": wd, "name": "x"}, {"0": (1.0 if (lr, wd) == best else 2.0,) * 2})
        for lr in lrs
        for wd in wds
    ]


@pytest.mark.parametrize(
    ("best", "edges"),
    [
        (("1e-3", 0.0), {"optim.lr": ("low", "low")}),  # 0 is the end of a weight decay itself
        (("2e-3", 0.1), {"wd": ("high", "high")}),
        (("4e-3", 0.1), {"optim.lr": ("high", "high"), "wd": ("high", "high")}),
        (("2e-3", 0.0), {}),
    ],
)
def test_a_winner_at_the_edge_of_what_was_tried_is_named(best, edges):
    found = tuning_of({"arm": grid(best)})["arms"]["arm"]["edges"]
    assert {x["setting"]: (x["end"], x["beside"]) for x in found} == edges


def test_an_edge_among_like_configurations_is_told_from_one_among_all():
    def arm(*points):
        return [
            Configuration({"lr": lr, "wd": wd}, {"0": (2.0 - (i == 0),) * 2})
            for i, (lr, wd) in enumerate(points)
        ]

    inside = tuning_of({"arm": arm((2, 0.1), (1, 0.1), (4, 0.2))})["arms"]["arm"]["edges"]
    assert {"setting": "lr", "value": 2.0, "values": 3, "end": None, "beside": "high"} in inside
    alone = tuning_of({"arm": arm((4, 0.1), (1, 0.2), (2, 0.3))})["arms"]["arm"]["edges"]
    assert {"setting": "lr", "value": 4.0, "values": 3, "end": "high", "beside": None} in alone


def test_the_window_is_that_of_the_learning_rate_with_other_settings_as_chosen():
    losses = {1e-3: 2.02, 2e-3: 2.0, 4e-3: 2.1, 8e-3: INF}
    noise = 0.025 / math.sqrt(2)  # to either side: a deviation of 0.025
    runs = {lr: {"0": (x - noise,) * 2, "1": (x + noise,) * 2} for lr, x in losses.items()}
    arm = [Configuration({"lr": lr, "wd": 0.1}, of_one) for lr, of_one in runs.items()]
    other = [Configuration({"lr": 16e-3, "wd": 0.2}, {"0": (2.5, 2.5)})]
    found = tuning_of({"arm": arm + other})["arms"]["arm"]["window"]
    assert found == pytest.approx(window(losses, 0.05))
    alone = [Configuration(c.settings, {"0": c.runs["0"]}) for c in arm]
    assert tuning_of({"arm": alone})["arms"]["arm"]["window"] is None  # the noise of a run is not known
    assert (found["open_low"], found["open_high"]) == (True, False)
    eta = tried([2.0, 2.1], [2.0, 1.9], [2.0, 2.1], setting="eta")
    assert tuning_of({"arm": eta}, lr="eta")["arms"]["arm"]["window"]["octaves"] == 2.0
    assert tuning_of({"arm": eta})["arms"]["arm"]["window"] is None


@pytest.mark.parametrize(
    ("rates", "known"),
    [
        (("max_learning_rate",), True),
        (("optim/lr",), True),
        (("learning_rate_init",), True),
        (("lr", "min_lr"), False),  # which of the two is not guessed
        (("color",), False),
    ],
)
def test_the_learning_rate_is_known_by_its_name(rates, known):
    fixed = {"learning_rate": "constant", "warmup_lr": 1e-6}
    arm = [
        Configuration({**dict.fromkeys(rates, x), **fixed}, {"0": (2 * x, x), "1": (3 * x, x)})
        for x in (0.1, 0.2)
    ]
    found = tuning_of({"arm": arm})["arms"]["arm"]["window"]
    assert (found is not None) == known


def test_configurations_come_from_a_table_by_seed_or_where_seeds_repeat_by_number():
    table = pd.DataFrame(
        {
            "arm": ["adam", "adam", "adam", "sgd", "lion"],
            "seed": ["0", "0", "1", "0", "0"],
            "lr": [1.0, 2.0, 2.0, math.nan, math.nan],
            "outcome": [0.5, 0.6, 0.7, -INF, 0.8],
            "chosen_by": [0.4, 0.5, 0.6, -INF, 0.8],
        }
    )
    found = configurations_of(table, ["lr"], higher=True)
    assert found["adam"] == [
        Configuration({"lr": 1.0}, {"0": (-0.4, -0.5)}, (0,)),
        Configuration({"lr": 2.0}, {"0": (-0.5, -0.6), "1": (-0.6, -0.7)}, (1, 2)),
    ]
    assert found["sgd"][0].runs == {"0": (INF, INF)}
    assert found["lion"][0].rows == (4,)
    assert tuning_of(found)["arms"]["sgd"]["chosen"]["settings"] == {"lr": None}
    table["seed"] = "0"
    assert [list(c.runs) for c in configurations_of(table, ["lr"])["adam"]] == [["0"], ["1", "2"]]
    assert len(configurations_of(table, [])["adam"]) == 1


def test_luck_adds_up_between_two_arms():
    found = tuning_of({x: tried([2.0, 2.1, 2.05], [2.02, 2.09, 2.03]) for x in "ab"})
    one = luck_of(found, "a")
    assert (one + luck_of(found, "b")) == Luck(pytest.approx(math.sqrt(2) * one.sd), 2 * one.freedom)
