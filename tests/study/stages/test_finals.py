"""The finals: which arms there are, what they are compared with, and the line about the LR window."""

import copy
import json
import math
import random
import shlex

import pytest
from support.played import DIVERGED, config_of, decided, decided_through, done, played

from ebc_lab.config.compose import compose
from ebc_lab.config.errors import UserError
from ebc_lab.study.inspect.reproduce import decides_all, deciding, ways_to_decide
from ebc_lab.study.stages import finals
from ebc_lab.study.stages.statistics import NO_LUCK, Luck, paired, seeds_needed
from ebc_lab.study.stages.verdict import remedy

TRACK = "adam_none"


def spread(spec):
    return done(2 + abs(spec.run.optimizer.lr - 4e-3) + 0.01 * (spec.run.seed % 100))


def before(*overrides, control=None):
    """A configuration and the decisions that its finals build on; baseline 2e-3, the fair control at
    `control` times that."""
    config = config_of("optimizer=adam", "lr_sweep.baseline_scales=[0.5]", *overrides)
    decisions = decided_through("lr_scale", config, spread)
    if control:
        found = decisions["lr_sweep"]["tracks"][TRACK]["control"]
        found |= {"lr_scale": control, "lr": 2e-3 * control}
    return config, decisions


def arms(*roles):
    return f"finals.arms=[{','.join(roles)}]"


# -- the arms ------------------------------------------------------------------------------------------------


def test_identical_runs_are_one_arm_with_two_roles():
    config, decisions = before(control=2.0)
    _, specs, results = played("finals", config, decisions, spread)
    assert len({s.run_id for s in specs if s.kind == "train"}) == 5 * len(config.seeds)
    found = finals.STAGE.decide(config, specs, results, decisions)["tracks"][TRACK]
    assert found["roles"]["control"] == found["roles"]["control_x2"]
    assert found["arms"][found["roles"]["control"]]["roles"] == ["control", "control_x2"]


@pytest.mark.parametrize(
    ("roles", "words"),
    [
        (["baseline", "control", "ebc_x2", "ebc_x"], ["ebc_x is unknown", "as in ebc_x8"]),
        (["baseline", "control", "ebc_x2", "ebc_x0"], ["ebc_x0 is unknown"]),
        (["baseline", "control", "ebc_x2", "ebc_xtwo"], ["ebc_xtwo is unknown"]),
        (["baseline", "control", "ebc_x2", "none_choosen"], ["did you mean none_chosen"]),
        (["baseline", "control", "ebc_x8"], ["finals.arms lacks ebc_x2"]),
        (["control", "ebc_x2"], ["finals.arms lacks baseline"]),
        (["baseline", "ebc_x2"], ["finals.arms lacks control"]),
        (["baseline", "control", "ebc_x2", "ebc_x2"], ["finals.arms", "twice"]),
        ([], ["finals.arms"]),
    ],
)
def test_arms_that_cannot_be_are_refused_in_one_sentence(roles, words):
    with pytest.raises(UserError) as caught:
        compose(["scale=smoke", arms(*roles)])
    assert all(word in str(caught.value) for word in words), caught.value
    assert str(caught.value).count("\n") == 0


# -- what is compared ----------------------------------------------------------------------------------------


def judged(gap, *, sd=0.001, plain=1.0, bad=(), overrides=()):
    """The finals' track, with EBC at its highest rate `gap` nats behind its lowest, paired up to `sd`, and
    plain arms behind by `plain`; roles in `bad` diverge."""
    config, decisions = before(*overrides)
    draw = random.Random(0)

    def answer(s):
        behind = {"ebc_x8": gap, "control_x8": plain}.get(s.role, 0.0)
        return DIVERGED if s.role in bad else done(2 + behind + draw.gauss(0, sd), kl_ratio_median=1.0)

    return decided("finals", config, decisions, answer)["tracks"][TRACK]


def line_of(track):
    return {line["name"]: line for line in track["verdict"]}.get("lr_window")


@pytest.mark.parametrize(
    ("gap", "sd", "verdict"), [(0.0, 0.001, "pass"), (0.1, 0.001, "fail"), (0.02, 0.02, "undecided")]
)
def test_the_window_is_ebc_at_its_highest_rate_against_its_lowest(gap, sd, verdict):
    track = judged(gap, sd=sd)
    line = line_of(track)
    assert line["verdict"] == verdict
    assert line["question"] == "test loss of EBC at LR ×8 ≤ EBC at ×2 + 0.02"
    assert (line["arm"], line["reference"]) == (track["roles"]["ebc_x8"], track["roles"]["ebc_x2"])
    assert line["difference"]["mean"] == pytest.approx(gap, abs=3 * sd)
    plain = line["plain"]["difference"]["mean"]
    assert plain == pytest.approx(1.0, abs=3 * sd)
    assert line["figure"].endswith(f"; without EBC {plain:+.4f} nats")


def test_a_window_in_which_ebc_diverges_is_a_fail_and_a_plain_arm_that_does_is_said():
    assert line_of(judged(0.0, bad=("ebc_x8",)))["verdict"] == "fail"
    line = line_of(judged(0.0, bad=("control_x8",)))
    assert line["verdict"] == "pass"
    assert line["figure"].endswith("without EBC 3 of 3 runs diverged")
    six = ("seeds=[0,1,2,3,4,5]",)  # so many that ranks could decide, by differences that are all zero
    both = judged(0.0, bad=("ebc_x2", "ebc_x8"), overrides=six)
    assert both["lr_windows"]["ebc"]["difference"]["alone"] == "misses"
    assert line_of(both)["verdict"] == "fail"


