"""What the finals answer: no more than their verdict says, and green only where nothing is open or failed."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from ebc_lab.report.kinds.finals import KIND, answer_of
from ebc_lab.report.kinds.kind import Evidence
from ebc_lab.study.stages.statistics import paired

JUDGED = {"beats": (-0.1, -0.15), "meets": (0.001, -0.004), "misses": (0.2, 0.15), "undecided": (0.01, -0.3)}
DIVERGED: dict[str, Any] = {
    "mean": None,
    "method": "rank",
    "median": None,
    "diverged": {"arm": 3, "reference": 1},
}


def difference(judged: str, **changed: Any) -> dict[str, Any]:
    mean, low = JUDGED[judged]
    ends = {"low": low, "high": 2 * mean - low, "detectable": 0.03}
    joint = {f"joint_{end}": x for end, x in ends.items()}
    about = {"seeds": 3, "comparisons": 2, "looks": 1, "margin": 0.01, "method": "t", "mean": mean}
    return {**about, "median": mean, **ends, **joint, "alone": judged, "judged": judged, **changed}


def line(name: str, judged: str, **changed: Any) -> dict[str, Any]:
    verdict = {"beats": "pass", "meets": "pass", "misses": "fail"}.get(judged, judged)
    told = {"name": name, "verdict": verdict, "joint": name.startswith("best")}
    beats = judged == "beats" and name != "lr_window"
    return {**told, "beats": beats, "difference": difference(judged), **changed}


def lines(window: str, control: str, baseline: str, plain: Any) -> list[dict[str, Any]]:
    return [
        line("x2_no_worse_than_baseline", baseline),
        line("best_ebc_no_worse_than_control", control),
        line("lr_window", window, plain=plain and {"difference": plain}),
    ]


SPAN: Any = {"scales": [2.0, 8.0]}
PLAIN = (None, *map(difference, JUDGED), difference("misses", **DIVERGED))


@pytest.mark.parametrize("combination", list(itertools.product(JUDGED, JUDGED, JUDGED)))
def test_every_verdict_has_an_answer_that_claims_no_more_than_it(combination):
    window, control, baseline = combination
    for plain in PLAIN:
        judged, sentence = answer_of(lines(window, control, baseline, plain), SPAN)
        rates, schedule = sentence.rstrip(".").split("; ")
        assert rates.startswith("EBC keeps") == (window in ("beats", "meets"))
        assert ("does not keep" in rates) == (window == "misses")
        alike = plain is not None and plain["alone"] in ("beats", "meets") and window in ("beats", "meets")
        assert ("as the plain optimizer does" in rates) == alike
        assert ("EBC beats" in schedule) == (control == "beats")
        assert ("EBC loses" in schedule) == (control == "misses")
        assert (" it " in f" {sentence} ") <= ("shown to beat it" in sentence)  # else it could be loss or EBC
        if judged in ("beats", "meets"):
            assert not {"misses", "undecided"} & {window, control, baseline} - {baseline}
            assert baseline != "misses"
        if judged == "misses":
            assert control == "misses"


def test_a_failed_check_keeps_the_answer_from_being_green():
    good = lines("meets", "beats", "beats", None)
    assert answer_of(good, SPAN)[0] == "meets"
    assert answer_of([*good, {"name": "overhead", "verdict": "fail"}], SPAN)[0] == "undecided"
    assert answer_of(good[:2], None) == ("beats", "EBC beats a tuned schedule.")
    assert answer_of([], None)[1].startswith("No answer: ")


def findings(verdict: list[dict[str, Any]], span: Any = SPAN) -> list[str]:
    """What the answer says at length of finals with these lines."""
    own = {
        "roles": ["ebc_x2"],
        "ebc": True,
        "lr_scale": 2.0,
        "outcomes": {},
        "runs": {},
        "track": "adam_none",
    }
    verdict = [{**line, "arm": "a", "reference": "b", "figure": "", "question": ""} for line in verdict]
    windows = {"ebc": span} if span else {}
    track = {
        "verdict": verdict,
        "lr_windows": windows,
        "arms": {"a": own, "b": own},
        "roles": {"control": "b"},
    }
    config: Any = SimpleNamespace(study=SimpleNamespace(band=(0.5, 0.7)), finals=SimpleNamespace(margin=0.01))
    decision: Any = {"tracks": {"adam_none": {**track, "differences": {}}}}
    [answer] = KIND.answers(Evidence(decision, config))
    return list(answer.findings)


def test_each_comparison_is_a_line_with_its_figures_and_the_plain_optimizers_own():
    _, control, window, tuned = findings(lines("meets", "meets", "beats", difference("misses")))
    assert "0.001 nats higher" in window
    assert "0.200 nats higher" in window  # the plain optimizer
    assert "95% interval −0.004 to +0.006" in window
    assert "joint over 2 comparisons" in control
    assert "δ*" in tuned
    lost = findings(lines("meets", "meets", "beats", difference("misses", **DIVERGED)))[2]
    assert "3 of 3 runs diverged at ×8" in lost
    assert "1 of 3 runs diverged at ×2" in lost


def test_runs_of_ebc_that_diverged_are_said_instead_of_a_difference():
    broken = lines("misses", "undecided", "undecided", None)
    broken[2]["difference"] |= DIVERGED
    assert "Diverged: 3 of the arm's, 1 of the reference's runs" in findings(broken)[2]


def test_a_fair_control_that_is_worse_than_the_baseline_is_warned_of():
    losses = {"0": 2.3, "1": 2.31}, {"0": 2.0, "1": 2.02}
    worse, better = paired(*losses), paired(*losses[::-1])
    for pair, warned in ((worse, True), (better, False)):
        track = {"roles": {"control": "c"}, "differences": {"baseline": {"c": pair}}, "verdict": []}
        track |= {"lr_windows": {}, "arms": {"c": {"outcomes": {}, "runs": {}}}}
        config: Any = SimpleNamespace(study=SimpleNamespace(band=(0, 1)), finals=SimpleNamespace(margin=0.01))
        [answer] = KIND.answers(Evidence({"tracks": {"adam_none": track}}, config))  # type: ignore[typeddict-item]
        assert ("worse than the baseline" in answer.warning) == warned
