"""What suites answer, and the tables that the answer rests on."""

from __future__ import annotations

import itertools
import math

import pytest
from support.drawn import sweep
from support.recorded import read_decisions

from ebc_lab.config.compose import compose
from ebc_lab.report.kinds import Evidence, kind_of
from ebc_lab.report.kinds.suite import answer_of
from ebc_lab.report.text import glance, papers, words
from ebc_lab.report.text.table import PAGE, PAPER, TERMINAL
from ebc_lab.study.stages.stage import stage_of
from ebc_lab.study.stages.statistics import paired

CAUTIOUS = read_decisions("cautious")  # which asks about an optimizer of its own
TUNED = words.tuned_arms(CAUTIOUS["tune"], "adam_none")


def asked_about(*arms, **changed):
    """The suite of `cautious`, which asks about these arms; `changed`: of the answers about them."""
    track = CAUTIOUS["ablation"]["tracks"]["adam_none"]
    own = track["answers"]["cautious"] | changed
    arms = dict.fromkeys(arms, track["arms"]["cautious"])
    return track | {
        "arms": arms | track["arms"],
        "answers": {arm: own | {"sentence": f"{arm}: {own['sentence']}"} for arm in arms},
    }


def cells(table):
    return [[(cell.page or cell.text) for cell in row.cells] for row in table.on(PAGE).rows]


def test_the_headline_is_about_mine_and_not_about_the_lowest_arm():
    judged, sentence, findings, tiles = answer_of(asked_about("cautious"), TUNED)
    assert judged == "misses"
    assert sentence == "cautious is worse than muon on this model, batch and length."
    assert "against muon, the best of the others by validation: +0.1441 nats of test loss" in findings[0]
    assert [tile.value for tile in tiles] == ["+0.144", "3.2", "×1.09"]
    judged, sentence, *_ = answer_of(asked_about("cautious", verdict="undecided", seeds_needed=9))
    assert judged == "undecided"
    assert "9 seeds would decide" in sentence


def test_an_answer_about_mine_says_on_what_it_was_found():
    images = ["workload=images", "data=digits", "model=cnn"]
    for more, batch in (
        ([], "8 × 32 tokens, 123 steps of shakespeare"),
        (images, "8 images, 123 steps of digits"),
    ):
        size = ["scale=smoke", "data=shakespeare", "ablation.steps=123", "batch_size=8", *more]
        config = compose(["study=optimizers", *size], here=False)
        found = Evidence(CAUTIOUS["ablation"], config, CAUTIOUS)
        [answer] = kind_of(found.decision).answers(found)
        last = answer.findings[-1]
        assert last.startswith(f"On one model ({words.model(config)}), batch {batch}: another size ")
        assert f"{config.model.blocks} blocks, width {config.model.width}" in last
    track = CAUTIOUS["ablation"]["tracks"]["adam_none"]
    none = {**CAUTIOUS["ablation"], "tracks": {"adam_none": track | {"answers": {}, "mine": []}}}
    [answer] = kind_of(none).answers(Evidence(none, config, CAUTIOUS))
    assert not any(line.startswith("On one model") for line in answer.findings)


def test_a_single_rate_shows_no_window():
    """As where the tuning ended there, and tune.window=false asked for no more."""
    config = compose(["study=optimizers"], here=False)
    for curve, tiles in ((3, 1), (1, 0)):
        arm = TUNED["cautious"] | {"curve": TUNED["cautious"]["curve"][:curve]}
        track = CAUTIOUS["tune"]["tracks"]["adam_none"]
        tracks = {"adam_none": track | {"arms": TUNED | {"cautious": arm}}}
        decisions = CAUTIOUS | {"tune": CAUTIOUS["tune"] | {"tracks": tracks}}
        [answer] = kind_of(CAUTIOUS["ablation"]).answers(Evidence(CAUTIOUS["ablation"], config, decisions))
        assert sum("window" in tile.what for tile in answer.tiles) == tiles