def test_the_window_spans_the_lowest_and_the_highest_of_any_rates_however_they_are_written():
    many = arms("baseline", "control", "ebc_x8.0", "ebc_x2", "ebc_x16", "ebc_x0.5", "control_x2")
    track = judged(0.0, overrides=(many,))
    assert track["lr_windows"]["ebc"]["scales"] == [0.5, 16]
    assert "control" not in track["lr_windows"]
    assert "without EBC" not in line_of(track)["figure"]
    rates = [track["arms"][track["roles"][role]]["lr"] for role in ("ebc_x0.5", "ebc_x8.0", "ebc_x16")]
    assert rates == [1e-3, 16e-3, 32e-3]


def test_a_control_chosen_by_a_near_tie_of_one_seed_is_not_beaten_by_what_that_luck_may_explain():
    """Of eight seeds in which EBC is ahead, beside a control that was chosen from these losses."""
    config, decisions = before("seeds=[0,1,2,3,4,5,6,7]")
    draw = random.Random(0)

    def ahead(s):
        return done(2 - 0.006 * s.role.startswith("ebc") + draw.gauss(0, 0.01))

    _, specs, results = played("finals", config, decisions, ahead)

    def against_control(losses):
        earlier = copy.deepcopy(decisions)
        swept, calibrated = (earlier[stage]["tracks"][TRACK] for stage in ("lr_sweep", "calibrate"))
        [point, *_] = swept["control"]["grid"]
        swept["control"]["grid"] = [{**point, "val_loss": x} for x in (*losses, None)]
        first, second = earlier["lr_sweep"]["candidates"][:2]  # nothing else was chosen by a near tie
        first["val_loss"], second["val_loss"] = 2.0, 2.5
        swept["ranked"] = [first["run_id"], second["run_id"]]
        calibrated["ranked_losses"] = {"0": 2.0, "1": 2.5}
        track = finals.STAGE.decide(config, specs, results, earlier)["tracks"][TRACK]
        return next(line for line in track["verdict"] if line["name"] == "best_ebc_no_worse_than_control")

    clear, near = against_control((2.0, 2.5)), against_control((2.0, 2.015, 2.015, 2.015))
    assert clear["beats"]
    assert not near["beats"]
    assert near["difference"]["mean"] == clear["difference"]["mean"]
    assert "luck of the tuning included" in near["figure"]
    assert "luck" not in clear["difference"]


# -- what would decide an undecided line ---------------------------------------------------------------------

AROUND_002 = (0.0, 0.015, 0.03, 0.035)  # nats by seed, the margin 0.01 not told apart


def undecided(*differences, luck=NO_LUCK, margin=0.01):
    arm = {str(seed): 2 + x if x > -math.inf else 2.0 for seed, x in enumerate(differences)}
    reference = {seed: math.inf if differences[int(seed)] == -math.inf else 2.0 for seed in arm}
    d = paired(arm, reference, margin=margin, comparisons=2, luck=luck)
    assert d["judged"] == "undecided"
    return {
        "name": "x",
        "question": "?",
        "verdict": "undecided",
        "figure": "",
        "joint": True,
        "difference": d,
    }


def test_the_number_of_seeds_that_would_decide_a_line_is_in_its_remedy_and_in_a_command(own_copy):
    line = undecided(*AROUND_002)
    beyond = paired({str(s): x for s, x in enumerate(AROUND_002)}, dict.fromkeys("0123", 0.01), comparisons=2)
    count = seeds_needed(beyond)  # of what it exceeds the margin by, which 0 is then the limit of
    assert remedy(line) == f"about {count} seeds, fresh ones in another study,"
    study = own_copy[1]
    found = {"finals": {"stage": "finals", "tracks": {TRACK: {"verdict": [line]}}}}
    seeds, name = shlex.split(deciding(study, study.header(), found))[3:5]
    fresh = json.loads(seeds.removeprefix("seeds="))
    assert len(fresh) == count
    assert not {*fresh} & {*study.header()["config"]["seeds"]}
    assert name == f"study.name=done_seeds_{fresh[0]}_to_{fresh[-1]}"
    assert decides_all(ways_to_decide(found))
    lines = found["finals"]["tracks"][TRACK]["verdict"]
    lines.append(undecided(*AROUND_002, luck=Luck(0.02, 9.0)))
    assert shlex.split(deciding(study, study.header(), found))[3:5] == [seeds, name]
    assert not decides_all(ways_to_decide(found))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (undecided(*AROUND_002, luck=Luck(0.02, 9.0)), "the record does not tell the luck of the one choice"),
        (undecided(0.0, math.inf, -math.inf), "how many is not known: runs that diverge have no mean"),
        (undecided(0.0), "how many is not known: one seed shows no spread"),
        (undecided(0.0099, 0.0101, -0.01, 0.03), "more than 200 seeds"),
    ],
    ids=["luck", "diverged", "one seed", "too many"],
)
def test_where_no_number_is_known_the_remedy_says_why(line, words):
    assert words in remedy(line)
