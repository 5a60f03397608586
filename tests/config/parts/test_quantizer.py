"""Low-bit settings: what they refuse, and what is said of them."""

import sys

import pytest
from support.named import run

from ebc_lab.config.checks import warnings_of
from ebc_lab.config.compose import compose
from ebc_lab.config.errors import UserError


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["quantizer=ternary", "quantizer.group=0"], ["quantizer.group", "count of weights >= 1"]),
        (["quantizer=ternary", "quantizer.group=rows"], ["quantizer.group", "tensor, row"]),
        (["quantizer=ternary", "quantizer.scale=0"], ["quantizer.scale", "step > 0"]),
        (["quantizer=ternary", "quantizer.scale=nan"], ["quantizer.scale"]),
        (["quantizer.state=int8", "optimizer=muon"], ["optimizer=adam or adamw", "muon"]),
        (["quantizer.state=int9"], ["int8"]),
        (["quantizer=ternary", "budget=shadow", "budget.measure_every=2"], ["leave it at 1"]),
        (["stabilizer=trust_region", "stabilizer.norm=effective"], ["choose quantizer=ternary or five"]),
        (["quantizer=bitnet"], ["did you mean", "ternary"]),
        (["quantizer.group_size=3"], ["quantizer.group"]),
        (["policy=auxnn", "budget.schedule=lr_squared"], ["choose another schedule"]),
        (["partition=clustered", "budget.probe_tokens=held"], ["probe_tokens=train"]),
    ],
)
def test_what_cannot_be_meant_is_named_in_one_sentence(overrides, words):
    with pytest.raises(UserError) as refused:
        compose(["scale=smoke", *overrides], study=False)
    assert all(word in str(refused.value) for word in words)
    assert str(refused.value).count("\n") == 0


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"policy": "auxnn", "stabilizer": "norm_clip"}, "has no trust radius"),
        ({"policy": "auxnn", "stabilizer": "trust_region"}, None),
        ({"quantizer": "ternary", "budget": "fisher"}, "a forensic arm"),
        ({"quantizer": "ternary", "budget": "shadow"}, None),
        ({"budget": "fisher"}, None),
    ],
)
def test_what_means_less_than_it_seems_is_said(choices, words):
    said = warnings_of(
        run({group: {"name": name} for group, name in ({"stabilizer": "ebc"} | choices).items()})
    )
    assert len(said) == (words is not None)
    assert words is None or words in said[0]


def test_clusters_chosen_by_silhouettes_need_their_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    compose(["scale=smoke", "partition=clustered", "partition.clusters=4"], study=False)
    with pytest.raises(UserError, match=r"scikit-learn: pip install 'ebc-lab\[lowbit\]', or give the number"):
        compose(["scale=smoke", "partition=clustered", "partition.clusters=0"], study=False)
