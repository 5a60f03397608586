"""Is mine better? What a suite says of the arms that it was made for."""

import random
import re
from dataclasses import replace

import pytest
from support.played import DECIDED, DIVERGED, config_of, done, played

from ebc_lab.config.compose import compose
from ebc_lab.config.errors import UserError
from ebc_lab.report.kinds import Evidence, suite
from ebc_lab.report.text import glance, words
from ebc_lab.results import tables
from ebc_lab.study.inspect.reproduce import deciding
from ebc_lab.study.stages import ablation
from ebc_lab.study.stages.stage import stage_of
from ebc_lab.study.stages.statistics import paired, seeds_needed
from ebc_lab.study.stages.verdict import sentence

SCATTERED = (0.03, -0.02, 0.04, -0.01, 0.02)  # by seed
POINT = {"lr": 4e-3, "warmup_share": 0.1667, "schedule": "trapezoid"}


def decision(
    offsets,
    *,
    tuned=None,
    seeds=(0, 1, 2, 3, 4),
    mine=("muon",),
    answer=None,
    untuned=None,
    luck=None,
    changed=None,
):
    """An ablation whose arms have these test losses beside a common one of each seed, and a little noise, or
    those of `answer`. `changed`: arm -> its other fields."""
    config = config_of("study=optimizers", f"seeds={list(seeds)}".replace(" ", ""))
    suite = config.ablation
    arms = {name: suite.arms.get(name, suite.arms["adamw"]) for name in offsets}
    arms |= {
        n: replace(a, settings={"optimizer": {"name": n}}) for n, a in arms.items() if n not in suite.arms
    }
    arms |= {n: replace(arms[n], **fields) for n, fields in (changed or {}).items()}
    config = replace(config, ablation=replace(suite, arms=arms, mine=replace(suite.mine, arms=list(mine))))
    losses = tuned or dict.fromkeys(offsets, 2.0)
    points = {n: {"point": POINT, "val_loss": losses[n], "luck": luck or {}} for n in offsets}
    for name, why in (untuned or {}).items():
        points[name] |= {"untuned": why, "val_loss": None}
    earlier = DECIDED | {"tune": {"tracks": {"adam_none": {"arms": points}}, "inputs_sha256": "y"}}
    draw = random.Random(0)

    def any_run(spec):
        if spec.kind != "train":
            ratio = 1.25 if spec.arm == "adamw" else 1.5
            return {"outcome": "completed", "step_ratio": ratio, "step_ratio_iqr": [1.1, 1.3]}
        usual = done(2 + 0.1 * spec.run.seed + offsets[spec.role] + draw.gauss(0, 0.002))
        return answer(spec) if answer else usual

    _, specs, results = played("ablation", config, earlier, any_run)
    return stage_of("ablation").decide(config, specs, results, earlier)


def answer_of(found, label="muon"):
    return found["tracks"]["adam_none"]["answers"][label]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("offset", "verdict"), [(-0.05, "better"), (0.05, "worse"), (0.0, "level"), (-0.004, "better")]
)
def test_an_arm_is_better_worse_or_level_and_the_sentence_says_so(offset, verdict):
    own = answer_of(decision({"adamw": 0.0, "muon": offset}))
    assert own["verdict"] == verdict
    assert own["sentence"].startswith("muon against adamw: ")
    assert f": {verdict}" in own["sentence"]
    assert own["seeds_needed"] is None
    assert ("by less than 0.01 nats" in own["sentence"]) == (offset == -0.004)


def test_the_rival_is_the_best_of_the_others_by_its_tuning_and_not_by_the_test():
    found = decision(
        {"adamw": 0.0, "lion": -0.1, "muon": -0.05}, tuned={"adamw": 1.9, "lion": 2.0, "muon": 2.0}
    )
    own = answer_of(found)
    assert own["rival"] == "adamw"
    assert own["verdict"] == "better"
    assert "muon against adamw, the best of the others by validation: −0.04" in own["sentence"]
    assert {name: d["verdict"] for name, d in own["against"].items()} == {"adamw": "better", "lion": "worse"}
    assert {d["comparisons"] for d in own["against"].values()} == {2}


