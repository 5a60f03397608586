"""Studies at the edge of what can be drawn: one arm, one seed, one rate; names of any kind."""

from __future__ import annotations

import json

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


CASES = {
    "one arm, one seed": {"arms": ONE_ARM, "overrides": ["seeds=[0]"]},
    "one rate, one seed": {"overrides": [*ONE_RATE, "seeds=[0]"]},
    "long labels": {"arms": TWO_ARMS},
}


@pytest.mark.parametrize(
    "case", ["one arm, one seed", "long labels", pytest.param("one rate, one seed", marks=pytest.mark.slow)]
)
def test_every_picture_is_drawn_without_a_warning(case, tmp_path):
    text = tmp_path / TITLE
    text.write_text("the corpus of a study " * 400)
    how = {"overrides": [], **CASES[case]}
    how["overrides"] = ["data=path", f'data.file="{text}"', "study.name=odd", *how["overrides"]]
    root = invent(tmp_path, **how, drawn=False).root
    old = {"name": "pareto", "section": "verdict", "title": "", "alt": "", "arm": ""}
    (root / "figures.json").write_text(json.dumps([old]))
    for name in ("pareto.png", "pareto_phone.svg", "mine.png"):
        (root / name).touch()
    written = pictures.draw_study(root)
    assert {path.name for path in root.glob("*.png")} == {
        "mine.png",  # in no list: the user's
        *(path.name for path in written if path.suffix == ".png"),
    }
    assert not (root / "pareto_phone.svg").exists()
    assert len(written) > 3
    assert all(path.stat().st_size > 500 for path in written if path.suffix != ".json")
    svg = next(path for path in written if path.suffix == ".svg").read_text()
    assert "50% of $x_1 &amp; &lt;b&gt; \\frac{a}{b} ^ {y} #1 文字" in svg  # as it is, not as mathematics
