"""What a suite answers, and the tables that the answer rests on."""

from __future__ import annotations

import math

from support.drawn import sweep

from ebc_lab.report.kinds.suite import answer_of
from ebc_lab.report.text import glance, papers, words
from ebc_lab.report.text.table import PAGE, PAPER
from ebc_lab.study.stages.statistics import paired, window

LOSSES = {"adam": (2.00, 2.01, 2.02), "muon": (1.90, 1.91, 1.92), "mine": (1.80, 1.815, 1.82)}


def arm(label, lr, **more):
    runs = {str(seed): f"{label}_s{seed}" for seed in range(3)}
    mean = sum(LOSSES[label]) / 3
    figures = {"test_loss": mean, "val_loss": mean, "test_median": mean, "val_median": mean}
    found = {"lr": lr, "runs": runs, "outcomes": {"completed": 3}, "ebc": False, "comparable": True}
    schedule = {"lr_schedule": "cosine", "warmup_steps": 20, "delta_schedule": None, "delta_star": None}
    return found | figures | schedule | {"track": "adam_none", "about": label, "point": None} | more


def found_of(**verdicts):
    """A decided suite that asks about `mine`."""
    arms = {label: arm(label, 0.004 * (i + 1)) for i, label in enumerate(LOSSES)}
    by_seed = {label: {str(i): x for i, x in enumerate(own)} for label, own in LOSSES.items()}
    for label, own in arms.items():
        own["versus"] = "adam" if label != "adam" else None
        own["difference"] = paired(by_seed[label], by_seed["adam"], margin=0.01) if own["versus"] else None
    against = {o: paired(by_seed["mine"], by_seed[o], margin=0.01, comparisons=2) for o in ("adam", "muon")}
    told = {"rival": "muon", "difference": against["muon"], "against": against}
    answer = {**told, "verdict": "better", "sentence": "mine against muon: −0.0983 nats: better", **verdicts}
    costs = {"mine": {"ratio": 1.25, "low": 1.2, "high": 1.3}}
    return {
        "reference": "adam",
        "arms": arms,
        "mine": ["mine"],
        "answers": {"mine": answer},
        "steps_cost": costs,
    }


TUNED = {"mine": {"window": window({0.001: 2.2, 0.002: 2.0, 0.004: 2.3})}}


def cells(table):
    return [[(cell.page or cell.text) for cell in row.cells] for row in table.on(PAGE).rows]


def test_the_headline_is_about_mine_and_not_about_the_lowest_arm():
    judged, sentence, findings, tiles = answer_of(found_of())
    assert judged == "beats"
    assert sentence == "mine is better than muon."
    assert findings == ["mine against muon: −0.0983 nats: better."]
    assert tiles[0].value == "−0.098"
    judged, sentence, *_ = answer_of(found_of(verdict="undecided", seeds_needed=9))
    assert judged == "undecided"
    assert "9 seeds would decide" in sentence


def test_of_many_arms_of_ones_own_the_answer_counts_and_each_has_a_line():
    found = found_of()
    own = found["answers"]["mine"]
    found["answers"] = {f"mine{i}": own | {"sentence": f"mine{i}: better"} for i in range(6)}
    _, sentence, findings, _ = answer_of(found)
    assert "mine3" not in sentence
    assert "6" in sentence
    assert findings == [f"mine{i}: better." for i in range(6)]


def test_mine_stands_beside_every_other_arm_with_what_it_was_tuned_to():
    table = glance.is_better("t", "mine", found_of(), TUNED)
    mine, rival, reference = cells(table)
    assert mine[:2] == ["mine", "itself"]
    assert mine[4:9] == ["1.8117", "0.012", "cosine", "20", "0.4"]
    assert rival[:3] == ["muon", "−0.098", "better"]  # before adam: it was picked by validation
    assert reference[0] == "adam"
    assert mine[-1] == "×1.25 [1.20, 1.30]"
    assert table.rows[0].chosen


