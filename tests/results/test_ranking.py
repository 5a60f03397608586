"""Arms over many studies: ranked where they were trained alike, and told why where not."""

import json
import re
import shutil

import pandas as pd
import pytest
from support.invented import invent
from support.recorded import EVIDENCE
from support.seen import as_text, assert_as_recorded

import ebc_lab
from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import ArmConfig
from ebc_lab.records.columns import BOARD_MEANINGS
from ebc_lab.records.json_files import read_checksummed, with_checksum, write_checksummed
from ebc_lab.study.stages.rules import SEAL
from ebc_lab.study.stages.statistics import paired
from ebc_lab.study.store.bundle import export
from ebc_lab.study.store.study import Study


def worse(by):
    """Every run of the finals is so much worse on the test split."""

    def fate(spec):
        return {"test_loss": 2.0 + by + 0.001 * spec.run.seed + 0.01 * ("ebc" not in spec.role)}

    return fate


@pytest.fixture(scope="module")
def folder(tmp_path_factory, text_file):
    """Studies: near and far alike, far with one more seed; other with another batch; begun without finals."""
    root = tmp_path_factory.mktemp("board")
    own = ["data=path", f"data.file={text_file}"]

    def study(name, by, *overrides, stages=None):
        settings = [*own, f"study.name={name}", *overrides]
        return invent(root, settings, fate=worse(by), stages=stages, drawn=False)

    study("near", 0.0)
    study("far", 0.5, "seeds=[0,1,2]")
    study("other", 0.2, "batch_size=16")
    study("begun", 0.1, stages=2)
    export(study("packed", 0.25), root / "apart.zip")
    (root / "packed").rename(root.parent / f"{root.name}_away")
    (root / "broken").mkdir()
    (root / "broken" / "study.json").write_text("{")
    return root


@pytest.fixture(scope="module")
def board(folder):
    return ebc_lab.board(folder)


def test_a_board_of_recorded_studies_is_as_it_was():
    names = ("default", "cautious", "as_run", "controls", "adam_8")
    found = ebc_lab.board(*(EVIDENCE / f"{name}.zip" for name in names))
    rows = [" | ".join(map(as_text, row)) for row in found.table.itertuples(index=False)]
    told = [" | ".join(found.table.columns), *rows, *repr(found).splitlines()[1 + len(rows) :]]
    assert_as_recorded("board", "\n".join(told))


def test_arms_of_alike_studies_are_ranked_together(board, folder):
    table = board.table
    assert list(table.columns) == list(BOARD_MEANINGS)
    first = table[table["group"] == "A"]
    assert set(first["study"]) == {"near", "far", "apart"}
    assert set(table[table["group"] == "B"]["study"]) == {"other"}
    assert first["rank"].tolist() == list(range(1, len(first) + 1))
    assert first["test_loss"].is_monotonic_increasing
    assert first.iloc[0]["study"] == "near"
    assert table.attrs["units"]["test_loss"] == "nats/token"


def test_an_arm_is_compared_with_the_best_on_the_seeds_that_both_have(board, folder):
    first = board.table[board.table["group"] == "A"]
    best, last = first.iloc[0], first.iloc[-1]
    assert (last["study"], last["seeds"], last["shared_seeds"]) == ("far", 3, 2)
    near, far = ebc_lab.load(folder / "near").runs(), ebc_lab.load(folder / "far").runs()

    def losses(runs, arm):
        own = runs[(runs["stage"] == "finals") & (runs["arm"] == arm)]
        return dict(zip(own["seed"].astype(str), own["test_loss"], strict=True))

    expected = paired(losses(far, last["arm"]), losses(near, best["arm"]))
    assert last["difference"] == pytest.approx(expected["mean"])
    assert last["difference_low"] == pytest.approx(expected["low"])
    mean = paired(losses(far, last["arm"]), dict.fromkeys(losses(far, last["arm"]), 0.0))
    assert (last["low"], last["high"]) == pytest.approx((mean["low"], mean["high"]))
    assert pd.isna(best["difference"])


