"""The final arms side by side: who dominates whom, who got there and when, what EBC costs, and the paired
differences."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from support.drawn import BASELINE, CONTROL, FALLING, drawn, words_of, write_study

from ebc_lab.report.pictures.forest import Row


def changed(root, change):
    """The figures after `change` was made to the finals' decision of the one track."""
    decisions = json.loads((root / "auto_decisions.json").read_text())
    change(decisions["finals"]["tracks"]["adam_none"])
    (root / "auto_decisions.json").write_text(json.dumps(decisions))
    return drawn(root, until="finals")


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    return drawn(write_study(tmp_path_factory.mktemp("study")), until="efficiency")


@pytest.mark.thorough
def test_efficiency_shows_who_reached_the_baselines_loss_in_all_three_units(figures):
    figure = figures["efficiency"]
    left, right = figure.axes[:2]
    told = [text.get_text() for text in left.texts]
    assert "30  (1 of 2 seeds)" in told
    assert sum(text.startswith("not reached by") for text in told) == 2
    assert "0.3 s  (1 of 2 seeds)" in [text.get_text() for text in right.texts]
    figure.draw_without_rendering()
    tokens = left.child_axes[0]
    assert np.allclose(tokens.get_xlim(), np.array(left.get_xlim()) * 32)


@pytest.mark.thorough
def test_the_finals_have_a_row_for_each_arm_against_both_references(tmp_path):
    def judge(track):
        for role in ("baseline", "control"):
            for difference in track["differences"][role].values():
                difference |= {
                    "joint_low": -0.02,
                    "joint_high": 0.22,
                    "comparisons": 2,
                    "judged": "undecided",
                }
        track["differences"]["baseline"][f"adam_none_{CONTROL}"]["judged"] = "misses"

    figure = changed(write_study(tmp_path), judge)["finals"]
    axes, words = figure.axes[0], words_of(figure)
    assert (
        "Against the baseline, of 2 arms 1 worse, 1 undecided; against the fair control, of 2 arms 2 "
        "undecided." in words
    )
    assert words.count("+0.100 ± 0.050") == 4
    assert "95% for all 2 comparisons together" in words
    assert any(text.startswith("+0.01: the target's margin") for text in words)
    spans = {
        (round(min(line.get_xdata()), 9), round(max(line.get_xdata()), 9))
        for line in axes.get_lines()
        if len(line.get_xdata())
    }
    assert {(0.05, 0.15), (-0.02, 0.22)} <= spans
    assert any(text == "plain ×2 (fair control) · misses" for text in words)


@pytest.mark.thorough
def test_ebc_stands_against_the_plain_arm_of_the_same_rate_too(tmp_path):
    def add(track):
        ebc, control = f"adam_none_{FALLING}", f"adam_none_{CONTROL}"
        track["roles"] |= {"ebc_x2": ebc, "control_x2": control}
        track["arms"][ebc]["roles"].append("ebc_x2")
        track["arms"][control]["roles"].append("control_x2")
        track["differences"]["rate"] = {ebc: {**track["differences"]["control"][ebc], "judged": "misses"}}

    figure = changed(write_study(tmp_path), add)["finals"]
    assert "Against the plain optimizer on the control’s schedule at the same rate" in words_of(figure)
    assert "against plain at its rate, of 1 arm 1 worse." in figure.alt


def test_a_difference_by_rank_has_its_median_and_may_reach_to_infinity(tmp_path):
    def diverge(track):
        ranked = {"seeds": 2, "method": "rank", "mean": None, "median": 0.2, "low": -0.1, "high": None}
        track["differences"]["baseline"][f"adam_none_{FALLING}"] = ranked | {
            "diverged": {"arm": 1, "reference": 0}
        }

    figure = changed(write_study(tmp_path, outcomes={(FALLING, 1): "diverged"}), diverge)["finals"]
    assert "+0.200 [−0.100, ∞]" in words_of(figure)
    figure.draw_without_rendering()


def test_limits_that_were_not_computed_are_none_and_those_beyond_all_ranks_infinite():
    arm = {"versus": "x", "difference": {"method": "rank", "median": 0.1, "low": None, "high": 0.4}}
    assert Row("a", arm, [], False).limits == (-math.inf, 0.4)
    arm = {"versus": "x", "difference": {"mean": 0.1, "low": None, "high": None}}
    assert Row("a", arm, [], False).limits == (0.1, 0.1)
    assert Row("a", arm, [], False).interval("joint_low", "joint_high") is None


def test_the_baseline_itself_is_never_compared_with_itself(figures):
    figure = figures["finals"]
    assert sum(text.startswith("plain ×2 (baseline)") for text in words_of(figure)) == 1
    assert BASELINE  # its row stands under the fair control