def test_what_was_tried_of_each_shows_that_all_were_tuned_alike():
    candidates = [
        {"role": label, "arm": f"{label}_lr{lr}", "lr": lr, "seed": seed, "run_id": f"{label}_{lr}_{seed}"}
        for label in ("mine", "adam")
        for lr in (0.001, 0.002, 0.004)
        for seed in (100, 101)
    ]
    own = {"extended": [{"lr": 0.004}], "runs": 6, "point": {"lr": 0.002, "schedule": "cosine"}}
    decision = {"tracks": {"adam_none": {"arms": {"mine": own, "adam": own}}}, "candidates": candidates}
    grids = {
        label: {"lr": [0.001, 0.002], "schedule": ["cosine", "warmup_linear"]} for label in ("mine", "adam")
    }
    table = glance.tried("t", decision, "adam_none", ["mine", "adam", "plain"], grids)
    mine, adam = cells(table)
    assert mine[1:] == adam[1:]
    assert mine[1:7] == ["3", "1", "2", "6", "0.001 to 0.004", "cosine, warmup linear"]
    assert glance.tried("t", decision, "adam_none", ["plain"], grids) is None


def test_a_paper_has_five_columns_of_mine_beside_the_others():
    table = glance.is_better("t", "mine", found_of(), TUNED).on(PAPER)
    assert len(table.columns) == 5
    assert ["muon", "1.9100", "−0.098"] in [row[:3] for row in table.texts()]
    assert "better" in papers.latex([table], "own", "")


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


def test_studies_without_ebc_do_not_explain_it():
    plain = {
        "study": {"stages": ["lr_sweep", "tune", "ablation"]},
        "ablation": {"arms": {"adam": {"settings": {}}}},
    }
    ebc = {
        "study": plain["study"],
        "ablation": {"arms": {"ebc": {"settings": {"stabilizer": {"name": "ebc"}}}}},
    }
    assert not words.has_ebc(plain)
    assert words.has_ebc(ebc)
    assert words.has_ebc({"study": {"stages": ["lr_sweep", "finals"]}})
    said = "the fair control at δ* 0.01, c and natural KL; σ of an arm"
    told, untold = words.explanation(True, True, said), words.explanation(False, False, said)
    assert set(told["terms"]) == {"δ*", "natural KL", "c", "fair control", "arm", "σ"}
    assert set(untold["terms"]) == {"fair control", "arm", "σ"}  # of those used here, not all that there are
    assert "EBC" not in " ".join(untold["method"])


def test_a_label_tells_schedules_as_recorded_and_does_not_take_an_own_optimizers_name_for_one():
    own = arm("mine", 0.004, track="my_cosine_none", lr_scale=2.0, roles=["ebc_lindelta"], ebc=False)
    del own["about"]
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


def test_the_answer_names_the_widest_window_and_every_arm_has_a_line():
    rates = {"plain": sweep(NARROW, "plain", delta_star=None), "ebc": sweep(WIDE, "ebc", delta_star=0.01)}
    _, sentence, findings, tiles = answer_of(of_windows({name: {"lr_scale": x} for name, x in rates.items()}))
    assert "ebc beyond the rates" in sentence
    assert ["ebc" in findings[0], "plain" in findings[1]] == [True, True]
    assert tiles[0].value == "≥ 3.0"


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
    def regret(mean):
        return {
            "mean": mean,
            "low": mean - 0.05,
            "high": mean + 0.05,
            "seeds": 2,
            "method": "t",
            **dict.fromkeys(("joint_low", "joint_high", "joint_detectable"), None),
            "comparisons": 2,
            "judged": "undecided",
        }

    done = {"comparable": True, "outcomes": {"completed": 2}, "test_median": 2.0, "difference": None}
    arms = {
        "plain_long": {**done, "ebc": False, "difference": regret(0.1)},
        "ebc_long": {**done, "ebc": True, "difference": regret(0.02)},
        "again": {**done, "ebc": False},
    }
    sizes = [{"shape": "4× steps", "tuned": "again", "kept": ["plain_long", "ebc_long"], "against_kept": {}}]
    found = {"reference": "again", "arms": arms, "windows": {}, "transfer": sizes}
    _, sentence, findings, _ = answer_of(found)
    assert "+0.020 nats with EBC" in sentence
    assert "+0.100 nats without EBC" in sentence
    assert ["plain_long: +0.100" in findings[0], "ebc_long: +0.020" in findings[1]] == [True, True]


def test_two_windows_that_do_not_end_are_not_set_against_each_other():
    rates = {name: {"lr_scale": sweep(WIDE, name)} for name in ("one", "other")}
    _, sentence, _, _ = answer_of(of_windows(rates))
    assert "≥" not in sentence
    assert "one, other beyond" in sentence
