"""`study=determinism` for real, at the smallest size: trained, decided, shown, and read by every command."""

import json
import os
import shutil
import subprocess

import pandas as pd
import pytest
from support.called import CLI
from support.invented import RESOLVED, invent

from ebc_lab.config.compose import compose
from ebc_lab.config.machine import capabilities
from ebc_lab.records.columns import MODE_MEANINGS
from ebc_lab.records.json_files import read_checksummed, write_checksummed
from ebc_lab.study.inspect.compare import compare
from ebc_lab.study.inspect.status import status
from ebc_lab.study.resolve import resolve_study
from ebc_lab.study.stages import circumstances
from ebc_lab.study.store.replay import replay
from ebc_lab.study.store.study import Study
from ebc_lab.study.store.verify import verify


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """What the command said, and the study: two modes in four circumstances each."""
    folder = tmp_path_factory.mktemp("circumstances")
    own = [o for o in tiny if not o.startswith(("lr_s", "cal", "fin"))]
    own += ["circumstances.modes=[none,verity]", "circumstances.threads=[1]", "circumstances.parts=[1,2]"]
    own += ["circumstances.steps=6", "launcher.slots=1", f"output_dir={folder}"]
    own += [f"circumstances.capabilities=[{','.join(capabilities()[:2])}]"]
    command = [*CLI, "autopilot", "study=determinism", *own]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "160"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, Study(folder / "determinism")


@pytest.mark.thorough
def test_verity_ends_with_the_same_weights_and_plain_training_does_not(trained):
    said, study = trained
    each = 2 * len(capabilities()[:2])
    table = pd.read_csv(study.modes_file).set_index("mode")
    assert list(pd.read_csv(study.modes_file).columns) == list(MODE_MEANINGS)
    assert table["completed"].tolist() == table["runs"].tolist() == [each, each]
    assert table["checksums"]["verity"] == 1
    assert table["loss_range"]["verity"] == 0
    assert 1 < table["checksums"]["none"] <= each
    assert (table["steps_per_s"] > 0).all()
    assert "The same run under each mode" in said
    assert "distinct checksums" in said
    assert "shows nothing" not in said
    sums = {json.loads(p.read_text())["weights_checksum"] for p in study.runs.glob("*verity*/result.json")}
    assert len(sums) == 1


@pytest.mark.thorough
def test_every_command_reads_it(trained, results_schema):
    _, study = trained
    assert verify(study)["ok"]
    assert replay(study)["same"]
    state = status(study)
    assert state["state"] == "finished"
    assert state["stages"][0]["outcomes"] == {"completed": len(study.run_ids())}
    page = study.page_file.read_text()
    for words in ("One run in many circumstances", "The same bits under verity."):
        assert words in page
    results_schema.validate(json.loads(study.results_file.read_text()))


@pytest.mark.thorough
def test_diff_says_where_the_weights_are_not_the_same(trained, tmp_path):
    """The same run, recorded elsewhere with other weights."""
    _, study = trained
    shutil.copytree(study.root, tmp_path / "other")
    other = Study(tmp_path / "other")
    first = other.run_files(other.run_ids()[0]).result
    write_checksummed(first, {**read_checksummed(first, ""), "weights_checksum": "0" * 16})
    runs = compare(study, other)["runs"]
    assert runs["weights"] == {"compared": runs["common"], "equal": runs["common"] - 1}
    assert list(runs["different"]) == [other.run_ids()[0]]
    shown = subprocess.run([*CLI, "diff", str(study.root), str(other.root)], capture_output=True, text=True)
    told = f"{runs['common'] - 1} of {runs['common']} with the same weights_checksum"
    assert told in " ".join(shown.stdout.split()), shown.stdout + shown.stderr


@pytest.mark.thorough
def test_a_study_keeps_the_instructions_of_the_machine_that_began_it(tiny, tmp_path, monkeypatch):
    asked = [*tiny, "study=determinism", "circumstances.parts=[1]"]
    study = invent(tmp_path, asked, stages=0)
    began_with = study.header()["config"]["circumstances"]["capabilities"]
    assert began_with == list(capabilities())
    monkeypatch.setattr(circumstances, "capabilities", lambda: ("default",))
    said: list[str] = []
    config = compose([*RESOLVED, *asked, f"output_dir={tmp_path}"])
    again, _ = resolve_study(config, study, said.append, force=False)
    assert again.circumstances.capabilities == began_with
    assert said == []
