"""The one search: what it asks for, step by step, against a plain account of the same rules."""

import math
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebc_lab.study.stages.search import Search

QUICK = settings(max_examples=150, deadline=None)
FATES = {"diverged": {"outcome": "diverged"}, "failed": {"outcome": "failed"}}


def run(point):
    return [SimpleNamespace(run_id=str(sorted(point.items())))]


def asked(points, landscape, steps, results=None, **more):
    """Ask again and again, with the results of all runs that were asked for. -> the waves of points, and the
    last search."""
    results, waves = dict(results or {}), []
    while True:
        found = Search(points, run, results, **more)
        steps(found)
        new = [dict(p) for p, runs in found.tried.items() if runs[0].run_id not in results]
        if not new:
            return waves, found
        waves.append(new)
        for point in new:
            loss = landscape(point)
            fate = FATES.get(loss) or {"outcome": "completed", "val_loss": loss}
            results[run(point)[0].run_id] = fate


def plain(values, losses, most, ratio):
    """One setting's grid, grown by the textbook: -> all values in the order in which they were tried."""
    tried = list(values)
    for _ in range(most):
        known = [(losses(x), x) for x in tried if math.isfinite(losses(x))]
        if not known:
            break
        best = min(known)[1]
        if best == max(tried):
            tried.append(best * ratio)
        elif best == min(tried):
            tried.append(best / ratio)
        else:
            break
    return tried


@QUICK
@given(
    size=st.integers(2, 5),
    most=st.integers(0, 4),
    best=st.floats(-6, 10),
    diverging=st.floats(-3, 9),
    rough=st.lists(st.integers(0, 3), min_size=30, max_size=30),
)
def test_a_grid_grows_as_the_plain_account_of_it_does(size, most, best, diverging, rough):
    """Any landscape: a valley, rough ground with ties, and a rate from which on all diverges."""
    grid = [2.0**k for k in range(size)]

    def losses(x):
        octave = math.log2(x)
        return math.inf if octave > diverging else 0.3 * round(abs(octave - best)) + rough[round(octave) % 30]

    def landscape(point):
        return losses(point["x"]) if math.isfinite(losses(point["x"])) else "diverged"

    points = [{"x": x} for x in grid]
    _, found = asked(points, landscape, lambda s: s.grow(most), ratios={"x": 2.0}, prefer_low="x")
    assert [dict(p)["x"] for p in found.tried] == plain(grid, losses, most, 2.0)


def test_a_band_is_bisected_from_the_first_bracket_on_and_never_left():
    def seek(found):
        found.seek("x", lambda runs: found.results.get(runs[0].run_id, {}).get("val_loss"), [5, 6], 4)

    waves, _ = asked([{"x": 1.0}, {"x": 2.0}], lambda point: point["x"], seek, ratios={"x": 2.0})
    tried = [point["x"] for wave in waves for point in wave]
    assert tried == pytest.approx([1, 2, 4, 8, math.sqrt(4 * 8)])  # which lies in it, and ends the search


@QUICK
@given(known=st.sets(st.integers(0, 40)), best=st.floats(-3, 8))
def test_what_is_asked_for_hangs_on_the_results_alone_and_grows_with_them(known, best):
    """A search made with some of the results asks for the first runs of the one made with all of them."""

    def landscape(point):
        return abs(math.log2(point["x"]) - best) + 0.2 * abs(point["w"] - 3)

    def steps(found):
        found.grow(4, by_spacing=True)
        found.others("w", [1, 2, 3])
        found.neighbours(["x"])

    points = [{"x": x, "w": 1} for x in (1.0, 2.0, 4.0)]
    _, whole = asked(points, landscape, steps, ratios={"x": 2.0})
    order = list(whole.tried)
    part = {
        whole.tried[key][0].run_id: whole.results[whole.tried[key][0].run_id]
        for nth, key in enumerate(order)
        if nth in known
    }
    early = Search(points, run, part, ratios={"x": 2.0})
    steps(early)
    assert list(early.tried) == order[: len(early.tried)]
    assert early.open or list(early.tried) == order


def test_two_settings_after_one_another_and_the_first_again_next_to_the_best():
    def landscape(point):
        return abs(math.log2(point["x"]) - (2 if point["w"] == 1 else 1)) - 2 * (point["w"] == 3)

    def steps(found):
        found.grow(1)
        found.others("w", [1, 2, 3])
        found.neighbours(["x"])

    points = [{"x": x, "w": 1} for x in (1.0, 2.0)]
    waves, found = asked(points, landscape, steps, ratios={"x": 2.0})
    others = [{"x": 4.0, "w": 2}, {"x": 4.0, "w": 3}]
    assert waves == [points, [{"x": 4.0, "w": 1}], others, [{"x": 2.0, "w": 3}, {"x": 8.0, "w": 3}]]
    assert found.best() == {"x": 2.0, "w": 3}
    assert found.edge({"x": 2.0, "w": 3}, "x") == "low"
    assert list(found.along({"x": 2.0, "w": 3}, "x")) == [4.0, 2.0, 8.0]


def test_while_all_diverge_a_setting_goes_down_and_what_was_leapt_over_is_tried():
    points = [{"x": 1.0}, {"x": 2.0}]
    waves, _ = asked(
        points,
        lambda point: "diverged" if point["x"] > 0.3 else point["x"],
        lambda search: search.grow(2, lowering="x"),
        ratios={"x": 2.0},
        prefer_low="x",
    )
    assert waves == [points, [{"x": 0.25}], [{"x": 0.125}, {"x": 0.5}]]


def test_a_point_without_settings_can_be_the_best_and_a_value_that_no_run_has_is_not_tried():
    assert asked([{}], lambda point: 1.0, lambda s: None, ratios={})[1].best() == {}
    held = {"fitted": lambda key, x: x if x < 3 else None, "ratios": {"x": 2.0}}
    waves, _ = asked([{"x": 1.0}, {"x": 2.0}], lambda p: -p["x"], lambda s: s.grow(3), **held)
    assert waves == [[{"x": 1.0}, {"x": 2.0}]]
