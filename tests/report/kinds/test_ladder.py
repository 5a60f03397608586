"""What a reader sees of a ladder: its answer, its tables, its CSV file."""

from __future__ import annotations

import html
import json
import math

import pytest
from support.called import called
from support.invented import invent
from support.laddered import ladder_of
from support.seen import assert_as_recorded, told

from ebc_lab import load
from ebc_lab.config.compose import compose
from ebc_lab.records.columns import LADDER_MEANINGS
from ebc_lab.report.conclude import report
from ebc_lab.report.kinds import KINDS, Evidence
from ebc_lab.report.text import papers
from ebc_lab.report.text.table import PAGE, PAPER, TERMINAL
from ebc_lab.results.catalogue import catalogue

PLAIN = {"base": 3.0, "wide": 2.9, "long": 2.95, "corner": 2.7}
PAIR = [("fast", "plain")]


def losses_of(*gains):
    """`fast` below `plain` by a gain on each rung; None: it could not be tuned there."""
    rungs = zip(PLAIN, gains, strict=True)
    return {
        "plain": PLAIN,
        "fast": {rung: gain if gain is None else PLAIN[rung] - gain for rung, gain in rungs},
    }


def found_in(track, config=None):
    decision = {"stage": "ladder", "rule": "", "notes": [], "tracks": {"adam_none": track}}
    return Evidence(decision, config or compose(["scale=smoke"]))


def answer_of(track):
    [answer] = KINDS["ladder"].answers(found_in(track))
    return answer


def tables_of(track, place):
    return [table.on(place) for table in KINDS["ladder"].tables(found_in(track)) if place in table.places]


def rows_of(table):
    return {row[0]: row for row in table.texts()}


@pytest.mark.parametrize(
    ("gains", "judged", "sentence"),
    [
        ((0.1, 0.1, 0.1, 0.1), "beats", "is better than plain over 4 rungs, and that hardly changes"),
        ((0.2, 0.1, 0.15, 0.05), "beats", "is better than plain over 4 rungs, and that shrinks"),
        ((0.02, 0.1, 0.1, 0.2), "beats", "is better than plain over 4 rungs, and that grows"),
        ((-0.2, -0.1, -0.15, -0.05), "misses", "is worse than plain over 4 rungs, but catches up"),
        ((-0.02, -0.1, -0.1, -0.2), "misses", "is worse than plain over 4 rungs, and falls further behind"),
        ((0.0, 0.0, 0.0, 0.0), "meets", "is level with plain over 4 rungs, and that hardly changes"),
    ],
)
def test_the_headline_says_who_is_better_and_what_more_compute_makes_of_it(gains, judged, sentence):
    answer = answer_of(ladder_of(losses_of(*gains), PAIR))
    assert answer.judged == judged
    assert answer.sentence == f"fast {sentence} with more compute."


def test_the_findings_say_what_the_ladder_was_what_tuning_gained_and_how_fast_the_arm_is():
    answer = answer_of(ladder_of(losses_of(0.1, 0.1, 0.1, 0.1), PAIR))
    size, full, lengths, speed, regret = answer.findings
    assert size.startswith(
        "4 rungs, base, long, wide, corner: from width 32, batch 8 × 16 tokens, 100 steps to "
    )
    assert "to width 64, batch 16 × 16 tokens, 200 steps, ×16 the" in size
    assert full == "fast against plain, in full."
    assert lengths.startswith(
        "plain would have to train ×1.6 as long [1.40, ∞) to end at fast’s loss on base"
    )
    assert "on base ×1.50 [1.25, ∞) (in seconds ×1.20 [1.10, 1.40]); on corner ×1.50" in speed
    assert "on wide: +0.0100 nats" in regret or "on long: +0.0100 nats" in regret
    mean, trend, speed = (tile.value for tile in answer.tiles)
    assert (mean, speed) == ("−0.100", "×1.50")
    assert trend.lstrip("+−").startswith("0.000")


def test_each_rung_has_a_row_in_the_order_of_compute_then_the_mean_and_the_trend():
    track = ladder_of(losses_of(0.02, 0.1, 0.1, 0.2), PAIR)
    rungs, tuned = tables_of(track, TERMINAL)
    rows = rows_of(rungs)
    assert [*rows] == ["base", "long", "wide", "corner", "mean", "per doubling"]
    assert rows["wide"][1:3] == ["−0.100", "better"]
    assert rows["wide"][4:7] == ["2.8000", "2.9000", "×4.00"]
    assert rows["corner"][7:] == ["×1.50 [1.25, ∞)", "×1.20 [1.10, 1.40]"]
    assert rows["mean"][1:3] == ["−0.105", "better"]
    assert rows["per doubling"][2] == "gains"
    assert ["long", "fast", "+0.010"] in [row[:3] for row in tuned.texts()]
    assert tuned.texts()[0][4:] == ["lr 0.002", "lr 0.003", "6", "lr high"]  # the schedule never moved
    assert [table.name for table in answer_of(track).tables] == [rungs.name]  # on the page below the answer
    assert [table.name for table in tables_of(track, PAGE)] == [tuned.name]


