"""The recorded studies of docs/evidence: sound, and their decisions follow from their results."""

import json
import sys
from pathlib import Path

import pytest
import race_replay
from support.called import answered

from ebc_lab.study.store.bundle import unpack
from ebc_lab.study.store.replay import replay
from ebc_lab.study.store.verify import verify

ROOT = Path(__file__).parents[3]
# `make test` reads the first, one in seven, and not the last, which is as large as five others
ORDER = {"units_laptop": 0, "units": 2}
EVIDENCE = sorted(ROOT.glob("docs/evidence/*.zip"), key=lambda path: (ORDER.get(path.stem, 1), path.stem))


@pytest.mark.parametrize("path", EVIDENCE, ids=lambda path: path.stem)
def test_a_recorded_study_is_sound_and_its_decisions_follow_from_its_results(path, tmp_path):
    study = unpack(path, tmp_path / path.stem)
    assert verify(study)["ok"]
    assert replay(study)["same"]


EXTRAS = ("faiss", "peft", "safetensors", "sklearn", "tokenizers", "torchao", "transformers")


@pytest.fixture
def plain(monkeypatch):
    """An environment without what training needs beside the package's own libraries."""
    for module in EXTRAS:
        monkeypatch.setitem(sys.modules, module, None)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=p.stem, marks=() if p.stem == "untuned" else pytest.mark.slow) for p in EVIDENCE],
)
def test_a_recorded_study_is_read_where_what_trained_it_is_not_installed(path, tmp_path):
    state = json.loads(answered("status", str(path), "--json", cwd=tmp_path).stdout)
    assert state["state"].startswith("finished")
    assert {stage["state"] for stage in state["stages"]} == {"decided"}
    assert answered("why", str(path), cwd=tmp_path).stdout


@pytest.mark.usefixtures("plain", "undrawn")
def test_a_report_is_built_where_what_trained_the_study_is_not_installed(tmp_path):
    [path] = (path for path in EVIDENCE if path.stem == "finetune")
    answered("report", str(path), "--output", str(tmp_path / "unpacked"), cwd=tmp_path)


@pytest.mark.thorough
def test_racing_is_replayed_on_a_search_that_was_recorded_with_other_numerics(tmp_path, monkeypatch, capsys):
    for name, value in {"FIRSTS": (0.75,), "SIGMAS": (5.0,), "OTHERS": ()}.items():
        monkeypatch.setattr(race_replay, name, value)
    study = unpack(ROOT / "docs/evidence/stabilizers.zip", tmp_path / "stabilizers")
    race_replay.main([str(study.root)])
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.split()[3:9] == ["16", "of", "16", "16", "of", "16"]  # the same points chosen, and tried
    assert " 0.7% " in row
