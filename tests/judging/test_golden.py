"""Whole judgements as they were recorded: every sentence, table and figure of each kind of comparison.

`python tests/judging/test_golden.py` records golden.json again, from the tree in PYTHONPATH.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

sys.path.append(str(Path(__file__).parents[1]))  # where it is called as a program

from support.runs_of_others import row_a_run, row_a_step, with_cell

from ebc_lab.judging.judgement import judge

GOLDEN = Path(__file__).with_name("golden.json")
TWO, THREE = ("adam", "muon"), ("sgd", "adam", "muon")
CURVES = row_a_step()
SCORES = CURVES.assign(val_acc=1 - CURVES.val_loss / 6).drop(columns="val_loss")
MANY = row_a_run([*"abcdefghij"], gap=0.02, seeds=4)
DIVERGED = with_cell(with_cell(row_a_run(THREE, seeds=6), "val_loss", 3, "nan"), "val_loss", 17, "inf")
SINGLE = row_a_run([*"abc"], seeds=1, gap=0.02)


def grid(rates, *, curves=False, **options):
    """Return each arm at each learning rate; the first rate of each arm is its best but one."""
    make = row_a_step if curves else row_a_run
    worse = [abs(math.log(rate / rates[1])) / 50 for rate in rates]
    tried = [make(number=i, **options).assign(lr=rate) for i, rate in enumerate(rates)]
    return pd.concat([x.assign(val_loss=x.val_loss + w) for x, w in zip(tried, worse, strict=True)])


def lengths():
    """Return three arms of which the later ones trained longer, each 100 steps an evaluation."""
    parts = [
        row_a_step([arm], last=last, number=last, seeds=5)
        for arm, last in zip(THREE, (300, 400, 600), strict=True)
    ]
    return pd.concat(parts).assign(planned=np.repeat([300, 400, 600], [5 * 4, 5 * 5, 5 * 7]))


def ended_early():
    """Return runs of which one ends before its planned end, one is a copy, and one has no finite loss."""
    frame = row_a_step(seeds=5, number=3).assign(max_steps=500)
    frame = frame[~((frame.optimizer == "adam") & (frame.seed == 4) & (frame.step > 300))].reset_index(
        drop=True
    )
    copied = (frame.optimizer == "muon") & (frame.seed == 1)
    frame.loc[copied, "val_loss"] = frame.loc[
        (frame.optimizer == "muon") & (frame.seed == 0), "val_loss"
    ].to_numpy()
    last = frame.index[(frame.optimizer == "muon") & (frame.seed == 3)][-1]
    return with_cell(frame, "val_loss", int(last) + 1, math.inf)


CASES = {
    "two arms, paired": (row_a_run(), {}),
    "two arms, as asked unpaired": (row_a_run(number=1), {"paired": False, "reference": "muon"}),
    "undecided": (row_a_run(gap=0.004, number=2), {}),
    "level": (row_a_run(gap=0.001, number=4), {"margin": 0.05}),
    "three arms and a reference": (row_a_run(THREE, number=5), {"reference": "adam"}),
    "the reference is best": (row_a_run(THREE, number=6), {"reference": "sgd"}),
    "three arms, all pairs": (row_a_run(THREE, seeds=4, gap=0.012, number=7), {"pairs": True}),
    "unequal seeds": (row_a_run(THREE, seeds=6).iloc[:-2], {"reference": "adam"}),
    "many arms": (MANY, {"reference": "e"}),
    "many arms, all pairs": (MANY, {"pairs": True}),
    "a chain": (row_a_run(THREE, gap=-0.02), {"chain": THREE}),
    "a chain of lengths": (lengths(), {"chain": THREE, "exchange": "0.0045/100"}),
    "lengths": (lengths(), {"reference": "sgd"}),
    "curves with a target": (CURVES, {"target": 3.3}),
    "steps to a target": (CURVES, {"outcome": "target", "target": 3.4}),
    "a target that one arm never reaches": (CURVES, {"outcome": "target", "target": 3.2}),
    "a target that no arm reaches": (CURVES, {"outcome": "target", "target": 1}),
    "an accuracy": (SCORES, {"target": 1 - 3.3 / 6}),
    "an accuracy in percent": (
        row_a_run(number=8)
        .assign(val_acc=lambda t: [f"{90 + x:.3f} %" for x in t.val_loss])
        .drop(columns="val_loss"),
        {},
    ),
    "the best of noisy curves": (row_a_step(noise=0.3), {"outcome": "best"}),
    "at a step": (CURVES, {"at": {"": 300, "adam": 400}}),
    "diverged": (DIVERGED, {"reference": "adam", "paired": False}),
    "diverged, paired": (DIVERGED, {"reference": "adam", "paired": True}),
    "all diverged": (row_a_run(seeds=3).assign(val_loss=math.inf), {}),
    "one arm": (row_a_run(["adam"]), {}),
    "one run an arm": (SINGLE, {}),
    "one run an arm and a sigma": (SINGLE, {"sigma": "0.01", "reference": "a"}),
    "one run and a pooled sigma": (
        pd.concat([row_a_run(), SINGLE]),
        {"sigma": "pooled", "reference": "adam"},
    ),
    "a grid": (grid((0.1, 0.3, 1.0)), {}),
    "a grid of scores": (
        grid((0.1, 0.3, 1.0), seeds=2).assign(val_acc=lambda t: 4 - t.val_loss).drop(columns="val_loss"),
        {},
    ),
    "a grid of curves": (grid((0.1, 0.3, 1.0, 3.0), curves=True, seeds=2), {"target": 3.4}),
    "a grid with one run each": (grid((0.1, 0.3, 1.0), seeds=1), {"reference": "adam"}),
    "unequal grids": (
        pd.concat([grid((0.1, 0.3, 1.0), arms=["adam"]), row_a_run(["muon"]).assign(lr=0.1)]),
        {},
    ),
    "chosen by another loss": (
        grid((0.1, 0.3)).assign(test_loss=lambda t: t.val_loss + 0.01 * np.cos(np.arange(len(t)))),
        {},
    ),
    "another benchmark's rule": (row_a_step(seeds=6), {"rule": "track3", "target": 3.3}),
    "copies, early ends": (ended_early(), {}),
    "copies left out": (ended_early(), {"distinct": True}),
    "only some rows": (grid((0.1, 0.3)), {"where": "lr=0.3"}),
}


def judged(name):
    """Return the record of a case, without the version and the words for a frame."""
    frame, asked = CASES[name]
    found = judge(frame, **asked)
    record = {key: value for key, value in found.record.items() if key not in ("ebc_lab", "runs", "sources")}
    ends = {
        run["run"]: [run["outcome"], run["length"], run["planned"], run["settings"]]
        for run in found.record["runs"]
    }
    return {**record, "runs": ends}


def rounded(value):
    """Return a record with its numbers at seven significant digits."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one) for one in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def differing(found, wanted, at=""):
    """Yield where two records differ; numbers that are computed may do so in the fifth digit."""
    if isinstance(wanted, dict) and isinstance(found, dict) and wanted.keys() == found.keys():
        for key in wanted:
            yield from differing(found[key], wanted[key], f"{at}.{key}")
    elif isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
            yield from differing(one, other, f"{at}[{i}]")
    elif isinstance(wanted, float) and isinstance(found, float):
        if found != pytest.approx(wanted, rel=1e-5, abs=1e-9):
            yield f"{at}: {found}, not {wanted}"
    elif found != wanted:
        yield f"{at}: {found!r}, not {wanted!r}"


@pytest.mark.parametrize("part", range(4))
def test_judgements_are_as_they_were_recorded(part):
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert golden.keys() == CASES.keys()
    for name in list(CASES)[part::4]:
        found = json.loads(json.dumps(rounded(judged(name)), allow_nan=False))
        assert [f"{name}{one}" for one in differing(found, golden[name])] == []


if __name__ == "__main__":
    lines = (
        f"{json.dumps(name)}: {{\n"
        + ",\n".join(
            f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}"
            for key, value in rounded(judged(name)).items()
        )
        + "\n}"
        for name in CASES
    )
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