def test_several_of_mine_are_not_compared_with_each_other_and_share_the_error():
    found = decision({"adamw": 0.0, "muon": -0.05, "lion": 0.05}, mine=("muon", "lion"))
    track = found["tracks"]["adam_none"]
    assert track["mine"] == ["muon", "lion"]
    assert {tuple(a["against"]) for a in track["answers"].values()} == {("adamw",)}
    assert track["answers"]["lion"]["difference"]["comparisons"] == 2
    told = ablation.STAGE.headline(track)
    assert told.count("against adamw") == 2


def test_an_arm_of_mine_is_compared_with_the_one_that_its_versus_names_too():
    as_tuned = {"settings": {"optimizer": {"name": "muon"}}, "tune": {}, "tuned_as": "muon", "versus": "muon"}
    found = decision(
        {"adamw": 0.0, "muon": -0.05, "clipped": -0.1, "longer": -0.2},
        mine=("longer", "muon", "clipped"),
        changed={"clipped": as_tuned, "longer": as_tuned | {"steps": 2}},
    )
    track = found["tracks"]["adam_none"]
    longer, clipped = (answer_of(found, label) for label in ("longer", "clipped"))
    assert longer["sentence"].startswith("longer (2× steps) against muon: −0.1")
    assert (longer["rival"], longer["verdict"], [*longer["against"]]) == ("muon", "better", ["muon"])
    assert (clipped["rival"], [*clipped["against"]]) == ("adamw", ["adamw", "muon"])
    assert "5 seeds: better; against muon better: −0.0" in clipped["sentence"]
    assert {d["comparisons"] for own in track["answers"].values() for d in own["against"].values()} == {4}
    assert "every other arm, and with the one that its versus names, by" in found["rule"]
    assert set(words.asked(track)) == {"longer", "muon", "clipped"}
    table = glance.is_better("t", "muon", track, {})
    assert [row[0] for row in table.texts()] == ["muon", "adamw", "longer (2× steps)", "clipped"]
    assert track["transfer"] == [], "nothing was tuned again at another size"
    _, told, _, _ = suite.answer_of(track)
    assert told.endswith("2 are better than the best of the others, longer (2× steps) is better than muon.")
    several = {name: {**clipped["difference"]} for name in ("adamw", "soap", "lion", "muon")}
    assert "; against muon better: " in sentence("clipped", "adamw", several, "muon")


def test_undecided_names_the_seeds_that_would_decide_it():
    own = answer_of(
        decision(
            {"adamw": 0.0, "muon": 0.0},
            answer=lambda spec: done(2 + SCATTERED[spec.run.seed] * (spec.role == "muon")),
        )
    )
    assert own["verdict"] == "undecided"
    assert 15 < own["seeds_needed"] < 60
    assert own["seeds"] == list(range(own["seeds_needed"]))
    assert f"about {own['seeds_needed']} seeds would decide it" in own["sentence"]


def test_one_seed_is_undecided_and_nothing_is_guessed_from_it():
    own = answer_of(decision({"adamw": 0.0, "muon": 0.02}, seeds=(0,)))
    assert own["verdict"] == "undecided"
    assert own["seeds_needed"] is own["seeds"] is None
    assert own["sentence"].endswith("1 seed: undecided, one seed: no interval")


def test_every_comparison_that_is_undecided_says_what_would_decide_it():
    def uneven(spec):
        """Muon is worse than adamw by a constant, and scattered about lion."""
        return done(2 + {"adamw": 0.0, "muon": 0.1}.get(spec.role, 0.1 + SCATTERED[spec.run.seed]))

    tuned = {"adamw": 1.9, "lion": 2.0, "muon": 2.0}
    own = answer_of(decision(dict.fromkeys(tuned, 0.0), tuned=tuned, answer=uneven))
    needed = own["against"]["lion"]["seeds_needed"]
    assert needed > 5
    assert own["against"]["adamw"]["seeds_needed"] is own["seeds_needed"] is None
    assert ": worse; against lion undecided: −0.0120 [" in own["sentence"]
    assert own["sentence"].endswith(f", about {needed} seeds would decide it")
    assert len(own["sentence"]) <= 250


