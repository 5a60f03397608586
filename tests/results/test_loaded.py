"""A study as data: the same tables by name, folder and bundle, typed, with units, and never by running it."""

import json
import shutil
import subprocess
import sys
import zipfile
from xml.etree import ElementTree

import pandas as pd
import pytest
from support.recorded import EVIDENCE
from support.seen import assert_as_recorded, page_text, table_text

import ebc_lab
from ebc_lab.config.errors import UserError
from ebc_lab.records.columns import ARM_MEANINGS, COLUMN_MEANINGS, DIFFERENCE_MEANINGS, RUN_MEANINGS
from ebc_lab.records.json_files import read_checksummed, write_checksummed
from ebc_lab.report.text.summaries import summary
from ebc_lab.study.stages.stage import stage_of
from ebc_lab.study.store.bundle import export
from ebc_lab.study.store.study import Study

TABLES = ("runs", "arms", "differences", "steps", "evals")


@pytest.fixture(scope="session")
def study(finished):
    return finished[1].study


@pytest.fixture(scope="session")
def bundle(study, tmp_path_factory):
    path = tmp_path_factory.mktemp("bundles") / "done.zip"
    export(study, path)
    return path


def test_a_study_is_the_same_by_name_folder_and_bundle(study, bundle):
    by_name = ebc_lab.load(study.name, output_dir=study.root.parent)
    for other in (ebc_lab.load(study.root), ebc_lab.load(str(bundle))):
        for table in TABLES:
            pd.testing.assert_frame_equal(getattr(by_name, table)(), getattr(other, table)())
        assert other.decisions == by_name.decisions
        pd.testing.assert_frame_equal(other.verdict, by_name.verdict)
        assert (other.name, other.state, other.answer) == ("done", "finished", by_name.answer)
        assert other.config == by_name.config


@pytest.mark.parametrize("name", ["default", "cautious", pytest.param("ladder", marks=pytest.mark.thorough)])
def test_a_recorded_study_is_told_as_it_was(name):
    found = ebc_lab.load(EVIDENCE / f"{name}.zip")
    with pd.option_context("display.width", 200):
        parts = {"repr": repr(found), "card": page_text(found._repr_html_()), "answer": found.answer}
    told = {name: getattr(found, name)() for name in ("runs", "arms", "differences")}
    parts |= {name: table_text(table) for name, table in (told | {"verdict": found.verdict}).items()}
    assert_as_recorded(f"loaded_{name}", "\n\n".join(f"==== {k}\n{text}" for k, text in parts.items()))


def test_a_study_that_is_held_runs_and_one_that_is_damaged_says_so_as_a_card(own_copy):
    _, study = own_copy
    with study.held():
        assert ebc_lab.load(study.root).state == "running"
    loaded = ebc_lab.load(study.root)
    study.decisions_file.write_text("{")
    assert "is damaged" in loaded._repr_html_()
    assert "is damaged" in repr(loaded)


def test_runs_say_what_the_tables_of_the_study_say(study, resolved):
    found = ebc_lab.load(study.root).runs().set_index("run_id")
    decisions = study.decisions()
    for stage in ("calibrate", "finals"):
        specs = stage_of(stage).runs(resolved, decisions, study.results_of(decisions[stage]))
        own = summary(specs, study.results(specs)).set_index("run_id")
        for column in ("arm", "seed", "lr", "lr_scale", "lr_schedule", "warmup_steps", "val_loss", "stage"):
            told = found.loc[own.index, column]
            assert told.isna().tolist() == own[column].isna().tolist(), column
            kept = told.notna()
            assert told[kept].tolist() == own[column][kept.to_numpy()].tolist(), column


