"""Energy-based models and other tokens: bits per character, the model in words, what its splats know."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import jsonschema
import pandas as pd
import pytest
from rich.console import Console
from support.invented import invent

from ebc_lab.cli import screen
from ebc_lab.config.compose import compose
from ebc_lab.config.schema import ArmConfig
from ebc_lab.report.conclude import report
from ebc_lab.report.kinds import Evidence, kind_of
from ebc_lab.report.page import evidence
from ebc_lab.report.text import tables, words
from ebc_lab.report.text.table import PAGE, PAPER, TERMINAL, Table
from ebc_lab.study.inspect.compare import compare
from ebc_lab.study.store.study import Study, recorded_config

BITS = 2.5  # a character, of the invented runs
LEVELS = {"0p05": (0.0123, 0.0134), "0p5": (0.41, 0.49)}  # R² and its matched value
BITS_TITLE = "Bits per character"


def figures(spec) -> dict[str, Any]:
    """Of an invented run of workload=ebm; without splats it knows no score."""
    found = {"state_spread": 0.6, "settled": 2.01, "sampled": 2.04, "unigram": 3.3, "bigram": 2.5}
    if spec.run.ebm.splats:
        found |= {"energy": -20.5, "winners": 0.9, "state_coverage": 0.88, "kappa_median": 5.2}
        found |= {"kappa_at_limit": 0.0, "splat_coverage": 0.8, "energy_trend": "stable"}
        for level, (r2, matched) in LEVELS.items():
            found |= {f"r2_{level}": r2, f"matched_{level}": matched, f"r2_se_{level}": 0.001}
    return {"workload": found, "test_bits_per_char": BITS}


ARMS = {
    "full": ArmConfig(about="the whole model"),
    "no_splats": ArmConfig(settings={"ebm": {"splats": 0}}),
    "twice": ArmConfig(lr_scale=2.0),
}
USUAL = {name: ARMS[name] for name in ("full", "twice")}  # those that a GPT on characters has


@pytest.fixture(scope="module")
def concluded(tmp_path_factory, text_file, own_places):
    """Invent a study and write its report, without pictures."""

    def call(name: str, *asked: str, **how: Any) -> Study:
        corpus = ["data=path", f"data.file={text_file}", "seeds=[0,1]", f"study.name={name}"]
        study = invent(tmp_path_factory.mktemp(name), [*corpus, *asked], drawn=False, **how)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ebc_lab.report.pictures.draw_study", lambda root: [])
            report(study)
        return study

    return call


@pytest.fixture(scope="module")
def finals(concluded) -> Study:
    return concluded("finals", "workload=ebm", fate=figures)


@pytest.fixture(scope="module")
def suite(concluded) -> Study:
    return concluded("parts", "workload=ebm", fate=figures, arms=ARMS)


@pytest.fixture(scope="module")
def usual(concluded) -> Study:
    return concluded("gpt", arms=USUAL)


def tables_of(shown: dict[str, Any]) -> dict[str, Table]:
    """The tables of the sections of a page, by name."""
    return {table.name: table for section in shown["sections"] for table in section["tables"]}


def titles(table: Table, place: str = PAGE) -> list[str]:
    return [column.title for column in table.on(place).columns]


def column(table: Table, title: str, place: str = PAGE) -> list[str]:
    shown = table.on(place)
    at = titles(table, place).index(title)
    return [row[at] for row in shown.texts()]


# -- bits per character --------------------------------------------------------------------------------------


def test_bits_per_character_stand_beside_the_test_loss_on_page_paper_and_terminal(suite, capsys):
    decision = suite.decisions()["ablation"]
    [found] = decision["tracks"].values()
    assert {arm["figures"]["test_bits_per_char"] for arm in found["arms"].values()} == {BITS}
    results = {r: suite.result(r) for arm in found["arms"].values() for r in arm["runs"].values()}
    for made in (tables.arms("t", found, results), tables.arms("t", found)):
        for place in (PAGE, TERMINAL):
            assert column(made, BITS_TITLE, place) == [f"{BITS:.3f}"] * len(ARMS)
    shown = Evidence(decision, recorded_config(suite.header()), results=results)
    Console(width=200).print(screen.evidence(shown))
    assert "bits/char" in capsys.readouterr().out
    [paper, *_] = kind_of(decision).papers(shown)["ablation"]
    assert column(paper, BITS_TITLE, PAPER) == [f"{BITS:.3f}"] * len(ARMS)


def test_the_runs_on_the_page_and_the_csv_of_a_suite_have_bits_too(suite):
    assert f"{BITS:.3f}" in column(evidence.gather(suite)["runs"], BITS_TITLE)
    table = pd.read_csv(suite.ablation_file)
    assert list(table.test_bits_per_char) == [BITS] * len(ARMS)
    assert list(table.columns).index("test_bits_per_char") == list(table.columns).index("test_loss") + 1


def test_finals_tell_bits_and_keep_to_the_schema_of_their_results(finals, results_schema):
    results = json.loads(finals.results_file.read_text())
    results_schema.validate(results)
    arms = results["tracks"]["adam_none"]["arms"]
    assert {arm["test_bits_per_char"] for arm in arms.values()} == {BITS}
    next(iter(arms.values()))["test_bits_per_char"] = "many"
    with pytest.raises(jsonschema.ValidationError):
        results_schema.validate(results)
    assert "| arm | test loss | bits/char |" in (finals.root / "summary_final.md").read_text()


def test_an_arm_of_which_a_run_diverged_has_no_bits():
    arm = {"about": "a", "ebc": False, "runs": {}, "outcomes": {"completed": 1, "diverged": 1}}
    arm |= {"figures": {"test_bits_per_char": BITS, "test_loss": 2.0}}
    assert BITS_TITLE not in titles(tables.arms("t", {"arms": {"one": arm}}))


def test_the_best_of_a_window_is_told_in_bits(suite):
    [found] = suite.decisions()["ablation"]["tracks"].values()
    span = {"best": 1.0, "loss": 2.0, "octaves": 1.0, "open_low": False, "open_high": False}
    point = {"value": 1.0, "arm": "full", "lr": 0.01, "delta_star": None}
    swept = {"window": span, "points": [point], "regret_x4": None, "rate_octaves": None}
    made = tables.windows("w", {"arms": found["arms"], "windows": {"full": {"lr_scale": swept}}})
    assert column(made, BITS_TITLE) == [f"{BITS:.3f}"]


def test_a_gpt_on_characters_says_nothing_new(usual):
    shown = evidence.gather(usual)
    assert "suite-states-adam_none" not in tables_of(shown)
    assert BITS_TITLE not in titles(tables_of(shown)["suite-adam_none"])
    assert BITS_TITLE not in titles(shown["runs"])
    assert "test_bits_per_char" not in pd.read_csv(usual.ablation_file).columns
    assert [name for name, _ in shown["facts"]][:3] == ["Corpus", "Model", "Optimizer"]
    assert dict(shown["facts"])["Model"].startswith("GPT, ")
    assert "tokens are characters." in usual.page_file.read_text()
    assert not re.search("Model:|bits", (usual.root / "ablation.md").read_text())
    told = usual.decisions()["ablation"]["tracks"]["adam_none"]["arms"]["full"]
    assert "test_bits_per_char" not in {*told, *told["figures"]}


def test_byte_pairs_are_named_and_told_in_bits(concluded):
    pytest.importorskip("tokenizers")
    given = ("tokens=bpe", "tokens.size=300", "model.context=16")
    study = concluded("pairs", *given, fate=lambda _: {"test_bits_per_char": BITS}, arms=USUAL)
    shown = evidence.gather(study)
    assert dict(shown["facts"])["Tokens"] == "byte pairs of the training split, 300 at the most"
    assert "tokens are byte pairs of the training split, 300 at the most." in study.page_file.read_text()
    assert column(tables_of(shown)["suite-adam_none"], BITS_TITLE) == [f"{BITS:.3f}"] * 2
    assert "Tokens: byte pairs" in (study.root / "ablation.md").read_text()


def test_two_studies_of_other_tokens_are_compared_in_bits(suite, usual, capsys):
    found = compare(usual, suite)
    arm = found["arms"]["full"]
    assert arm["test_bits_per_char"] == [pytest.approx(arm["test_loss"][0] / math.log(2)), BITS]
    screen.compared(Console(width=200), found)
    text = capsys.readouterr().out
    assert "Mean test loss, and bits per character" in text
    assert f"({BITS:.3f})" in text
    alone = compare(usual, usual)["arms"]["full"]
    assert "test_bits_per_char" not in alone


# -- the model, and its splats -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["workload=gpt"], "GPT, 2 blocks, width 32, context 32"),
        (
            ["workload=ebm"],
            "energy-based on the sphere; n = 32; up to 160 splats, 8 of them on a state; encoder: a window "
            "of 4 tokens; decoder: 4 experts of 64 features, 2 active; context 32",
        ),
        (["workload=ebm", "ebm.splats=0", "decoder=transformer"], "no splats; .*decoder: transformer blocks"),
        (["workload=ebm", "encoder=transformer"], "encoder: transformer blocks"),
    ],
)
def test_the_model_in_words(overrides, said):
    assert re.search(said, words.model(compose(["scale=smoke", "data=pydoc", *overrides])))


def test_the_page_and_the_papers_name_the_model(finals):
    model = words.model(recorded_config(finals.header()))
    assert dict(evidence.gather(finals)["facts"])["Model"] == model
    assert model in finals.page_file.read_text()
    for name in ("summary_final.md", "acceptance.md"):
        assert f"Model: {model}. Tokens: characters." in (finals.root / name).read_text()


def test_what_the_splats_know_is_a_table_of_its_own(suite):
    table = tables_of(evidence.gather(suite))["suite-states-adam_none"]
    assert set(column(table, "R² at 0.05")) == {"0.012/0.013", words.NOTHING}
    by_arm = dict(zip(column(table, "Arm"), column(table, "R² at 0.5"), strict=True))
    assert by_arm == {"full": "0.41/0.49", "no_splats": words.NOTHING, "twice": "0.41/0.49"}
    assert set(column(table, "Sampled loss")) == {"2.0400"}
    assert {"Energy", "Median κ", "Spread"} <= set(titles(table))
    assert titles(table).index("R² at 0.05") < titles(table).index("R² at 0.5")
    paper = (suite.root / "ablation.md").read_text()
    assert "| arm | sampled | R² 0.05 | R² 0.5 | covered |" in paper
    assert "States and splats" in suite.page_file.read_text()


def test_a_suite_without_splats_shows_no_scores(suite):
    [found] = suite.decisions()["ablation"]["tracks"].values()
    arms = {"no_splats": found["arms"]["no_splats"]}
    results = {r: suite.result(r) for r in arms["no_splats"]["runs"].values()}
    shown = titles(tables.states("t", {"arms": arms}, results))
    assert shown == ["Arm", "Sampled loss", "The same, settled", "Spread"]