def test_an_arm_that_could_not_be_tuned_has_no_verdict_but_a_sentence(results_schema):
    why = "no rate between 3e-08 and 0.008 completes"
    found = decision({"adamw": 0.0, "muon": 0.0}, untuned={"muon": why})
    own = answer_of(found)
    assert own["verdict"] == "untuned"
    assert own["sentence"] == f"muon could not be tuned: {why}"
    assert set(found["tracks"]["adam_none"]["arms"]) == {"adamw"}
    assert any("muon could not be tuned, and was not trained" in note for note in found["notes"])
    assert suite.answer_of(found["tracks"]["adam_none"])[1] == "muon could not be tuned."
    assert list(tables.verdict({"ablation": found})["verdict"]) == ["untuned"]
    results_schema.validate({"study": "mine", "corpus": "a text", "warning": None} | found)


def test_the_luck_of_the_tuning_widens_the_interval_of_arms_that_were_tuned_apart():
    known = decision({"adamw": 0.0, "muon": -0.02})
    lucky = decision({"adamw": 0.0, "muon": -0.02}, luck={"sd": 0.02, "freedom": 8})
    sure, unsure = (answer_of(found) for found in (known, lucky))
    assert (sure["verdict"], unsure["verdict"]) == ("better", "undecided")
    assert unsure["difference"]["luck"]["sd"] == pytest.approx(0.02 * 2**0.5)
    assert unsure["sentence"].endswith("undecided, neither 200 seeds nor 20 tuning seeds would decide it")
    noisy = {**unsure["difference"], "sd": 1.0, "verdict": "undecided", "seeds_needed": None}
    said = sentence("muon", "adamw", {"adamw": noisy})
    assert said.endswith("undecided, more than 200 seeds would be needed")
    assert "widened by what other tuning seeds would have chosen" in lucky["rule"]
    assert lucky["tracks"]["adam_none"]["arms"]["muon"]["difference"]["luck"] == unsure["difference"]["luck"]


def test_where_luck_keeps_it_open_the_tuning_seeds_that_would_decide_it_are_named(own_copy):
    """By the power of the test whose luck has fallen with the root of the tuning seeds."""
    _, study = own_copy
    why = "undecided, too much luck of the tuning for seeds alone: about "

    def scattered(spec):
        return done(2 + (SCATTERED[spec.run.seed] - 0.05) * (spec.role == "muon"))

    for answer, told, more in (
        (None, "6 tuning seeds (9 more of finalists)", {"tune_seeds": 6, "final_seeds": 9, "seeds": 5}),
        (scattered, "13 tuning seeds (20 more of finalists) and 12 seeds", {"seeds": 12}),
    ):
        found = decision({"adamw": 0.0, "muon": -0.05}, luck={"sd": 0.02, "freedom": 8}, answer=answer)
        own = answer_of(found)
        assert own["sentence"].endswith(f"{why}{told} would decide it")
        needed = own["difference"]["tuning_needed"]
        assert needed == needed | more
        assert own["seeds_needed"] is None
        typed = deciding(study, study.header(), {"ablation": found})
        assert (
            f"tune.seeds={needed['tune_seeds']} tune.final_seeds={needed['final_seeds']} study.name=" in typed
        )
        fresh = re.search(r"seeds=\[([\d,]+)\]' ", typed)[1].split(",")
        assert len(fresh) == needed["seeds"]
        first = study.header()["config"]["study"]["stage_seed"]
        assert not {*map(int, fresh)} & {*range(first, first + needed["tune_seeds"] + needed["final_seeds"])}


def test_an_arm_that_diverges_is_judged_by_rank_and_never_averaged():
    def own_with(lost):
        def answer(spec):
            muon = spec.role == "muon"
            return DIVERGED if muon and spec.run.seed in lost else done(2.0 - muon)

        return answer_of(decision({"adamw": 0.0, "muon": 0.0}, answer=answer))

    one = own_with({1})
    assert one["verdict"] == "undecided"
    assert "diverged on 1 of 5 seeds" in one["sentence"]
    assert own_with({0, 1, 2, 3, 4})["verdict"] == "worse"


def test_the_cost_of_a_step_is_told_beside_the_references():
    track = decision({"adamw": 0.0, "muon": 0.0})["tracks"]["adam_none"]
    # both were measured in turns with Adam, muon at 1.5 and the reference at 1.25 times its time
    assert track["steps_cost"]["muon"] == pytest.approx({"ratio": 1.2, "low": 0.88, "high": 1.04})
    assert track["steps_cost"]["adamw"]["ratio"] == 1.0