def test_of_many_arms_of_ones_own_the_answer_counts_and_each_has_a_line():
    arms = [f"mine{i}" for i in range(6)]
    _, sentence, findings, _ = answer_of(asked_about(*arms))
    assert "mine3" not in sentence
    assert "6" in sentence
    assert [line.partition(":")[0] for line in findings] == arms


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"test_median": None}, "No answer: no arm completed a run that can be compared."),
        ({"difference": None}, "No answer: no arm is paired with another one."),
    ],
)
def test_a_suite_of_which_nothing_can_be_compared_says_so(changed, told):
    [track] = read_decisions("as_run")["ablation"]["tracks"].values()
    arms = {name: arm | changed for name, arm in track["arms"].items()}
    assert answer_of(track | {"arms": arms})[:2] == ("undecided", told)


def test_a_swept_suite_of_which_no_run_completed_says_so():
    [track] = read_decisions("robustness")["ablation"]["tracks"].values()
    lost = {"lr_scale": {**track["windows"]["ebc"]["lr_scale"], "window": None}}
    assert answer_of(track | {"windows": {"ebc": lost}})[:2] == (
        "undecided",
        "No answer: no arm completed a run at any learning rate.",
    )


@pytest.mark.parametrize(
    ("verdicts", "judged", "told"),
    [
        (("earns", "loses"), "beats", "a earns its cost over"),
        (("earns", "earns"), "beats", "a and b earn their cost over"),
        (("loses", "undecided"), "undecided", "Undecided whether b earns its cost over"),
        (("loses", "loses"), "misses", "No challenger earns its cost over"),
    ],
)
def test_carried_constants_answer_whether_a_challenger_earns_its_cost(verdicts, judged, told):
    decisions = read_decisions("rate_fit")
    decision = decisions["carry"]
    [(name, track)] = decision["tracks"].items()
    same = next(iter(track["verdicts"]))
    two = dict.fromkeys(("a", "b"), track["against"][same])
    track = track | {"verdicts": dict(zip("ab", verdicts, strict=True)), "challengers": []}
    track |= {"against": track["against"] | two}
    track["arms"] = track["arms"] | dict.fromkeys("ab", track["arms"][same])
    changed = decision | {"tracks": {name: track}}
    [answer] = kind_of(decision).answers(Evidence(changed, compose(["study=optimizers"], here=False)))
    assert (answer.judged, answer.sentence) == (judged, f"{told} {track['reference']}.")


CAPTIONS = {  # words of a caption -> title of the column that they are about, or a mark in one of its cells
    "δ*": "δ*",
    "KL": "KL",
    "LR window:": "LR window, octaves",
    "time of a step": "Time of a step",
    "spread over the pairs": "×1.00 [",
    "± one standard deviation": "±",
    "by itself": "Interval by itself",
    "detectable": "Detectable, jointly",
    "dashed": "Drawn",
    "activations": "Activations, packed",
    "gradients": "Gradients",
    "compute": "Compute of a run",
    "best there": "Best there",
    "same validation loss": "Seconds of training, likewise",
}


@pytest.mark.parametrize("study", ["cautious", "ladder", "default"])
def test_a_caption_is_about_nothing_but_what_its_table_shows(study):
    """On the page, the terminal and in papers, which show different columns of one table."""
    decisions, said = read_decisions(study), set()
    config = compose(["study=optimizers"], here=False)
    for decision in decisions.values():
        kind, found = kind_of(decision), Evidence(decision, config, decisions)
        tables = [*kind.tables(found), *(table for answer in kind.answers(found) for table in answer.tables)]
        tables += [table for made in kind.papers(found).values() for table in made]
        for place, table in itertools.product((TERMINAL, PAPER, PAGE), tables):
            shown = table.on(place)
            every = [
                (cell.page if place == PAGE else "") or cell.text for row in shown.rows for cell in row.cells
            ]
            there = {column.title for column in shown.columns}
            text = " ".join(every)
            for told, about in CAPTIONS.items():
                if told in shown.note:
                    said.add(told)
                    assert about in there or about in text, (place, table.name, shown.note)
            if {"Difference", "Verdict"} <= there:
                assert "test loss" in shown.note, "of which split the difference is"
    expected = {"cautious": "LR window:", "ladder": "same validation loss", "default": "dashed"}
    assert expected[study] in said


