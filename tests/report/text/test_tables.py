"""The tables of a study: what the CSVs' columns mean, and the Markdown and LaTeX that papers take over."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from support.drawn import sweep
from support.recorded import read_decisions

from ebc_lab.config.compose import compose
from ebc_lab.records import columns
from ebc_lab.report.kinds import Evidence, candidates, finals, suite
from ebc_lab.report.page.ruler import draw_intervals
from ebc_lab.report.text import papers, summaries, tables
from ebc_lab.report.text.table import PAGE, PAPER, TERMINAL, Cell, Column, Row, Table, filled
from ebc_lab.report.text.words import NOTHING
from ebc_lab.study.stages.ablation import _figures
from ebc_lab.study.stages.statistics import paired
from ebc_lab.study.stages.verdict import verdict_of
from ebc_lab.study.store.study import recorded_config

LOSSES = {"base": (2.0, 2.1, 2.2), "good": (1.9, 1.995, 2.105), "broken": (1.8, math.inf, 2.0)}


def finals_of(seeds: int = 3) -> tuple[dict[str, Any], dict[str, Any]]:
    """A decision on three arms, one of which lost a seed to divergence, and the results of its runs."""
    losses = {label: dict(zip("012", own[:seeds], strict=False)) for label, own in LOSSES.items()}
    arms: dict[str, Any] = {}
    results: dict[str, Any] = {}
    for label, by_seed in losses.items():
        runs = {seed: f"{label}{seed}" for seed in by_seed}
        ends = {seed: "completed" if loss < math.inf else "diverged" for seed, loss in by_seed.items()}
        arms[label] = {"ebc": label == "good", "runs": runs, "outcomes": dict(Counter(ends.values()))}
        for seed, loss in by_seed.items():
            figures = {"val_loss": loss, "test_loss": loss, "c_median": 0.6, "kl_ratio_median": 0.98}
            result = {"outcome": ends[seed], "steps": 40, "tokens_per_s": 1000}
            results[runs[seed]] = result | (figures if loss < math.inf else {})
    pairs = {
        label: paired(own, losses["base"], margin=0.01, comparisons=2, looks=3)
        for label, own in losses.items()
        if label != "base"
    }
    roles = {"baseline": "base", "control": "base"}
    track = {"arms": arms, "roles": roles, "differences": dict.fromkeys(roles, pairs), "verdict": []}
    return {"tracks": {"adam_none": track}}, results


def cells(text: str, first: str) -> list[list[str]]:
    """The rows of a Markdown table that begin with `first`."""
    rows = [
        [c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return [row for row in rows if row[0].strip("`") == first]


# -- CSV -----------------------------------------------------------------------------------------------------


def test_every_summary_has_the_documented_columns_in_their_order(finished):
    _, outcome, _ = finished
    written = sorted(outcome.study.root.glob("summary_*.csv"))
    assert len(written) == 4
    for path in written:
        assert tuple(pd.read_csv(path).columns) == columns.COLUMNS
    assert set(columns.TIMING_COLUMNS) < set(columns.COLUMNS)


def test_a_candidate_is_told_what_became_of_it_and_what_it_was_for(finished):
    study = finished[1].study
    decisions, config = study.decisions(), recorded_config(study.header())
    for stage in ("lr_sweep", "calibrate"):
        decision = decisions[stage]
        [track] = decision["tracks"].values()
        [table] = candidates.KIND.tables(Evidence(decision, config))
        ranked = track.get("ranked", ())
        for row, run in zip(table.rows, decision["candidates"], strict=True):
            if (what := row.cells[0].text) != "→ chosen":
                assert what == ("qualified" if run["run_id"] in ranked else ""), run["arm"]
        assert {"→ chosen", "qualified", ""} >= {row.cells[0].text for row in table.rows} > {"→ chosen"}
    control = [c for c in decisions["lr_sweep"]["candidates"] if c["role"] == "control"]
    for used, part in ((True, "control’s search"), (False, "on a schedule")):
        track = decisions["lr_sweep"]["tracks"]["adam_none"]
        asked = {"tracks": {"adam_none": track | {"control": track["control"] | {"used": used}}}}
        [table] = candidates.KIND.tables(Evidence({**decisions["lr_sweep"], **asked}, config))
        assert [row.cells[2].text for row in table.rows].count(part) == len(control) > 0


def test_every_column_of_a_suite_is_documented():
    from ebc_lab.config.schema import TUNABLE
    from ebc_lab.study.stages.ablation import FIGURES

    named = (*FIGURES, *columns.PART_FIGURES, columns.BITS)
    figures = dict.fromkeys(named, 1.0)
    arm = dict.fromkeys((*suite.ABOUT_AN_ARM, "strength", "difference", "versus"))
    arm |= {"point": dict.fromkeys(TUNABLE, 1.0), "runs": {}, "outcomes": {}, "figures": figures}
    [row] = suite.KIND.rows(evidence_of({"adam_none": {"arms": {"arm": arm}}}))
    assert set(row) == set(columns.ABLATION_MEANINGS)


# -- the model -----------------------------------------------------------------------------------------------


def test_a_place_shows_its_own_columns_and_leaves_out_optional_ones_that_are_empty():
    columns = [
        Column("Arm", "name", head=True),
        Column("Loss", "figure", lambda x: f"{x:.2f}", on=(PAPER, PAGE)),
        Column("Judged", optional=True),
        Column("Notes"),
    ]
    table = Table(
        "t", "T", columns, [filled(columns, ("a", 1.5, None, "")), filled(columns, ("b", 2, None, ""))]
    )
    assert [c.title for c in table.on(PAPER).columns] == ["Arm", "Loss", "Notes"]
    assert [c.title for c in table.on(TERMINAL).columns] == ["Arm"]  # narrow: nothing empty
    assert table.on(PAGE).texts() == [["a", "1.50", ""], ["b", "2.00", ""]]
    assert table.on(PAGE).rows[0].cells[1] == Cell("1.50", value=1.5)


def test_a_long_table_shows_its_first_rows_what_was_chosen_and_where_the_rest_is():
    rows = [Row([Cell(str(i), link=f"run-{i + 1}")], id=f"run-{i}", chosen=i == 7) for i in range(10)]
    table = Table("t", "T", [Column("Run")], rows, "nats")
    short = table.shortened(3, "all are in x.csv", {"run-5"})
    assert short.texts() == [["0"], ["5"], ["7"]]
    assert short.note == "nats; the first 3 of 10 rows; all are in x.csv"
    assert table.shortened(10, "x") is table
    linked = short.linked_to({row.id for row in short.rows} | {"run-1"})
    assert [row.cells[0].link for row in linked.rows] == ["run-1", "", ""]


def test_a_suites_table_says_of_an_interval_what_its_answer_says():
    against_margin = {"judged": "undecided", "joint_low": 0.004, "joint_high": 0.02, "margin": 0.01}
    pairs = {"good": {"seeds": 3, "mean": 0.012, "low": 0.006, "high": 0.018, **against_margin}}
    arm = {"outcomes": {}, "runs": {}, "test_loss": 2.0}
    table = tables.differences("t", "T", pairs, {"arms": {"good": arm}, "reference": "base"})
    assert [row[2] for row in table.on(PAGE).texts()] == [verdict_of(pairs["good"])] == ["worse"]


# -- for papers ----------------------------------------------------------------------------------------------


def evidence_of(tracks: Any, results: Any = None) -> Evidence:
    config: Any = SimpleNamespace(finals=SimpleNamespace(margin=0.01))
    decision: Any = {"tracks": tracks, "sequential": None}
    return Evidence(decision, config, results=results or {})


def paper_of(decision: dict[str, Any], results: dict[str, Any]) -> list[Table]:
    made = finals.KIND.papers(evidence_of(decision["tracks"], results))["summary_final"]
    return [table.on(PAPER) for table in made]


def test_a_paper_has_one_table_of_five_columns_whose_caption_says_what_they_are():
    [table] = paper_of(*finals_of())
    text = papers.markdown([table], "Study a_study: tiny Shakespeare.")
    good, base, broken = (cells(text, label)[0][1:] for label in ("good", "base", "broken"))
    assert len(table.columns) == 5
    assert good == ["2.0000 ± 0.1026", *["−0.100 [−0.131, −0.069]"] * 2, "beats"]
    assert base == ["2.1000 ± 0.1000", "itself", "itself", ""]
    assert broken[0] == "1 of 3 diverged"  # a mean over the survivors would flatter it
    assert broken[1].startswith("−0.200")
    assert "joint" in table.caption
    assert "98.33%" in table.note  # three looks
    assert len(f"Table 10: {table.caption}") < 100  # two lines of a column
    assert "tiny Shakespeare" in text


def test_one_seed_alone_has_neither_spread_nor_interval():
    [good] = cells(papers.markdown(paper_of(*finals_of(seeds=1)), ""), "good")
    assert good[1:3] == ["1.9000", "−0.100"]


def test_the_page_shows_judgement_joint_interval_and_a_rank_where_a_run_diverged():
    decision, _ = finals_of()
    track = decision["tracks"]["adam_none"]
    table = tables.differences("t", "T", track["differences"]["control"], track).on(PAGE)
    assert [row[:5] for row in table.texts()] == [
        ["good", "−0.100", "beats", "", "[−0.131, −0.069]"],
        ["broken", "median −0.200", "misses", "", "(−∞, ∞)"],
    ]
    good, broken = draw_intervals(table).rows
    assert good.cells[2].page == "beats it"
    drawing = good.cells[3].drawing
    assert drawing["low"] < drawing["middle"] < drawing["high"] < drawing["ruler"].zero
    assert not any(cell.drawing for cell in broken.cells)


def test_papers_say_where_they_are_from_and_what_to_know_of_the_corpus():
    config = compose(["scale=smoke", "study.name=a_study", "data=pydoc"])
    text = papers.source(config, {"title": "Python’s documentation", "warning": "not Shakespeare"}, (0, 1))
    for said in ("a_study", "Python’s documentation", "smoke", "seeds 0, 1", "Corpus: not Shakespeare."):
        assert said in text
    assert "seeds 0, 1" not in papers.source(config, {"title": "", "warning": None}, (0,))


def test_the_lines_of_the_verdict_are_as_judged(finished):
    _, outcome, _ = finished
    text = (outcome.study.root / "acceptance.md").read_text()
    lines = outcome.acceptance["lines"]
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")][
        2:
    ]
    assert [row[1] for row in rows] == [line["verdict"] for line in lines]
    assert [row[2].replace("\\", "") for row in rows] == [line["figure"] for line in lines]


# -- what each language reads as its own ---------------------------------------------------------------------

NASTY = r"50% of #1 & 2_$x$ {a} ~b ^c <d> |e| \f `g` *h* [i](j) δ* ± −1 × ≤ ∞ “"


def nasty_table() -> Table:
    columns = [Column("arm", "name"), Column("words", "prose"), Column("figure", "figure", str)]
    rows = [filled(columns, values) for values in ((NASTY, NASTY, NASTY), ("a_b", "", ""))]
    return Table("n", NASTY, columns, rows, caption=NASTY)


def test_in_markdown_a_cell_stays_one_cell_and_no_text_becomes_html():
    text = papers.markdown([nasty_table()], "")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert [len(re.split(r"(?<!\\)\|", row)) for row in rows] == [5, 5, 5, 5]
    assert text.count(r"\*h\*") == 4  # the title, the caption, two cells; code stays as it is
    assert r"[i\](j)" in rows[2]
    without_code = re.sub(r"``.*?``(?!`)", "", text)
    assert "<" not in without_code
    assert "&lt;d>" in without_code


def test_no_character_of_a_text_means_anything_to_latex():
    text = papers.escaped(NASTY)
    for plain in (r"50\%", r"\#1", r"\& 2\_", r"\$x\$", r"\{a\}"):
        assert plain in text
    assert not re.search(r"(?<!\\)[%#&_$]", text)
    assert r"\textbackslash{}f" in text
    assert r"\textasciitilde{}b \textasciicircum{}c" in text
    assert text.endswith("“")
    lines = papers.latex([nasty_table()], "s", "").splitlines()
    rows = [line for line in lines if line.endswith(r"\tabularnewline")]
    assert [len(re.split(r"(?<!\\)&", row)) for row in rows] == [3, 3, 3]
    wide = [Column(name, "text") for name in "abcdefghi"]
    small, smaller = (
        papers.latex([Table("t", "t", columns, [filled(columns, ("ten letter",) * len(columns))])], "s", "")
        for columns in (wide[:2], wide)
    )
    assert ("footnotesize" in small, "scriptsize" in smaller) == (True, True)


def test_a_bracket_that_begins_a_row_is_no_argument_and_a_label_has_letters_digits_and_hyphens():
    columns = [Column("words", "text"), Column("figure", "figure", str)]
    made = papers.latex(
        [Table("adam_none-arms", "t", columns, [filled(columns, ("[1cm]", "2"))])], "my study_2.1", ""
    )
    assert r"{}[1cm] & 2 \tabularnewline" in made
    assert r"\label{tab:my-study-2-1-adam-none-arms}" in made


def test_no_text_in_a_csv_is_a_formula_and_figures_stay_as_they_are(tmp_path):
    texts = ["=1+1", "+1", "-1", "@x", "\t=1", "\r=1", "a=1", None]
    table = pd.DataFrame({"arm": texts, "difference": [-0.5] * 8, "seeds": [-1] * 8})
    summaries.write(tmp_path / "t.csv", table)
    found = pd.read_csv(tmp_path / "t.csv", lineterminator="\n")
    assert [str(x)[:1] for x in found.arm[:6]] == ["'"] * 6
    assert found.arm[6] == "a=1"
    assert set(found.difference) == {-0.5}
    assert set(found.seeds) == {-1}


LONG = "muon_none_ebc_d0p0774_shadow_x4_lindelta_lrdecay"


def long_named() -> list[Table]:
    """The finals with an arm of a name as long as they get."""
    decision, results = finals_of()
    [found] = decision["tracks"].values()
    found["arms"] = {LONG: found["arms"]["good"]}
    found["differences"] = {role: {LONG: pairs["good"]} for role, pairs in found["differences"].items()}
    return paper_of(decision, results)


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no pdflatex on this machine")
@pytest.mark.parametrize(("sheets", "fits"), [(long_named, True), (lambda: [nasty_table()], False)])
def test_the_latex_compiles_and_what_is_usual_fits_the_page(sheets, fits, tmp_path):
    (tmp_path / "tables.tex").write_text(papers.latex(sheets(), "a_b", "Study a_b."))
    body = r"\begin{document}\input{tables}\end{document}"
    (tmp_path / "p.tex").write_text(r"\documentclass{article}\usepackage{booktabs,graphicx}" + body)
    made = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "p.tex"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stdout[-2000:]
    assert (tmp_path / "p.pdf").exists()
    assert not fits or "Overfull" not in made.stdout


def test_the_windows_of_a_suite_are_a_table_widest_first():
    track = read_decisions("robustness")["ablation"]["tracks"]["adam_none"]
    track["windows"]["constant"] = {"lr_scale": sweep({1: None, 2: None}, "lost", delta_star=None)}
    table = tables.windows("w", track)
    rows = table.texts()
    assert rows[0][:5] == ["trust_region", "learning rate", "≥ 7.3", "0.128", "2.4435"]
    assert [row[2] for row in rows[1:-2]] == ["≥ 7.2", "5.1", "3.8", "3.3", "1.5"]
    assert rows[-2][:3] == ["constant", "learning rate", "every run diverged"]
    assert rows[-1] == ["ebc", "δ*", "≥ 3.0", "0.00474", "2.4413", "–", "+0.008", "3.0", "+0.034"]
    assert table.rows[2].cells[2].value == pytest.approx(5.1, abs=0.05)  # the page sorts by it
    assert tables.windows("w", {"windows": {}}) is None


def test_regrets_are_a_table_against_tuning_again_and_against_plain_as_tuned():
    arms = {
        "plain_long": {"difference": {"mean": 0.1, "low": 0.05, "high": 0.15}},
        "ebc_long": {"difference": {"mean": 0.02, "low": -0.01, "high": 0.05}},
    }
    beside = {"ebc_long": {"mean": -0.08, "low": -0.1, "high": -0.06}}
    sizes = [{"shape": "4× steps", "tuned": "again", "kept": list(arms), "against_kept": beside}]
    table = tables.regrets("r", {"arms": arms, "transfer": sizes})
    assert table.texts() == [
        ["4× steps", "plain_long", "+0.100", "[+0.050, +0.150]", "", ""],
        ["4× steps", "ebc_long", "+0.020", "[−0.010, +0.050]", "−0.080", "[−0.100, −0.060]"],
    ]
    sorted_by = [
        cell.value for cell in table.rows[1].cells
    ]  # on the page, which is written for none but numbers
    assert sorted_by == [None, None, 0.02, None, -0.08, None]
    assert tables.regrets("r", {"arms": arms, "transfer": []}) is None


# -- few levels ----------------------------------------------------------------------------------------------

TERNARY = {
    "packed_bytes": 1000,
    "model_bytes_float32": 11000,
    "bits_per_weight": 1.6,
    "entropy_bits": 1.52,
    "zero_share": 0.31,
    "flip_share": 0.004,
    "grad_bits": 2.333,
    "grad_error": 0.19,
    "state_bits": 16.25,
}


def low_bit_suite(**of_ternary: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A suite of a float arm and one with few levels, decided by the stage's own figures, and its results."""
    arms: dict[str, Any] = {}
    results: dict[str, Any] = {}
    for label, own in (("float", {}), ("ternary", of_ternary)):
        runs = {str(seed): f"{label}{seed}" for seed in (0, 1)}
        for seed, run_id in enumerate(runs.values()):
            timed = {"steps": 40, "train_s": 0.2 + 0.04 * seed, "tokens_per_s": 1000}
            losses = {"val_loss": 2.0 + seed, "test_loss": 2.0 + seed}
            results[run_id] = {"outcome": "completed", **losses, **timed, **own}
        arm = {"about": label, "ebc": False, "runs": runs, "outcomes": {"completed": 2}}
        arms[label] = {**arm, "versus": None, "difference": None, "figures": _figures(arm, results)}
    return {"reference": "float", "arms": arms}, results