def test_arms_and_differences_are_the_decisions(study):
    s = ebc_lab.load(study.root)
    finals = s.arms().query("stage == 'finals'").set_index("arm")
    track = s.decisions["finals"]["tracks"]["adam_none"]
    assert set(finals.index) == set(track["arms"])
    for name, arm in track["arms"].items():
        assert finals.loc[name, "test_loss"] == pytest.approx(arm["test_loss"])
        assert finals.loc[name, "lr_schedule"] == arm["lr_schedule"]
        assert finals.loc[name, "seeds"] == len(arm["runs"])
    told = s.differences()
    own = told[told["family"] == "control"].set_index("arm")
    for name, difference in track["differences"]["control"].items():
        assert own.loc[name, "reference"] == track["roles"]["control"]
        assert own.loc[name, "joint_low"] == pytest.approx(difference["joint_low"])
        assert own.loc[name, "judged"] == difference["judged"]
    assert s.verdict["name"].tolist() == [line["name"] for line in track["verdict"]]


def test_tables_are_typed_and_say_their_units_also_when_empty(study, tmp_path):
    s = ebc_lab.load(study.root)
    (tmp_path / "begun").mkdir()
    shutil.copy(study.root / "study.json", tmp_path / "begun")
    begun = ebc_lab.load(tmp_path / "begun")
    for table, meanings in (
        ("runs", RUN_MEANINGS),
        ("arms", ARM_MEANINGS),
        ("differences", DIFFERENCE_MEANINGS),
    ):
        full, empty = getattr(s, table)(), getattr(begun, table)()
        assert list(full.columns) == list(empty.columns) == list(meanings)
        assert full.dtypes.map(str).tolist() == empty.dtypes.map(str).tolist()
        assert "object" not in set(full.dtypes.map(str))
        assert full.attrs["units"] == {name: unit for name, (unit, _) in meanings.items()}
        assert len(empty) == 0 < len(full)
    for table in ("steps", "evals"):
        full, empty = getattr(s, table)(), getattr(begun, table)()
        assert set(empty.columns) <= set(full.columns)
        assert full.dtypes[list(empty.columns)].map(str).tolist() == empty.dtypes.map(str).tolist()
    assert s.runs()["warmup_steps"].dtype == "Int64"
    assert s.runs().attrs["meanings"]["lr"] == COLUMN_MEANINGS["lr"][1]
    assert (begun.state, begun.answer) == ("empty", "nothing is decided yet")


def test_steps_and_evals_of_an_arm_a_seed_a_run(study):
    s = ebc_lab.load(study.root)
    [row] = s.runs().query("stage == 'finals' and role == 'ebc_x2' and seed == 1").to_dict("records")
    steps = s.steps(arm=row["arm"], seed=1)
    assert steps["step"].tolist() == list(range(row["steps"]))
    pd.testing.assert_frame_equal(steps, s.steps(run_id=row["run_id"]))
    assert (steps["target_kl"] > 0).all()
    assert steps.attrs["units"]["target_kl"] == "nats/token"
    evals = s.evals(arm=row["arm"])
    assert sorted(evals["seed"].unique()) == [0, 1]
    assert evals["step"].max() == row["steps"]
    with pytest.raises(UserError, match=r"no training run with arm adam_none_baselin \(did you mean"):
        s.steps(arm="adam_none_baselin")
    with pytest.raises(UserError, match="no training run with seed 99"):
        s.evals(seed=99)


