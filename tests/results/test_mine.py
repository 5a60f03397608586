"""Of a study that asks about an optimizer of one's own: its answer, its arms, what they are compared with."""

import pytest
from support.recorded import EVIDENCE

import ebc_lab


@pytest.fixture(scope="module")
def study():
    return ebc_lab.load(EVIDENCE / "cautious.zip")


def test_the_answer_is_about_mine(study):
    assert study.answer.startswith("cautious against ")
    [question] = study.verdict.to_dict("records")
    assert question["name"] == "cautious"
    assert question["question"].startswith("Is cautious better than ")
    assert question["verdict"] in ("better", "worse", "level", "undecided")
    told = study.differences().query("family == 'mine'").set_index("reference")
    assert set(told["arm"]) == {"cautious"}
    answer = study.decisions["ablation"]["tracks"]["adam_none"]["answers"]["cautious"]
    for other, difference in answer["against"].items():
        assert told.loc[other, "mean"] == pytest.approx(difference["mean"])
        assert told.loc[other, "joint_high"] == pytest.approx(difference["joint_high"])
    assert told.index[told["rival"]].tolist() == [answer["rival"]]


def test_its_arms_are_marked_and_have_its_own_name(study):
    arms = study.arms().query("stage == 'ablation'").set_index("arm")
    assert arms.index[arms["mine"]].tolist() == ["cautious"]
    every = study.runs().query("kind == 'train' and stage == 'tune'")["role"]
    tuned = study.arms().query("stage == 'tune'")
    assert set(tuned[tuned["mine"]]["optimizer"]) == {"cautious"}
    assert len(tuned[tuned["mine"]]) < len(tuned)
    assert "cautious" in set(every)
    assert arms.loc["cautious", "optimizer"] == "cautious"
    assert arms["lr_schedule"].notna().all()
    assert not any("custom" in name for name in study.runs()["arm"])


def test_a_measurement_of_time_is_not_called_like_its_arm(study):
    runs = study.runs()
    timed = runs.query("kind == 'step'")
    assert len(timed) > 0
    assert timed["test_loss"].isna().all()
    assert timed["arm"].str.endswith(" (time of a step)").all()
    assert not set(timed["arm"]) & set(runs.query("kind == 'train'")["arm"])
