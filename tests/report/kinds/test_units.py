"""What a study of units says, of the recorded one of larger models."""

import json
import zipfile
from pathlib import Path

from ebc_lab.config.compose import compose
from ebc_lab.report.kinds import Evidence, kind_of

RECORDED = Path(__file__).parents[3] / "docs/evidence/units_laptop.zip"


def test_the_first_figures_are_the_best_challenger_the_least_excess_and_what_broke():
    with zipfile.ZipFile(RECORDED) as bundle:
        carry = json.loads(bundle.read("auto_decisions.json"))["carry"]
    evidence = Evidence(carry, compose(["scale=smoke"]))
    [answer] = kind_of(carry).answers(evidence)
    shown = {tile.what: (tile.value, tile.remark) for tile in answer.tiles}
    assert shown["kl_x8 has the lowest mean excess"] == (
        "+0.021",
        "above the best of all arms; +0.053 at worst (batch_4)",
    )
    assert shown["Broken runs of kl_x8"] == ("0.0%", "0 of 18; radius_ramp 0.0%")
    assert answer.tiles[0].what.startswith("kl_x8 minus radius_ramp")
    arms = kind_of(carry).tables(evidence)[0]
    broken = [column.title.startswith("Broken") for column in arms.columns]
    [track] = carry["tracks"].values()
    for row in arms.rows:
        shares = [cell.text for cell, wanted in zip(row.cells, broken, strict=True) if wanted]
        found = track["arms"][row.cells[0].text]
        counts = (found["broken"], found["broken_anywhere"])
        assert shares == [f"{runs['broken']} of {runs['runs']}" for runs in counts]
