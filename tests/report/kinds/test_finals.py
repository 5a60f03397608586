"""What the finals answer: no more than their verdict says, and green only where nothing is open or failed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from support.recorded import read_decisions

from ebc_lab.report.kinds.finals import KIND, answer_of
from ebc_lab.report.kinds.kind import Answer, Evidence
from ebc_lab.report.page import evidence
from ebc_lab.study.stages.statistics import paired

JUDGED = ("beats", "meets", "misses", "undecided")


def difference(judged: str) -> dict[str, Any]:
    return {"margin": 0.01, "alone": judged, "judged": judged}


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
PLAIN = (None, *map(difference, JUDGED))


@pytest.mark.parametrize("combination", list(itertools.product(JUDGED, JUDGED, JUDGED)))
def test_every_verdict_has_an_answer_that_claims_no_more_than_it(combination):
    window, control, baseline = combination
    for plain in PLAIN:
        judged, sentence = answer_of(lines(window, control, baseline, plain), SPAN)
        assert judged in JUDGED
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


def answer(change: Callable[[dict[str, Any]], Any] = lambda track: None) -> Answer:
    """What the recorded `default` answers; `change`: of its finals."""
    decision: Any = read_decisions("default")["finals"]
    [track] = decision["tracks"].values()
    change(track)
    config: Any = SimpleNamespace(study=SimpleNamespace(band=(0.5, 0.7)), finals=SimpleNamespace(margin=0.01))
    [found] = KIND.answers(Evidence(decision, config))
    return found


def test_each_comparison_is_a_line_with_its_figures_and_the_plain_optimizers_own():
    _, control, window, tuned = answer().findings
    assert "0.001 nats higher (95% interval −0.009 to +0.012" in window
    assert "without EBC, on the fair control’s schedule, 0.431 nats higher" in window
    assert "joint over 2 comparisons" in control
    assert "δ*" in tuned

    diverged = {"mean": None, "median": None, "method": "rank", "diverged": {"arm": 3, "reference": 1}}

    def windows(track):
        return next(line for line in track["verdict"] if line["name"] == "lr_window")

    lost = answer(lambda track: windows(track)["plain"]["difference"].update(diverged)).findings[2]
    assert "3 of 3 runs diverged at ×8" in lost
    assert "1 of 3 runs diverged at ×2" in lost
    broken = answer(lambda track: windows(track)["difference"].update(diverged)).findings[2]
    assert "Diverged: 3 of the arm's, 1 of the reference's runs" in broken


@pytest.mark.parametrize("seeds", [(3, 5), (5, 3), (4,), ()])
def test_an_answer_was_judged_on_the_most_seeds_of_its_comparisons(seeds):
    found = answer()
    judging: Any = [{**found.judging[0], "seeds": count} for count in seeds]
    shown = evidence._answer(replace(found, judging=judging))
    assert shown["seeds"] == max(seeds, default=0)
    assert len(shown["detectable"]) == len(seeds)


def test_a_fair_control_that_is_worse_than_the_baseline_is_warned_of():
    worse = paired({"0": 2.3, "1": 2.31}, {"0": 2.0, "1": 2.02})
    warned = answer(lambda track: track["differences"]["baseline"].update({track["roles"]["control"]: worse}))
    assert "worse than the baseline" in warned.warning
    assert not answer().warning