def test_what_is_not_there_or_damaged_is_told_in_a_sentence(study, own_copy, tmp_path):
    with pytest.raises(UserError, match=r"there is no study at .*don \(did you mean done\?\)"):
        ebc_lab.load("don", output_dir=study.root.parent)
    with pytest.raises(UserError, match="there is no study at"):
        ebc_lab.load(tmp_path)
    with pytest.raises(UserError, match="there is no file"):
        ebc_lab.load(tmp_path / "none.zip")
    (tmp_path / "bad.zip").write_bytes(b"PK, but no zip")
    with pytest.raises(UserError, match="is damaged"):
        ebc_lab.load(tmp_path / "bad.zip")
    _, copy = own_copy
    [one, two] = [r.run_id for r in copy.records() if "_n25_s0-" in r.run_id][:2]
    (copy.run_dir(one) / "result.json").write_text("{")
    path = copy.run_dir(two) / "result.json"
    write_checksummed(path, {**read_checksummed(path, ""), "outcome": "won"})
    decisions = json.loads(copy.decisions_file.read_text())
    decisions["calibrate"]["form"] = 0
    copy.decisions_file.write_text(json.dumps(decisions))
    s = ebc_lab.load(copy.root)
    runs = s.runs().set_index("run_id")
    assert runs.loc[one, "problem"].startswith(str(path.parent.parent))
    assert pd.isna(runs.loc[one, "val_loss"])
    assert runs["problem"].notna().sum() == 2
    assert "calibrate" not in s.decisions
    assert len(s.problems) == 3
    header = copy.header_file.read_text()
    copy.header_file.write_text(header.replace('"scale": "smoke"', '"scale": "paper"'))
    with pytest.raises(UserError, match="edited after it was written"):
        ebc_lab.load(copy.root)


def test_the_card_is_well_formed_and_escaped(study, own_copy):
    s = ebc_lab.load(study.root)
    card = ElementTree.fromstring(f"<main>{s._repr_html_()}</main>")
    assert {"table", "td", "th"} <= {element.tag for element in card.iter()}
    text = "".join(card.itertext())
    assert "Study done" in text
    assert "adam_none_baseline_x1" in text
    assert repr(s).startswith("<study done: finished, ")
    _, copy = own_copy
    header = read_checksummed(copy.header_file, "")
    header["corpus"]["title"] = "<script>alert(1)</script>"
    write_checksummed(copy.header_file, header)
    shown = ebc_lab.load(copy.root)._repr_html_()
    assert "<script" not in shown
    assert "&lt;script&gt;" in shown


SEEN = """
import sys, ebc_lab
s = ebc_lab.load(sys.argv[1])
for made in (s.runs(), s.arms(), s.differences(), s.verdict, s.steps(seed=0), s.evals(seed=0)):
    assert len(made)
s._repr_html_()
print([name for name in ("torch", "scipy", "matplotlib", "hydra") if name in sys.modules])
"""


def test_loading_imports_neither_torch_nor_what_draws(study):
    done = subprocess.run(
        [sys.executable, "-c", SEEN, str(study.root)], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_nothing_of_a_study_is_executed(own_copy, tmp_path):
    """A file of a study that is Python, or a pickle, is not opened as such."""
    _, copy = own_copy
    (copy.root / "own").mkdir(exist_ok=True)
    mark = tmp_path / "executed"
    planted = f"open({str(mark)!r}, 'w')\n"
    for name in ("own/my_opt.py", "conftest.py", "study.py", "pandas.py"):
        (copy.root / name).write_text(planted)
    for run in copy.run_ids():
        (copy.run_dir(run) / "model.pt").write_bytes(b"cbuiltins\neval\n(V" + planted.encode() + b"tR.")
    s = ebc_lab.load(copy.root)
    assert len(s.runs())
    assert len(s.steps())
    assert s.answer
    assert not mark.exists()


def test_a_bundle_is_gone_when_its_results_are(bundle):
    s = ebc_lab.load(bundle)
    root = s.root
    assert Study(root).exists()
    assert zipfile.is_zipfile(bundle)
    del s
    assert not root.exists()


def test_of_runs_of_another_version_the_settings_are_told_that_every_version_has(study, tmp_path):
    shutil.copytree(study.root, tmp_path / "done")
    for path in (tmp_path / "done" / "runs").glob("*/spec.json"):
        spec = json.loads(path.read_text())
        path.write_text(json.dumps(spec | {"config": spec["config"] | {"of_another_version": 1}}))
    columns = ["seed", "lr", "optimizer", "projection", "stabilizer", "delta_star"]
    found, expected = (ebc_lab.load(root).runs()[columns] for root in (tmp_path / "done", study.root))
    pd.testing.assert_frame_equal(found, expected)
    assert found.delta_star.notna().any()
