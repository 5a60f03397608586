"""Studies at the edge of what can be drawn: one arm, one seed, one rate, all lost; names of any kind."""

from __future__ import annotations

import pytest
from support.invented import invent

from ebc_lab.config.schema import ArmConfig
from ebc_lab.report import pictures

pytestmark = pytest.mark.filterwarnings("error")

LONG = "a_label_of_eighty_characters_" + "goes_on_and_on_" * 3 + "ends_1"
TITLE = r"50% of $x_1 & <b> \frac{a}{b} ^ {y} #1 文字 العربية 😀.txt"
EBC = {"stabilizer": {"name": "ebc"}, "budget": {"target_kl": 0.01}}
ONE_ARM = {"only": ArmConfig(about="alone")}
TWO_ARMS = {**ONE_ARM, LONG: ArmConfig(about="w" * 80, settings=EBC)}
ONE_RATE = [
    "lr_sweep.optimizers=[adam]",
    "lr_sweep.grids.adam=[0.004]",
    "lr_sweep.max_extensions=0",
    "lr_sweep.control_scales=[1]",
    "lr_sweep.control_extensions=0",
    "lr_sweep.control_shapes=[trapezoid]",
    "lr_sweep.baseline_scales=[1]",
    "lr_scale.scales=[1]",
    "calibrate.multiples=[1]",
    "calibrate.max_extra=0",
]
DIVERGED = {"outcome": "diverged", "cause": "loss was nan", "curve": []}


def all_but_the_baseline(spec):
    """Every run of the finals diverged but one of the baseline's, without which nothing can be judged."""
    spared = spec.stage != "finals" or (spec.role == "baseline" and spec.run.seed == 0)
    return {} if spared or spec.kind != "train" else DIVERGED


def all_but_one(spec):
    return DIVERGED if spec.stage == "ablation" and (spec.role, spec.run.seed) != ("only", 0) else {}


CASES = {
    "one arm": {"arms": ONE_ARM},
    "one arm, one seed": {"arms": ONE_ARM, "overrides": ["seeds=[0]"]},
    "one rate, one seed": {"overrides": [*ONE_RATE, "seeds=[0]"]},
    "one seed": {"overrides": ["seeds=[0]"]},
    "all that may diverge": {"fate": all_but_the_baseline},
    "of a suite all that may diverge": {"arms": TWO_ARMS, "fate": all_but_one},
    "long labels": {"arms": TWO_ARMS},
}


def drawn(folder, overrides=(), **how):
    """Every picture of an invented study, as PNG and SVG."""
    text = folder / TITLE
    text.write_text("the corpus of a study " * 400)
    named = ["data=path", f'data.file="{text}"', "study.name=odd"]
    study = invent(folder, [*named, *overrides], **how, drawn=False)
    return pictures.draw_study(study.root)


FAST = ("one arm, one seed", "long labels")


@pytest.mark.parametrize(
    "case", [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_every_picture_is_drawn_without_a_warning(case, tmp_path):
    written = drawn(tmp_path, **CASES[case])
    assert len(written) > 3
    assert all(path.stat().st_size > 500 for path in written if path.suffix != ".json")
    svg = next(path for path in written if path.suffix == ".svg").read_text()
    assert "50% of $x_1 &amp; &lt;b&gt; \\frac{a}{b} ^ {y} #1 文字" in svg  # as it is, not as mathematics
