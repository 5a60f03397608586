"""What a study of units says, of the recorded one of larger models."""

from support.recorded import recorded

from ebc_lab.config.compose import compose
from ebc_lab.report.kinds import Evidence, kind_of


def test_the_first_figures_are_the_best_challenger_the_least_excess_and_what_broke():
    carry = recorded("units_laptop")["carry"]
    [answer] = kind_of(carry).answers(Evidence(carry, compose(["scale=smoke"])))
    shown = {tile.what: (tile.value, tile.remark) for tile in answer.tiles}
    assert shown["kl_x8 has the lowest mean excess"] == (
        "+0.021",
        "above the best of all arms; +0.053 at worst (batch_4)",
    )
    assert shown["Broken runs of kl_x8"] == ("0.0%", "0 of 18; radius_ramp 0.0%")
    assert answer.tiles[0].what.startswith("kl_x8 minus radius_ramp")