def test_seeds_needed_is_what_the_power_of_the_test_says():
    """Ten differences of mean 1 sd: by the textbook 80% power at 5% take 10 pairs, at two comparisons 13."""
    values = [1 + (-1) ** i for i in range(2)]
    difference = paired({str(i): x for i, x in enumerate(values)}, {"0": 0.0, "1": 0.0})
    assert seeds_needed({**difference, "mean": 1.0, "sd": 1.0}) == 10
    assert seeds_needed({**difference, "mean": 1.0, "sd": 1.0, "comparisons": 2}) == 13
    assert seeds_needed({**difference, "mean": 0.0, "sd": 1.0}) is None
    assert seeds_needed({**difference, "mean": 0.0, "sd": 0.01, "margin": 0.01}) == 13


OWN = "import torch\n\nclass Cautious(torch.optim.Adam):\n    pass\n\nclass Second(Cautious):\n    pass\n"


@pytest.fixture
def own_file(tmp_path, monkeypatch):
    (tmp_path / "compared_opt.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)


@pytest.mark.thorough
def test_mine_is_refused_where_there_is_no_place_for_it(own_file):
    with pytest.raises(
        UserError, match="study=optimizers, study=ladder, study=stabilizers, study=schedules or"
    ):
        compose(["scale=smoke", "mine=compared_opt:Cautious"])
    with pytest.raises(UserError, match="goes with a study"):
        compose(["mine=compared_opt:Cautious"], study=False)
    with pytest.raises(UserError, match="names every arm"):
        compose(["study=optimizers", "ablation.mine.arms=[adamw,muon]"])


# -- arms of which nothing ended ----------------------------------------------------------------------------


def failing(label):
    """What a play answers where every run of this arm fails."""
    draw = random.Random(1)

    def answer(spec):
        if spec.role == label:
            return {"outcome": "failed", "cause": "ramps.py:3: TypeError: no flor."}
        return done(2 + draw.gauss(0, 0.002))

    return answer


def test_an_arm_without_a_finished_run_is_said_first_and_has_no_verdict():
    found = decision({"adamw": 0.0, "muon": 0.0, "lion": 0.0}, mine=(), answer=failing("lion"))
    track = found["tracks"]["adam_none"]
    lost = "lion: no run ended (5 failed: ramps.py:3: TypeError: no flor)"
    assert track["arms"]["lion"]["difference"] is None
    assert track["arms"]["muon"]["difference"]["comparisons"] == 1
    [line] = stage_of("ablation").headlines(found)
    assert line.startswith(f"{lost}; 2 arms; ")
    assert "lion" not in line.removeprefix(lost)
    _, sentence, findings, _ = suite.answer_of(track)
    assert findings[0].startswith(lost)
    assert "of 2 arms" not in sentence
    told = tables.verdict({"ablation": found}).to_dict("records")
    assert [row["name"] for row in told] == ["muon"]
    mine = decision({"adamw": 0.0, "muon": 0.0}, answer=failing("muon"))
    assert answer_of(mine)["verdict"] == "undecided"
    [line] = stage_of("ablation").headlines(mine)
    assert line == "muon: no run ended (5 failed: ramps.py:3: TypeError: no flor)"  # once
    _, sentence, findings, _ = suite.answer_of(mine["tracks"]["adam_none"])
    assert (sentence, findings) == ("muon is not compared.", [f"{line}."])
    old = mine["tracks"]["adam_none"] | {"answers": {}}  # as earlier versions recorded it
    assert suite.answer_of(old)[1:3] == ("No answer: no run of these arms completed.", [f"{line}."])


ON = "no other arm of its size and text has a finished run"


@pytest.mark.parametrize(
    ("lists", "why"),
    [
        ({"width_scale": 2.0}, "it has 2× width, and the others have the suite's size"),
        ({"settings": {"final_windows": 4}}, "it was judged on another text, or on a part of the split"),
        ({}, ON),
    ],
)
def test_an_arm_of_mine_that_no_other_is_like_is_told_why_it_is_not_compared(lists, why, results_schema):
    """It is asked about by name, so silence would leave the question open."""
    config = config_of("study=optimizers", "seeds=[0,1]", "ablation.mine.arms=[muon]")
    arms = {n: replace(a, tune={}) for n, a in config.ablation.arms.items()}
    settings = {**arms["muon"].settings, **lists.get("settings", {})}
    arms["muon"] = replace(arms["muon"], **{**lists, "settings": settings})
    config = replace(config, ablation=replace(config.ablation, arms=arms))
    failed = {"outcome": "failed", "cause": "no flour"}
    others = failed if why == ON else done(2.0)
    _, specs, results = played(
        "ablation", config, DECIDED, lambda s: done(1.9) if s.role == "muon" else others
    )
    found = stage_of("ablation").decide(config, specs, results, DECIDED)
    track = found["tracks"]["adam_none"]
    own = answer_of(found)
    assert (own["verdict"], own["rival"], own["against"]) == ("undecided", None, {})
    assert own["sentence"] == f"muon is not compared: {why}"
    assert (track["mine"], words.asked(track)) == (["muon"], [])
    assert own["sentence"] in stage_of("ablation").headlines(found)[0]
    shown = Evidence(found, config, results=results)
    [answer] = suite.KIND.answers(shown)
    assert (answer.sentence, answer.judged) == ("muon is not compared.", "undecided")
    assert f"{own['sentence']}." in answer.findings
    assert suite.KIND.tables(shown)
    results_schema.validate({"study": "mine", "corpus": "a text", "warning": None} | found)


def test_of_many_arms_those_without_a_rival_are_counted_by_themselves():
    def answer(spec):
        return (
            {"outcome": "failed", "cause": "x"} if spec.role == "soap" else done(2 - (spec.role != "adamw"))
        )

    mine = ("muon", "lion", "soap", "scion")
    offsets = dict.fromkeys(("adamw", *mine), 0.0)
    track = decision(offsets, mine=mine, answer=answer, untuned={"scion": "no rate completes"})["tracks"]
    sentence = suite.answer_of(track["adam_none"])[1]
    counts = "2 are better than the best of the others, 1 is not compared, 1 could not be tuned"
    assert sentence == f"Of 4 arms on this model, batch and length, {counts}."


def test_a_suite_without_mine_says_which_arms_are_lower_or_how_many_seeds_would_decide_and_names_no_best():
    track = decision({"adamw": 0.0, "muon": -0.05}, mine=())["tracks"]["adam_none"]
    assert (track["mine"], track["answers"]) == ([], {})
    assert "best" not in ablation.STAGE.headline(track)
    assert ablation.STAGE.headline(track).endswith("lower: muon")
    found = decision({"adamw": 0.0, "muon": 0.02}, mine=(), seeds=(0, 1))
    arm = found["tracks"]["adam_none"]["arms"]["muon"]
    needed = arm["difference"]["seeds_needed"]
    assert needed > 2
    [line] = stage_of("ablation").headlines(found)
    assert line.startswith("2 arms; ")
    assert f"not told apart: muon (about {needed} seeds would decide it)" in line
    findings = suite.answer_of(found["tracks"]["adam_none"])[2]
    assert any(f"muon ({needed})" in line for line in findings)
    [row] = tables.verdict({"ablation": found}).to_dict("records")
    assert (row["verdict"], row["question"]) == ("undecided", "Is muon better than adamw?")


def test_a_comparison_is_in_the_differences_once():
    told = tables.differences({"ablation": decision({"adamw": 0.0, "muon": 0.05, "lion": 0.02})})
    pairs = list(zip(told["arm"], told["reference"], strict=True))
    assert len(pairs) == len(set(pairs)) == 3
    assert "sigmas" not in told.columns


def test_each_of_mine_is_tuned_like_the_others_by_the_template(own_file):
    mine = "mine=[compared_opt:Cautious,compared_opt:Second]"
    asked = ["study=optimizers", mine, "ablation.mine.template.tune.lr=[2e-5,4e-5,8e-5]"]
    arms = compose(asked).ablation.arms
    for name in ("cautious", "second"):
        assert arms[name].tune["lr"] == [2e-5, 4e-5, 8e-5]
        assert arms[name].tune["schedule"] == arms["adamw"].tune["schedule"]
    assert arms["adamw"].tune["lr"] == [2e-3, 4e-3, 8e-3]
    own = compose(["study=calibrated", mine, "profiles.mine.template.grid.optimizer.lr=[2e-5,4e-5]"]).profiles
    assert own.methods["second"].grid["optimizer.lr"] == [2e-5, 4e-5]
