"""The page in words: arms by their schedules and roles, and an answer for every verdict that there can be."""

from __future__ import annotations

import itertools
import re
from dataclasses import fields, replace
from typing import Any

import pytest

from ebc_lab.config.choices import groups
from ebc_lab.config.fields import setting_of
from ebc_lab.config.parts import PART
from ebc_lab.config.parts.policy import PolicyConfig
from ebc_lab.config.parts.quantizer import QuantizerConfig
from ebc_lab.config.schema import RunConfig
from ebc_lab.report.text.words import TAILS, answer, explained, low_bit, role, short, tracks_in_words, words

ARM = {"ebc": True, "lr_scale": 2.0, "roles": ["ebc_lindelta"], "track": "adam_none"}


@pytest.mark.parametrize(
    ("tail", "said"),
    [
        ("", "EBC ×2"),
        ("_lindelta_lrdecay", "EBC ×2, falling δ*, LR decay"),
        ("_holddelta_trapezoid_w0", "EBC ×2, hold-decay δ*, trapezoid LR, no warm-up"),
        ("_cosine_w100", "EBC ×2, cosine LR, 100 steps of warm-up"),
        ("_cosine_ternary_gfive", "EBC ×2, cosine LR, ternary weights, five-level gradients"),
        ("_mint8_linear", "EBC ×2, int8 moments, linear"),
        ("_trapezoid_e0p6", "EBC ×2, trapezoid LR, decay over the last 60%"),
        ("_customlr", "EBC ×2, own LR schedule"),
        ("_ebm_bpe", "EBC ×2, energy-based model, byte pairs"),
        ("_verity", "EBC ×2, exact sums"),
        (
            "_mint8_clustered_auxnn",
            "EBC ×2, int8 moments, batches from one cluster, policy of a small network",
        ),
    ],
)
def test_a_label_names_the_schedules(tail, said):
    assert short(f"adam_none_ebc_d0p02_shadow_x2{tail}", ARM) == said


def test_a_title_says_the_same_at_length():
    title = words("adam_none_ebc_d0p02_shadow_x2_holddelta_trapezoid_w0", ARM)
    assert title.startswith("Adam with EBC, 2× the best constant rate, hold-decay KL target, ")
    assert title.endswith("trapezoid learning rate, no warm-up")


def test_what_is_low_bit_of_a_configuration_has_words_and_defaults_have_none():
    run = RunConfig()
    assert low_bit(run) == ""
    chosen = {"name": "five", "gradients": "ternary", "state": "int8_linear"}
    run = replace(run, quantizer=QuantizerConfig(**chosen), policy=PolicyConfig("random"))
    assert low_bit(run) == "five-level weights, ternary gradients, int8 moments, linear, random policy"


@pytest.mark.parametrize("group", ["optimizer", "projection"])
def test_every_choice_of_a_track_has_words(group):
    assert set(groups()[group]) - {"none", "custom"} == set(PART[group].words)


@pytest.mark.parametrize("group", ["quantizer", "partition", "policy"])
def test_every_choice_of_low_bit_has_words_in_a_name(group):
    default = getattr(RunConfig(), group).name
    assert set(groups()[group]) - {default} <= set(TAILS)


def test_every_level_of_gradients_and_moments_has_words_in_a_name():
    by_name = {field.name: setting_of(field).choices for field in fields(QuantizerConfig)}
    for lead, name in (("g", "gradients"), ("m", "state")):
        assert {f"{lead}{choice}" for choice in by_name[name] if choice != "none"} <= set(TAILS)


def test_the_finals_arms_are_named_by_their_roles():
    """Their schedules are the study's own, and said once."""
    tail = "_holddelta_trapezoid_w0"
    assert short(f"adam_none_ebc_d0p02_shadow_x8{tail}", {**ARM, "lr_scale": 8.0, "roles": ["ebc_x8"]}) == (
        "EBC ×8"
    )
    plain = {"ebc": False, "lr_scale": 8.0, "roles": ["control_x8"], "track": "adam_none"}
    assert short("adam_none_baseline_x8_trapezoid_w200", plain) == "plain ×8, control’s schedule"
    both = {**plain, "lr_scale": 2.0, "roles": ["control", "control_x2"]}
    assert short("adam_none_baseline_x2_trapezoid_w200", both) == "plain ×2 (fair control)"
    assert [role(name) for name in ("ebc_x8", "control_x2", "ebc_chosen", "mine")] == [
        "EBC at ×8",
        "control’s schedule at ×2",
        "EBC at the chosen rate",
        "mine",
    ]