def read_row(table: Table, place: str, label: str) -> dict[str, str]:
    """The cells of an arm's row by their column's title."""
    shown = table.on(place)
    row = next(cells for cells in shown.texts() if cells[0] == label)
    return dict(zip([c.title for c in shown.columns], row, strict=True))


def test_few_levels_stand_beside_the_losses_on_the_page_and_on_the_terminal():
    found, results = low_bit_suite(**TERNARY)
    page = tables.arms("t", found, results)
    beside = {"Bits per weight": "1.60", "Smaller by": "11.0×", "ms per step": "5.5"}
    assert read_row(page, PAGE, "ternary").items() >= beside.items()
    assert read_row(page, PAGE, "float").items() >= {"Bits per weight": NOTHING, "ms per step": "5.5"}.items()
    untimed = read_row(tables.arms("t", found), TERMINAL, "ternary")
    assert untimed["Smaller by"] == "11.0×"
    assert "ms per step" not in untimed  # a decision holds no times
    assert not set(beside) & set(read_row(page, PAPER, "ternary"))


def test_what_few_levels_took_is_a_table_of_its_own_with_what_was_measured():
    found, results = low_bit_suite(**TERNARY)
    [table] = tables.further_arms("t{}", found, results)
    of_page = ["ternary", "1.60", "1.52", "31%", "0.4%", "2.33", "19%", "16.25"]
    assert [*read_row(table, PAGE, "ternary").values()] == of_page
    of_paper = read_row(table, PAPER, "ternary")
    assert (of_paper["Smaller by"], of_paper["ms per step"]) == ("11.0×", "5.5")
    steered, results = low_bit_suite(lr_factor=0.7, radius_factor=1.25)
    made = tables.part_figures("t", steered, results)
    assert made.title == "Policies"
    assert "entropy" not in made.note
    of_policy = read_row(made, PAGE, "ternary")
    assert of_policy == {"Arm": "ternary", "Factor on the LR": "×0.7", "Factor on the radius": "×1.25"}


def test_finals_with_few_levels_are_told_from_their_results():
    decision, results = finals_of()
    for run_id, result in results.items():
        if run_id.startswith("good"):
            result |= TERNARY
    [_, table] = paper_of(decision, results)
    assert cells(papers.markdown([table], ""), "good")[0][1:4] == ["1.60", "11.0×", "1.52"]