def test_mine_stands_beside_every_other_arm_with_what_it_was_tuned_to():
    table = glance.is_better("t", "cautious", asked_about("cautious"), TUNED)
    mine, rival, reference = cells(table)
    assert mine[:2] == ["cautious", "itself"]
    assert mine[4:9] == ["1.9676", "0.004", "trapezoid", "100", "3.2"]
    assert rival[:3] == ["muon", "+0.144", "worse"]
    assert reference[0] == "adam"
    assert mine[-1] == "×1.09 [1.09, 1.10]"
    assert table.rows[0].chosen
    picked = glance.is_better("t", "cautious", asked_about("cautious", rival="adam"), TUNED)
    assert cells(picked)[1][0] == "adam"  # before muon, whose loss is lower: it was picked by validation
    paper = table.on(PAPER)
    assert len(paper.columns) == 5
    assert ["muon", "1.8235", "+0.144"] in [row[:3] for row in paper.texts()]
    assert "worse" in papers.latex([paper], "own", "")


def test_what_was_tried_of_each_shows_whether_all_were_tuned_alike():
    names = ["cautious", "adam", "plain"]
    grids = {label: {"lr": [0.002, 0.004, 0.008], "schedule": ["cosine", "warmup_linear"]} for label in names}
    mine, adam = cells(glance.tried("t", CAUTIOUS["tune"], "adam_none", names, grids))
    assert mine[:6] == ["cautious", "12", "3", "2", "24", "0.001 to 0.032"]
    assert adam[:6] == ["adam", "13", "2", "2", "26", "0.001 to 0.016"]
    assert mine[6] == "cosine, warmup linear"
    assert glance.tried("t", CAUTIOUS["tune"], "adam_none", ["plain"], grids) is None


def suite_of(**shifts):
    """A suite without arms of one's own: each arm's losses minus the reference's."""
    reference = {str(seed): 2.0 for seed in range(4)}
    arms = {"plain": {"versus": None, "difference": None}}
    for label, own in shifts.items():
        losses = {str(seed): math.inf if x is None else 2.0 + x for seed, x in enumerate(own)}
        difference = paired(losses, reference, margin=0.01, comparisons=len(shifts))
        arms[label] = {"versus": "plain", "difference": difference}
    for label, found in arms.items():
        found |= {"comparable": True, "outcomes": {"completed": 4}}
        found |= {"test_median": 1.0 if label == "lucky" else 2.0}
    return {"reference": "plain", "arms": arms}


def test_the_lowest_of_undecided_arms_is_not_called_the_best():
    found = suite_of(lucky=(-0.5, 0.4, -0.3, 0.3), other=(0.2, -0.2, 0.1, -0.1))
    judged, sentence, findings, _ = answer_of(found)
    assert judged == "undecided"
    assert "None of 2 arms" in sentence
    assert not any("best" in line for line in (sentence, *findings))


def test_arms_that_are_told_apart_are_named_by_side():
    good, bad = (-0.1, -0.101, -0.102, -0.1), (0.2, 0.201, 0.2, 0.202)
    _, sentence, findings, _ = answer_of(suite_of(good=good, bad=bad, lucky=(-0.5, 0.4, -0.3, 0.3)))
    assert "good is better" in sentence
    assert "bad is worse" in sentence
    assert findings[:3] == ["Better: good.", "Worse: bad.", "Not told apart: lucky."]


def test_a_label_tells_schedules_as_recorded_and_does_not_take_an_own_optimizers_name_for_one():
    own = {"track": "my_cosine_none", "lr": 0.004, "lr_scale": 2.0, "roles": ["ebc_lindelta"], "ebc": False}
    own |= {"lr_schedule": "constant", "warmup_steps": None, "delta_schedule": None}
    assert words.arm_label("my_cosine_none_baseline_x2", own) == "plain ×2"
    own |= {"lr_schedule": "trapezoid", "warmup_steps": 7}
    assert (
        words.arm_label("my_cosine_none_baseline_x2_trapezoid_w7", own)
        == "plain ×2, trapezoid LR, 7 steps of warm-up"
    )


def test_a_track_of_an_own_optimizer_is_told_in_words():
    assert words.tracks_in_words("my_adam_none: lr 0.004", ["my_adam_none"]) == "my_adam: lr 0.004"


# -- sweeps and transfers ------------------------------------------------------------------------------------

WIDE = {1: 2.0, 2: 2.01, 4: 2.0, 8: 2.02}
NARROW = {1: 2.3, 2: 2.0, 4: 2.4, 8: None}