def test_an_arm_that_diverged_on_a_rung_has_no_figure_there_and_loses():
    track = ladder_of(losses_of(0.1, 0.1, -math.inf, 0.1), PAIR)
    answer = answer_of(track)
    assert answer.judged == "misses"
    assert answer.sentence == "fast is worse than plain over 4 rungs."  # a trend would need every loss
    rows = rows_of(tables_of(track, TERMINAL)[0])
    assert rows["long"][2] == "worse"
    assert rows["long"][4] == "4 of 4 diverged"
    assert rows["per doubling"][1] == "–"


def test_where_an_arm_could_not_be_tuned_on_a_rung_there_is_no_answer_but_the_other_rungs():
    track = ladder_of(losses_of(0.1, None, 0.1, 0.1), PAIR)
    answer = answer_of(track)
    assert answer.judged == "undecided"
    assert answer.sentence == "No answer on fast and plain: nothing to compare on wide."
    rows = rows_of(tables_of(track, TERMINAL)[0])
    assert rows["wide"][1:5] == ["–", "untuned", "–", "–"]
    assert rows["long"][2] == "better"
    assert "no point that was tried there completed" in str(tables_of(track, TERMINAL)[1].texts())
    csv = [*KINDS["ladder"].rows(found_in(track))]
    assert [row["arm_loss"] for row in csv if row["rung"] == "wide"] == [None]
    assert all(set(row) <= set(LADDER_MEANINGS) for row in csv)


def test_a_ladder_is_told_as_it_was():
    gains = {"fast": (0.02, 0.1, 0.1, 0.2), "lost": (0.1, None, 0.1, 0.1)}
    losses = {name: losses_of(*of)["fast"] for name, of in gains.items()} | {"plain": PLAIN}
    track = ladder_of(losses, [("fast", "plain"), ("lost", "plain")])
    assert_as_recorded("ladder_invented", told(KINDS["ladder"], found_in(track)))


def test_without_a_pair_or_a_sure_trend_the_headline_says_so():
    track = ladder_of(losses_of(0.1, 0.1, 0.1, 0.1), PAIR)
    assert answer_of(track | {"climbs": []}).sentence == "No answer: no two arms can be compared."
    track["climbs"][0]["course"] = "undecided"
    assert answer_of(track).sentence == (
        "fast is better than plain over 4 rungs; whether that changes with more compute is undecided."
    )


def test_of_many_comparisons_the_headline_counts_and_one_table_has_them_all():
    losses = losses_of(0.1, 0.1, 0.1, 0.1) | dict.fromkeys(("one", "two"), PLAIN)
    track = ladder_of(losses, [(arm, "plain") for arm in ("fast", "one", "two")])
    answer = answer_of(track)
    assert answer.sentence == "Of 3 comparisons over 4 rungs, the arm is level in 2, better in 1."
    overall, tuned = tables_of(track, TERMINAL)
    assert rows_of(overall)["fast"][1:4] == ["−0.100", "better", "plain"]
    assert len(tables_of(track, PAGE)) == 4  # one of each comparison, and what was tuned
    assert len(tuned.rows) == 12


def test_a_single_rung_adds_a_line_to_the_suites_answer_and_has_its_table_in_its_section():
    losses = {
        "plain": {name: PLAIN[name] for name in ("base", "corner")},
        "fast": {"base": 2.9, "corner": 2.6},
    }
    track = ladder_of(losses, PAIR, regret=0.09, rules={})
    answer = answer_of(track)
    assert answer.adds
    assert answer.judged == "beats"
    assert answer.sentence.startswith(
        "At about corner, fast minus plain, nats of test loss, settings kept: −0.01"
    )
    assert "; tuned again: −0.1000 [" in answer.sentence
    assert answer.sentence.endswith("better.")
    assert not answer.tiles
    assert not answer.tables
    rungs, _ = tables_of(track, PAGE)
    assert [*rows_of(rungs)] == ["base", "corner"]


