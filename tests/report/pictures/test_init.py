"""The picture of what arms learn of a new text and forget of the old one."""

import json

from support.drawn import GOOD, PLAIN, TRAP, check_sheet, drawn, write_suite
from support.seen import assert_as_recorded, sheets_text


def ended(new, old, moved=0.5, **more):
    return {"outcome": "completed", "val_loss": new, "init_val_loss": old, "weights_moved": moved, **more}


def tuned(root, points):
    """The suite with a stage `tune`: arm -> its points' (loss on the new text, on the old one, ‖W − W₀‖)."""
    runs = []
    for label, of_arm in points.items():
        for i, (new, old, moved) in enumerate(of_arm):
            runs.append({"run_id": f"adam_none_{label}_{i}", "role": label, "arm": f"{label}_{i}"})
            folder = root / "runs" / runs[-1]["run_id"]
            folder.mkdir()
            (folder / "result.json").write_text(json.dumps(ended(new, old, moved)))
    path = root / "auto_decisions.json"
    decisions = json.loads(path.read_text())
    decisions["tune"] = {"tracks": {"adam_none": {"arms": {}}}, "candidates": runs}
    path.write_text(json.dumps(decisions))
    return root


def test_arms_are_told_apart_by_what_they_forgot_for_as_much_learning(tmp_path):
    ends = {PLAIN: (ended(1.6, 2.8), {}), GOOD: (ended(1.6, 2.6), {}), TRAP: (ended(2.1, 2.5), {})}
    points = {
        PLAIN: [(1.6, 2.8, 0.5), (1.9, 2.5, 0.2), (2.0, 2.4, 0.1), (3.0, 3.3, 4.0)],  # the last one broke
        GOOD: [(1.9, 2.4, 0.1), (1.7, 2.5, 0.2), (1.6, 2.6, 0.4), (1.7, 2.9, 0.9)],
        TRAP: [(2.2, 2.4, 0.1), (2.1, 2.5, 0.2)],
    }
    root = tuned(write_suite(tmp_path, more=ends, outcomes={}), points)
    figures = drawn(root, "forgetting", phone=("forgetting",))
    for name, figure in figures.items():
        check_sheet(figure, name)
    assert_as_recorded("pictures_init", sheets_text(figures))


def test_without_points_the_ends_alone_are_drawn(tmp_path):
    ends = {PLAIN: (ended(1.6, 2.8), {}), GOOD: (ended(1.7, 2.6), {})}
    figure = drawn(write_suite(tmp_path, more=ends, outcomes={}), "forgetting")["forgetting"]
    said = figure.alt
    assert f"Learned most: {PLAIN}, 1.600; forgot least: {GOOD}, 2.600." in said