def of_windows(windows, **more):
    points = [p["arm"] for sweeps in windows.values() for own in sweeps.values() for p in own["points"]]
    done = {"comparable": True, "outcomes": {"completed": 2}, "test_median": 2.0}
    return {"reference": points[0], "arms": dict.fromkeys(points, done), "windows": windows} | more


def test_the_answer_names_the_windows_beyond_what_was_tried_and_every_arm_has_a_line():
    track = read_decisions("robustness")["ablation"]["tracks"]["adam_none"]
    _, sentence, findings, tiles = answer_of(track)
    assert sentence == (
        "The loss stays within 0.05 nats of an arm’s own best: trust_region, ebc beyond the rates that were "
        "tried; trapezoid_third over 5.1 octaves."
    )
    assert findings[0] == "Learning-rate window of trust_region: ≥ 7.3 octaves (best at ×64)."
    assert len(findings) == len(track["windows"])
    assert tiles[0].value == "≥ 7.3"


def test_the_answer_of_rules_is_which_of_them_forget_their_start():
    windows = {
        "fixed": {"delta": sweep(NARROW, "fixed", yardstick="fixed", worst=None, every_start=False)},
        "rule": {"delta": sweep(WIDE, "rule", yardstick="fixed", worst=0.02, every_start=True)},
        "lost": {"delta": sweep(NARROW, "lost", yardstick="fixed", worst=None, every_start=False)},
    }
    _, sentence, findings, _ = answer_of(of_windows(windows))
    assert sentence.startswith("rule ends within 0.02 nats")
    assert "+0.020" in findings[0]
    assert "a start diverged" in findings[1]
    windows["rule"]["delta"]["every_start"] = False
    judged, sentence, *_ = answer_of(of_windows(windows))
    assert (judged, sentence[:15]) == ("misses", "None of 2 rules")


def test_the_answer_of_a_transfer_is_its_regrets():
    def kept(regret, ebc):
        difference = paired({"0": regret - 0.01, "1": regret + 0.01}, {"0": 0.0, "1": 0.0}, comparisons=2)
        return {**done, "ebc": ebc, "difference": difference}

    done = {"comparable": True, "outcomes": {"completed": 2}, "test_median": 2.0}
    arms = {"plain_long": kept(0.1, ebc=False), "ebc_long": kept(0.02, ebc=True)}
    arms["again"] = {**done, "ebc": False, "difference": None}
    sizes = [{"shape": "4× steps", "tuned": "again", "kept": ["plain_long", "ebc_long"], "against_kept": {}}]
    found = {"reference": "again", "arms": arms, "windows": {}, "transfer": sizes}
    _, sentence, findings, _ = answer_of(found)
    assert "+0.020 nats with EBC" in sentence
    assert "+0.100 nats without EBC" in sentence
    assert ["plain_long: +0.100" in findings[0], "ebc_long: +0.020" in findings[1]] == [True, True]


# -- constants that were carried -----------------------------------------------------------------------------


def test_the_first_figures_are_the_best_challenger_the_least_excess_and_what_broke():
    carry = read_decisions("units_laptop")["carry"]
    evidence = Evidence(carry, compose(["scale=smoke"]))
    [answer] = kind_of(carry).answers(evidence)
    shown = {tile.what: (tile.value, tile.remark) for tile in answer.tiles}
    excess = "+0.021", "above the best of all arms; +0.053 at worst (batch_4)"
    assert shown["kl_x8 has the lowest mean excess"] == excess
    assert shown["Broken runs of kl_x8"] == ("0.0%", "0 of 18; radius_ramp 0.0%")
    assert answer.tiles[0].what.startswith("kl_x8 minus radius_ramp")
    [line] = stage_of("carry").headlines(carry)
    assert "kl_radius is undecided: -0.0082 nats [-0.0463, +0.0298] from radius_ramp" in line
    arms = kind_of(carry).tables(evidence)[0]
    broken = [column.title.startswith("Broken") for column in arms.columns]
    [track] = carry["tracks"].values()
    for row in arms.rows:
        shares = [cell.text for cell, wanted in zip(row.cells, broken, strict=True) if wanted]
        found = track["arms"][row.cells[0].text]
        counts = (found["broken"], found["broken_anywhere"])
        assert shares == [f"{runs['broken']} of {runs['runs']}" for runs in counts]
