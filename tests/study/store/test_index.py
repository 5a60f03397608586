"""The index of a study's runs: never believed over their files, whatever becomes of either."""

import os
import random
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import pytest

from ebc_lab.config.errors import UserError
from ebc_lab.records.json_files import as_json, read_json, write_checksummed
from ebc_lab.records.locks import run_lock
from ebc_lab.study.inspect.compare import compare
from ebc_lab.study.inspect.forecast import expected_left
from ebc_lab.study.inspect.status import status
from ebc_lab.study.inspect.why import why
from ebc_lab.study.store import bundle, index
from ebc_lab.study.store.study import Study
from ebc_lab.study.store.verify import verify

NEVER = 10**9  # runs that no study has


@pytest.fixture
def small(monkeypatch):
    """A study of any size has an index, and files count at once."""
    monkeypatch.setattr(index, "LEAST", 1)
    monkeypatch.setattr(index, "SETTLED_S", 0.0)


@pytest.fixture
def study(small, finished, tmp_path) -> Study:
    copy = Study(tmp_path / "out" / "done")
    shutil.copytree(finished[1].study.root, copy.root)
    copy.note_command(["ebc-lab", "autopilot"])
    return copy


def asked(question):
    try:
        return as_json(question())
    except UserError as error:
        return str(error)


def answers(study: Study):
    """What is said of a study, and the runs that it is said of."""
    briefs = [(r.brief.run_id, r.brief.outcome, r.problem) for r in index.Index(study).records]
    return [briefs, *(asked(q) for q in (lambda: status(study), lambda: why(study, None)))]


def by_files(study: Study):
    """The same without an index."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "LEAST", NEVER)
        return answers(study)


def rewritten(path: Path, draw: random.Random) -> None:
    """A result with another loss or without an outcome, and a right checksum; a damaged one stays."""
    loss = {"val_loss": draw.random()} if draw.random() < 0.5 else {"outcome": "lost", "cause": "x"}
    with suppress(UserError):
        write_checksummed(path, read_json(path) | loss)


def changed_in_place(path: Path, draw: random.Random) -> None:
    """As many bytes as before, and the time of the last change put back."""
    about = path.stat()
    content = bytearray(path.read_bytes())
    place = draw.randrange(len(content))
    content[place] = draw.choice(b"0123456789{\xff")
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


def edits(study: Study, other: Path, draw: random.Random):
    """Everything that may happen to a study's files between two questions, by name."""
    run = study.run_files(draw.choice(study.run_ids()))
    made = study.index_file
    return {
        "result removed": lambda: run.result.unlink(missing_ok=True),
        "result replaced": lambda: run.result.exists() and rewritten(run.result, draw),
        "result cut off": lambda: run.result.exists() and os.truncate(run.result, draw.randrange(300)),
        "result edited": lambda: run.result.exists() and changed_in_place(run.result, draw),
        "spec removed": lambda: run.spec.unlink(missing_ok=True),
        "spec edited": lambda: run.spec.exists() and changed_in_place(run.spec, draw),
        "attempts removed": lambda: run.attempts.unlink(missing_ok=True),
        "run removed": lambda: shutil.rmtree(run.directory),
        "decisions removed": lambda: study.decisions_file.unlink(missing_ok=True),
        "index removed": lambda: made.unlink(missing_ok=True),
        "index empty": lambda: made.write_bytes(b""),
        "index all junk": lambda: made.write_bytes(draw.randbytes(5000)),
        "index part junk": lambda: made.exists() and changed_in_place(made, draw),
        "index of another": lambda: shutil.copy2(other, made),
        "nothing": lambda: None,
    }


MANY = [pytest.param(seed, 30, marks=pytest.mark.slow) for seed in range(100, 120)]


@pytest.mark.thorough
@pytest.mark.parametrize(("seed", "steps"), [(0, 8), (1, 8), (2, 8), *MANY])
def test_whatever_happens_to_the_files_the_answers_are_theirs(study, seed, steps, tmp_path):
    draw = random.Random(seed)
    answers(study)
    other = tmp_path / "other"
    shutil.copy2(study.index_file, other)
    for _ in range(steps):
        possible = edits(study, other, draw)
        edit = draw.choice(sorted(possible))
        possible[edit]()
        expected = by_files(study)
        assert answers(study) == expected, edit  # by an index that is behind
        assert answers(study) == expected, edit  # and by one that was just mended


def test_runs_that_are_as_they_were_are_not_read_again(study, monkeypatch):
    expected = answers(study)
    monkeypatch.setattr(Study, "record", None)
    monkeypatch.setattr(Study, "result", None)
    assert answers(study) == expected
    assert compare(study, study)["runs"]["different"] == {}


def test_an_unfinished_study_is_not_planned_again_while_nothing_happens_to_it(study, monkeypatch):
    finals = [study.run_files(r) for r in study.run_ids() if study.spec(r)["stage"] == "finals"]
    study.decisions_file.unlink()
    finals[0].result.unlink()
    with run_lock(finals[0].directory):  # a worker is still on it, though its driver is gone
        before = status(study)
        assert (before["state"], before["stages"][-1]["outcomes"]["open"]) == ("interrupted", 1)
    monkeypatch.setattr("ebc_lab.study.inspect.status.expected_left", asked := Mock(wraps=expected_left))
    assert status(study) == before
    assert status(study) == before
    assert asked.call_count == 1
    finals[1].result.unlink()
    assert status(study)["stages"][-1]["outcomes"]["open"] == 2


def test_a_young_file_may_still_change_and_is_not_indexed(study, monkeypatch):
    monkeypatch.setattr(index, "SETTLED_S", 3600.0)
    expected = answers(study)
    assert index.ROWS.decode(index._read(study).rows) == {}
    assert answers(study) == expected


def test_an_index_is_no_part_of_a_study_and_a_small_study_gets_none(study, monkeypatch, tmp_path):
    answers(study)
    assert study.index_file.exists()
    assert verify(study)["ok"]
    with zipfile.ZipFile(bundle.export(study, tmp_path / "x.zip")["bundle"]) as packed:
        assert study.index_file.name not in packed.namelist()
    study.index_file.unlink()
    monkeypatch.setattr(index, "LEAST", NEVER)
    status(study)
    assert not study.index_file.exists()


def test_who_may_not_write_leaves_no_index_and_what_is_in_its_way_stays(study, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        assert answers(study) == by_files(study)
    assert not study.index_file.exists()
    study.index_file.mkdir()
    assert answers(study) == by_files(study)
    assert study.index_file.is_dir()
