"""The stage carry for real, at the smallest size: trained, decided, shown, and read by every command."""

import json

import pandas as pd
import pytest
from support.played import CARRY

from ebc_lab.cli import screen
from ebc_lab.config.compose import compose
from ebc_lab.records.columns import UNIT_MEANINGS
from ebc_lab.report.conclude import concluding
from ebc_lab.study.autopilot import autopilot
from ebc_lab.study.inspect.status import status
from ebc_lab.study.inspect.why import why
from ebc_lab.study.store.replay import replay
from ebc_lab.study.store.verify import verify

CUT = {  # of the suite: two arms, three settings, two constants
    "kl": "carry.arms.kl.grid=[0.02,0.04]",
    "radius": "carry.arms.radius.grid=[0.5,1]",
}


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """What was said, and the study: one of its settings has a text of its own."""
    folder = tmp_path_factory.mktemp("carry")
    lines = CARRY.read_text().splitlines()
    others = ("    lr", "    long:", "    muon:")
    suite = [line for line in lines if not line.startswith(others)]
    (folder / "small.yaml").write_text("\n".join([*suite, "    docs: {settings: {data: {name: pydoc}}}\n"]))
    own = [f"study={folder / 'small.yaml'}", *CUT.values(), "carry.max_extensions=0", "carry.steps=6"]
    more = ["launcher=inline", "dtype=float32", "compile=off", "threads_per_run=1"]
    said: list[str] = []
    config = compose([*tiny, *own, *more, f"output_dir={folder}"])
    return said, autopilot(config, concluding(say=said.append))


@pytest.mark.thorough
def test_a_constant_is_carried_and_every_command_reads_it(trained, results_schema, capsys):
    said, outcome = trained
    study = outcome.study
    assert any("docs has data of its own, pydoc" in line for line in said)
    specs = [json.loads(path.read_text())["config"] for path in study.runs.glob("*/spec.json")]
    texts = {spec["data"]["name"]: spec["data"]["sha256"] for spec in specs}
    assert len(specs) == 2 * 3 * 2 * 2
    assert set(texts) == {"path", "pydoc"}
    assert len(set(texts.values())) == 2
    table = pd.read_csv(study.units_file)
    assert list(table.columns) == list(UNIT_MEANINGS)
    assert table[["arm", "setting"]].drop_duplicates().shape[0] == 2 * 3
    assert table["constant"].notna().all()
    assert verify(study)["ok"]
    assert replay(study)["same"]
    assert status(study)["state"] == "finished"
    results_schema.validate(json.loads(study.results_file.read_text()))
    screen.why(screen.Console(width=160), why(study, None), None)
    shown = capsys.readouterr().out
    assert "One constant of each unit in every setting" in shown
    page = study.page_file.read_text()
    assert "Which of two units carries?" in page
    assert "What does a constant lose in a setting that it was not chosen on?" in page
    assert "No answer yet" not in page
    assert {path.stem for path in study.root.glob("carried_*.png")} == {
        "carried_excess",
        "carried_optima",
    }