# -- the answer ----------------------------------------------------------------------------------------------

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


PLAIN = (None, *map(difference, JUDGED), difference("misses", **DIVERGED))


@pytest.mark.parametrize("combination", list(itertools.product(JUDGED, JUDGED, JUDGED)))
def test_every_verdict_has_an_answer_that_claims_no_more_than_it(combination):
    window, control, baseline = combination
    for plain in PLAIN:
        found = answer(lines(window, control, baseline, plain), 0.01, (2.0, 8.0))
        said = found["word"]
        assert re.fullmatch(r"[A-Z][^.;]*0\.01 nats from ×2 to ×8 [^.;]*; [^.;]*\.", said), said
        alike = plain is not None and plain["alone"] in ("beats", "meets") and window in ("beats", "meets")
        assert said.startswith("EBC keeps the loss within") == (window in ("beats", "meets"))
        assert ("EBC does not keep the loss" in said) == (window == "misses")
        assert ("as the plain optimizer does" in said) == alike
        assert said.endswith("; it beats a tuned schedule.") == (control == "beats")
        assert said.endswith("; it loses to a tuned schedule.") == (control == "misses")
        assert said.endswith(" is undecided.") == (control == "undecided")
        assert re.fullmatch(r"(?:[A-Z][^.]*(?:\.\d[^.]*)*\.(?: |$)){4}", found["text"]), found["text"]
        assert "None" not in found["text"]
        assert "δ*" in found["text"]
        bad = {"misses"} & {window, control}
        assert (found["judged"] == "meets") <= (not bad)
        assert (found["judged"] == "misses") <= bool(bad)


def test_the_answer_puts_the_plain_optimizers_own_loss_beside_ebcs():
    def said(plain: Any) -> str:
        return answer(lines("meets", "meets", "beats", plain), 0.01, (2.0, 8.0))["text"].partition(". ")[0]

    level = (
        "With EBC a higher learning rate does no harm between ×2 and ×8 of the best constant one: at ×8 the "
    )
    level += "test loss is 0.001 nats higher than at ×2 (95% interval −0.004 to +0.006, 3 paired seeds)"
    assert said(None) == level
    without = f"{level}; on the fair control’s schedule (tuned for the plain optimizer) without EBC, "
    assert said(difference("misses")) == f"{without}it is 0.200 nats higher"
    lost = difference("misses", **DIVERGED)
    assert said(lost) == f"{without}3 of 3 runs diverged at ×8 and 1 of 3 runs diverged at ×2"


def test_runs_of_ebc_that_diverged_are_said_instead_of_a_difference():
    broken = lines("misses", "undecided", "undecided", None)
    broken[2]["difference"] |= DIVERGED
    text = answer(broken, 0.01, (2.0, 8.0))["text"]
    assert text.startswith("With EBC a higher learning rate does harm between ×2 and ×8")
    assert "diverged: 3 of the arm's, 1 of the reference's runs" in text


def test_without_a_window_the_answer_is_that_of_the_comparison():
    told = answer(lines("meets", "beats", "beats", None)[:2], 0.01)
    assert told["word"] == "EBC beats a tuned schedule."
    assert told["judged"] == "beats"
    assert answer([], 0.01) is None


# -- terms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("adam_none: 3 arms", "Adam: 3 arms"),
        ("muon_spectral: no grid run completed", "Muon + spectral projection: no grid run completed"),
        ("adam_sphere: no grid run completed", "Adam + sphere projection: no grid run completed"),
        ("adam_uncorrected_none would have had to be", "Adam without bias correction would have had to be"),
        ("adam_none_ebc_d0p02_tracked_x2 at ×2", "adam_none_ebc_d0p02_tracked_x2 at ×2"),  # a recorded name
        ("adam_none", "Adam"),
    ],
)
def test_tracks_are_named_in_words(text, said):
    assert tracks_in_words(text) == said


def test_the_terms_that_a_text_uses_are_explained():
    told = explained("median c in 0.5–0.7; test loss ≤ fair control + 0.01")
    assert list(told) == ["c", "fair control"]
    assert list(explained("nothing of ours, a choice of colours")) == []


def test_the_answer_says_what_the_budget_and_the_fair_control_are():
    text = answer(lines("meets", "meets", "beats", difference("misses")), 0.01, (2.0, 8.0))["text"]
    assert "the fair control’s schedule (tuned for the plain optimizer)" in text
    assert "EBC’s budget δ*: how far one step may move the predictions" in text
