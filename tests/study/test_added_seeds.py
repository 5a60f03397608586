"""Seeds that are added after an answer: the command that is printed takes fresh ones; where some are judged
again, however that came about, the answer says so and its error is halved."""

import json
import shlex
import shutil
from dataclasses import replace
from unittest import mock

import pytest
from support.called import SMALLEST, answered

import ebc_lab
from ebc_lab.report.conclude import concluding, report
from ebc_lab.study.autopilot import autopilot
from ebc_lab.study.stages.compare_arms import losses, seeds_of
from ebc_lab.study.stages.statistics import paired
from ebc_lab.study.store.replay import replay
from ebc_lab.study.store.study import Study, study_of

ASKED = [
    *SMALLEST,
    *("dtype=float32", "threads_per_run=1", "compile=off", "launcher=inline"),
    *("study.stages=[lr_sweep,ablation]", "lr_sweep.optimizers=[adam]", "lr_sweep.grids={adam:[1e-2]}"),
    *("lr_sweep.steps=12", "lr_sweep.max_extensions=0", "ablation.steps=12", "ablation.step_cost=false"),
    *("+ablation.arms.first={about:first}", "ablation.reference=first", "ablation.mine.arms=[second]"),
    "+ablation.arms.second={about:second,settings:{optimizer:{eps:1e-3}}}",
]
AGAIN = "seeds were judged again after an answer had been seen"
OTHERS = "the same had been asked before of other seeds (mine, 2 seeds)"


def asked(text_file, *more):
    return ["autopilot", *ASKED, f"data.file={text_file}", *more]


@pytest.fixture(scope="module")
def undecided(text_file, once):
    """(folder of a study of 2 seeds that ended undecided, what the terminal said)."""

    def make(folder):
        with mock.patch("ebc_lab.report.conclude._draw"):
            return folder, answered(*asked(text_file, "study.name=mine"), cwd=folder).stdout

    return once("undecided", make)


@pytest.fixture
def place(undecided, tmp_path, undrawn):
    shutil.copytree(undecided[0] / "outputs", tmp_path / "outputs")
    return tmp_path


def study_at(place, name):
    return Study(place / "outputs/ebc_ablation" / name)


def decision_of(study):
    return study.decisions()["ablation"]


def interval(study):
    d = decision_of(study)["tracks"]["adam_none"]["answers"]["second"]["difference"]
    return d["joint_low"], d["joint_high"]


def expected(study, looks):
    """The interval at 95%, its error divided by `looks`, from all the seeds of the two arms."""
    arms = decision_of(study)["tracks"]["adam_none"]["arms"]
    results = study.results_of(decision_of(study))
    found = paired(losses(arms["second"], results), losses(arms["first"], results), looks=looks)
    return found["joint_low"], found["joint_high"]


@pytest.mark.thorough
def test_the_command_that_is_printed_rests_on_fresh_seeds_alone(undecided, place):
    [line] = [line for line in undecided[1].splitlines() if line.startswith("decide")]
    told = answered(*shlex.split(line)[2:], cwd=place).stdout
    study = study_at(place, "mine_seeds_2_to_5")
    assert seeds_of(decision_of(study)) == [2, 3, 4, 5]
    assert interval(study) == expected(study, looks=1)
    assert OTHERS in " ".join(told.split())
    assert AGAIN not in told
    assert ebc_lab.load(study.root).verdict.attrs["looks"] == []
    first = study_at(place, "mine")
    report(first)  # whose page asks for seeds that nobody has used
    assert "seeds=[6,7,8,9]" in first.page_file.read_text()
    assert "earlier" not in first.header()


@pytest.mark.thorough
@pytest.mark.parametrize("how", ["by hand", "others", "force"])
def test_seeds_that_are_judged_again_are_said_and_corrected(place, text_file, how):
    name, more = ("mine", ["--force"]) if how == "force" else ("hand", [])
    seeds = [1, 2] if how == "others" else [0, 1, 2]
    own = [f"seeds={seeds}".replace(" ", ""), f"study.name={name}", "--json", *more]
    told = json.loads(answered(*asked(text_file, *own), cwd=place).stdout)
    study = study_at(place, name)
    assert told["looks"] == [2]
    assert seeds_of(decision_of(study)) == seeds
    assert interval(study) == expected(study, looks=2)
    assert "97.5% intervals" in decision_of(study)["rule"]
    if how == "by hand":
        shutil.rmtree(study_at(place, "mine").root)
    report(study)
    for text in (study.page_file.read_text(), (study.root / "ablation.md").read_text()):
        assert f"{AGAIN} (mine, 2 seeds, {len({0, 1} & {*seeds})} of them here)" in text
        assert "divided by 2: 97.5% instead of 95%" in text
    assert ebc_lab.load(study.root).verdict.attrs["looks"] == [2]
    assert replay(study)["same"]


@pytest.mark.thorough
def test_every_answer_counts_once_and_none_that_came_later(place, text_file):
    def ask(name, seeds):
        answered(*asked(text_file, f"seeds={seeds}", f"study.name={name}"), cwd=place)
        return study_at(place, name)

    second = ask("second", "[0,1,2]")
    third = ask("third", "[0,1,2,3]")
    shutil.rmtree(study_at(place, "mine").root)
    twin = ask("twin", "[0,1,2,3]")  # the very same answer as the third, with whatever came before that
    assert [a["study"] for a in third.header()["earlier"]] == ["mine", "second"]
    assert interval(third) == expected(third, looks=4)
    assert interval(twin) == interval(third)
    before = second.decisions_file.read_bytes(), second.header()
    assert ask("second", "[0,1,2]").decisions_file.read_bytes() == before[0]
    assert second.header() == before[1]


def test_another_question_on_the_same_seeds_is_no_look(place, text_file):
    own = ["seeds=[0,1,2]", "study.name=longer", "ablation.steps=14"]
    told = json.loads(answered(*asked(text_file, *own, "--json"), cwd=place).stdout)
    assert told["looks"] == []
    assert interval(study_at(place, "longer")) == expected(study_at(place, "longer"), looks=1)


@pytest.mark.thorough
def test_the_finals_of_another_study_with_more_seeds_are_corrected(own_copy, undrawn):
    config, _ = own_copy
    seeds = config.seeds
    more = replace(config, seeds=[*seeds, max(seeds) + 1], study=replace(config.study, name="more"))
    autopilot(more, concluding())
    study = study_of(more)
    for track in study.decisions()["finals"]["tracks"].values():
        found = [d for family in track["differences"].values() for d in family.values()]
        assert {d["looks"] for d in found} == {2}
    assert AGAIN in (study.root / "summary_final.md").read_text()