def test_what_cannot_be_compared_is_told_with_the_reason(board):
    told = "\n".join(board.notes)
    assert re.search(r"group B is not ranked with A: batch 16×32 against 24×32\.", told)
    assert "the arms of group A share 2 of 3 seeds." in told
    assert re.search(r"begun is left out: no arm of it has been judged on the test split yet", told)
    assert re.search(r"broken is left out: .*is damaged", told)
    assert "batch 24×32; steps 60" in board.groups["A"]


def test_a_study_is_given_by_its_name_and_a_wrong_one_is_told_the_right_one(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "near", tmp_path / "outputs" / "ebc_ablation" / "near")
    assert set(ebc_lab.board("near").table["study"]) == {"near"}
    with pytest.raises(UserError, match=r"there is no study at .*neer \(did you mean near\?\)"):
        ebc_lab.board("neer")


def test_an_arm_of_which_no_run_ended_is_told(tmp_path, text_file):
    def fate(spec):
        failed = {"outcome": "failed", "cause": "hot.py:3: TypeError", "test_loss": None}
        return failed if spec.role == "hot" else {}

    arms = {"plain": ArmConfig(), "hot": ArmConfig(lr_scale=2.0)}
    invent(tmp_path, ["data=path", f"data.file={text_file}"], fate=fate, arms=arms, drawn=False)
    found = ebc_lab.board(tmp_path)
    assert set(found.table["arm"]) == {"plain"}
    [note] = [note for note in found.notes if "hot: no run ended" in note]
    assert "TypeError" in note


def test_a_study_and_its_bundle_count_once(folder, tmp_path):
    shutil.copytree(folder / "near", tmp_path / "near")
    export(Study(tmp_path / "near"))
    found = ebc_lab.board(tmp_path)
    assert len(found.table) == len(ebc_lab.load(folder / "near").arms().query("stage == 'finals'"))
    assert any("once more, and counts once" in note for note in found.notes)
    twice = ebc_lab.board(tmp_path / "near", tmp_path / "near")
    assert twice.table.equals(found.table)
    assert "near is the study near once more, and counts once." in twice.notes


def test_another_torch_or_numerics_is_told(folder, tmp_path):
    for name in ("here", "there"):
        shutil.copytree(folder / "near", tmp_path / name)
    header = read_checksummed(tmp_path / "there" / "study.json", "")
    header["environment"] |= {"torch": "1.0"}
    write_checksummed(tmp_path / "there" / "study.json", header | {"created": "later"})
    found = ebc_lab.board(tmp_path)
    assert set(found.table["group"]) == {"A"}
    [note] = [note for note in found.notes if "trained by" in note]
    assert "torch 1.0, numerics" in note


def test_a_study_with_a_word_for_a_rate_is_left_out(folder, tmp_path):
    for name in ("near", "far"):
        shutil.copytree(folder / name, tmp_path / name)
    path = tmp_path / "near" / "auto_decisions.json"
    decisions = json.loads(path.read_text())
    for track in decisions["finals"]["tracks"].values():
        for arm in track["arms"].values():
            arm["lr"] = "|"
    decisions["finals"] = with_checksum(decisions["finals"], SEAL)
    path.write_text(json.dumps(decisions))
    found = ebc_lab.board(tmp_path)
    assert set(found.table["study"]) == {"far"}
    assert any("near is left out: a file of study near" in note for note in found.notes)


def test_a_board_is_json_and_html_and_says_when_there_is_nothing(board, tmp_path):
    told = json.loads(json.dumps(board.as_json(), allow_nan=False))
    assert len(told["arms"]) == len(board.table)
    assert told["arms"][0]["difference"] is None
    assert "<table" in board._repr_html_()
    assert "group B" in repr(board)
    with pytest.raises(UserError, match="there is no study in"):
        ebc_lab.board(tmp_path)


def test_the_same_runs_asked_for_in_another_order_of_seeds_count_once(tmp_path, text_file):
    settings = ["data=path", f"data.file={text_file}"]
    for name, seeds in (("one", "[0,1]"), ("turned", "[1,0]")):
        invent(tmp_path, [*settings, f"study.name={name}", f"seeds={seeds}"], fate=worse(0.0), drawn=False)
    found = ebc_lab.board(tmp_path).table
    assert {frozenset(study.split(", ")) for study in found["study"]} == {frozenset(("one", "turned"))}