def test_what_was_carried_alone_is_shown_without_what_was_not_tried():
    track = ladder_of(losses_of(0.1, 0.1, 0.1, 0.1), PAIR, tuned=False)
    for rung in track["rungs"].values():
        for arm in rung["arms"].values():
            arm |= {"point": arm["carried"], "trials": 0, "regret": None, "edges": {}}
    _, tuned = tables_of(track, TERMINAL)
    assert [column.title for column in tuned.columns] == ["Rung", "Arm", "Carried"]
    assert not any("Tuning again" in line for line in answer_of(track).findings)


def test_with_a_target_each_arm_has_its_steps_seconds_and_tokens_to_it():
    track = ladder_of(losses_of(0.1, 0.1, 0.1, 0.1), PAIR)
    for rung in track["rungs"].values():
        for label, arm in rung["arms"].items():
            steps = 50.0 if label == "fast" else None
            arm["target"] = {
                "target_loss": 2.9,
                "target_reached": 4.0 if steps else 1.0,
                "steps_to_target": steps,
                "seconds_to_target": steps and 1.5,
                "tokens_to_target": steps and 256 * steps,
            }
    reached = tables_of(track, PAGE)[-1]
    assert ["corner", "fast", "50", "1.5", "12,800", "4 of 4"] in reached.texts()
    assert ["base", "plain", "–", "–", "–", "1 of 4"] in reached.texts()
    assert "2.9000" in reached.note


def test_a_paper_has_the_rungs_with_their_intervals_and_what_the_ladder_was():
    track = ladder_of(losses_of(0.02, 0.1, 0.1, 0.2), PAIR)
    made = KINDS["ladder"].papers(found_in(track))["ladder"]
    text = papers.markdown([table.on(PAPER) for table in made], "Study t.")
    assert "| `corner` | −0.200 | better | [−0.2" in text
    assert "4 rungs, base, long, wide, corner: from width 32" in text


# -- in a study, beside the suite's own answer ---------------------------------------------------------------


@pytest.fixture(scope="module")
def studies(tmp_path_factory, text_file, own_places):
    """The study that is a ladder, and a suite that is checked at one other size, their losses invented."""
    folder = tmp_path_factory.mktemp("climbed")
    own = folder / "mine.py"
    own.write_text("import torch\n\n\nclass Mine(torch.optim.SGD):\n    pass\n")
    few = ["~ablation.arms.muon", "seeds=[0,1,2]"]
    few += ["tune.trials=16", "tune.seeds=1", "tune.finalists=2", "tune.max_extensions=0"]
    asked = [f"mine={own}:Mine", "data=path", f"data.file={text_file}", *few]
    return {
        "ladder": invent(folder, ["study=ladder", "ladder.trials=3", *asked], drawn=False),
        "bigger": invent(
            folder, ["study=optimizers", "check=bigger", "study.name=bigger", *asked], drawn=False
        ),
    }


def test_the_ladder_leads_where_it_is_the_study_and_else_adds_a_line(studies, undrawn):
    for name, study in studies.items():
        report(study)
        page = study.page_file.read_text()
        first, second = page.index('id="ladder"'), page.index('id="ablation"')
        assert (first < second) == (name == "ladder")
        said = json.loads(study.results_file.read_text())
        assert said["stage"] == ("ladder" if name == "ladder" else "ablation")
        answer = load(study.root).answer
        assert ("5 rungs" in answer.splitlines()[0]) == (name == "ladder")
        assert (study.root / "ladder.csv").read_text().startswith("track,arm,reference,asked,rung")
    line = load(studies["bigger"].root).answer.splitlines()[-1]
    [listed] = (one for one in catalogue(studies["bigger"].root.parent) if one["place"].endswith("bigger"))
    assert listed["headline"].startswith("undecided: mine")
    assert listed["headline"].endswith(line)
    assert line.startswith("At twice the width, four times the steps, mine minus ")
    assert f'<p class="lead">{line}' in html.unescape(studies["bigger"].page_file.read_text())
    table = load(studies["ladder"].root).differences().query("stage == 'ladder'")
    assert {"rungs", "trend", "rung_corner", "kept_corner"} <= set(table.family)


def test_why_of_a_study_that_is_called_like_a_stage_shows_all_of_it(studies):
    folder = studies["ladder"].root.parent
    shown = called("why", "ladder", "--output-dir", str(folder), "--json", cwd=folder)
    assert [*json.loads(shown.stdout)] == ["lr_sweep", "tune", "ablation", "ladder"]
    shown = called("why", "bigger", "--output-dir", str(folder), cwd=folder)
    assert "At twice the width, four times the steps, mine minus" in " ".join(shown.stdout.split())
