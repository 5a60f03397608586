"""The page in words: arms by their schedules and roles, and an answer for every verdict that there can be."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest

from ebc_lab.config.choices import groups
from ebc_lab.config.compose import compose
from ebc_lab.config.fields import setting_of
from ebc_lab.config.parts import PART
from ebc_lab.config.parts.policy import PolicyConfig
from ebc_lab.config.parts.quantizer import QuantizerConfig
from ebc_lab.config.schema import RunConfig
from ebc_lab.report.text.words import (
    TAILS,
    arm_label,
    arm_title,
    batch,
    brief,
    explained,
    low_bit,
    role,
    size,
    tokens,
    tracks_in_words,
)

ARM = {"ebc": True, "lr_scale": 2.0, "roles": ["ebc_lindelta"], "track": "adam_none"}


@pytest.mark.parametrize(
    ("tail", "said"),
    [
        ("", "EBC ×2"),
        ("_lindelta_lrdecay", "EBC ×2, falling δ*, LR decay"),
        ("_holddelta_trapezoid_w0", "EBC ×2, hold-decay δ*, trapezoid LR, no warm-up"),
        ("_cosine_ternary_gfive", "EBC ×2, cosine LR, ternary weights, five-level gradients"),
        ("_trapezoid_e0p6", "EBC ×2, trapezoid LR, decay over the last 60%"),
        ("_customlr", "EBC ×2, own LR schedule"),
        ("_ebm_bpe", "EBC ×2, energy-based model, byte pairs"),
        ("_mint8_clustered_verity", "EBC ×2, int8 moments, batches from one cluster, exact sums"),
    ],
)
def test_a_label_names_the_schedules(tail, said):
    assert arm_label(f"adam_none_ebc_d0p02_shadow_x2{tail}", ARM) == said


def test_a_title_says_the_same_at_length():
    title = arm_title("adam_none_ebc_d0p02_shadow_x2_holddelta_trapezoid_w0", ARM)
    assert title.startswith("Adam with EBC, 2× the best constant rate, hold-decay KL target, ")
    assert title.endswith("trapezoid learning rate, no warm-up")


def test_what_is_low_bit_of_a_configuration_has_words_and_defaults_have_none():
    run = RunConfig()
    assert low_bit(run) == ""
    chosen = {"name": "five", "gradients": "ternary", "state": "int8_linear"}
    run = replace(run, quantizer=QuantizerConfig(**chosen), policy=PolicyConfig("random"))
    assert low_bit(run) == "five-level weights, ternary gradients, int8 moments, linear, random policy"


def test_every_choice_that_a_name_or_a_track_shows_has_words():
    for group in ("optimizer", "projection"):
        assert set(groups()[group]) - {"none", "custom"} == set(PART[group].words)
    for group in ("quantizer", "partition", "policy"):
        assert set(groups()[group]) - {getattr(RunConfig(), group).name} <= set(TAILS)
    levels = {field.name: set(setting_of(field).choices) - {"none"} for field in fields(QuantizerConfig)}
    assert {f"g{level}" for level in levels["gradients"]} <= set(TAILS)
    assert {f"m{level}" for level in levels["state"]} <= set(TAILS)


def test_the_finals_arms_are_named_by_their_roles():
    """Their schedules are the study's own, and said once."""
    tail = "_holddelta_trapezoid_w0"
    assert arm_label(
        f"adam_none_ebc_d0p02_shadow_x8{tail}", {**ARM, "lr_scale": 8.0, "roles": ["ebc_x8"]}
    ) == ("EBC ×8")
    plain = {"ebc": False, "lr_scale": 8.0, "roles": ["control_x8"], "track": "adam_none"}
    assert arm_label("adam_none_baseline_x8_trapezoid_w200", plain) == "plain ×8, control’s schedule"
    both = {**plain, "lr_scale": 2.0, "roles": ["control", "control_x2"]}
    assert arm_label("adam_none_baseline_x2_trapezoid_w200", both) == "plain ×2 (fair control)"
    assert [role(name) for name in ("ebc_x8", "control_x2", "ebc_chosen", "mine")] == [
        "EBC at ×8",
        "control’s schedule at ×2",
        "EBC at the chosen rate",
        "mine",
    ]


def test_sizes_and_what_is_counted_have_the_units_that_suit_them():
    told = {None: "–", 999: "999 B", 2e4: "20 kB", 4.92e6: "4.92 MB", 3e9: "3 GB", 4e12: "4e+03 GB"}
    assert {count: size(count) for count in told} == told
    seen = {None: "–", "": "–", True: "True", "a": "a", math.inf: "–", -3.0: "−3", 1234.5678: "1.23e+03"}
    assert {value: brief(value) for value in seen} == seen
    images = compose(["study=optimizers", "workload=images", "data=digits", "model=cnn"], here=False)
    assert (tokens(images), batch(images)) == ("images", f"{images.batch_size} images")


# -- terms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("adam_none: 3 arms", "Adam: 3 arms"),
        ("muon_spectral: no grid run completed", "Muon + spectral projection: no grid run completed"),
        ("adam_uncorrected_none would have had to be", "Adam without bias correction would have had to be"),
        ("adam_none_ebc_d0p02_tracked_x2 at ×2", "adam_none_ebc_d0p02_tracked_x2 at ×2"),  # a recorded name
    ],
)
def test_tracks_are_named_in_words(text, said):
    assert tracks_in_words(text) == said


def test_the_terms_that_a_text_uses_are_explained():
    told = explained("median c in 0.5–0.7; test loss ≤ fair control + 0.01")
    assert list(told) == ["c", "fair control"]
    assert list(explained("nothing of ours, a choice of colours")) == []
