"""What comes back from a mirror is what was written, or is named: nothing half-written is believed."""

import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.called import called, refused
from support.s3 import BUCKET

from ebc_lab.config.compose import compose
from ebc_lab.config.errors import UserError
from ebc_lab.records.json_files import read_json, with_checksum
from ebc_lab.study.mirror.place import Entry, Place, why
from ebc_lab.study.mirror.pull import pull
from ebc_lab.study.mirror.upload import kept_elsewhere, mirroring
from ebc_lab.study.store.changes import from_recorded
from ebc_lab.study.store.study import Study


def contents(root: Path) -> dict[str, bytes]:
    return {path: (root / path).read_bytes() for path in kept_elsewhere(root)}


def objects(mirrored, ending: str) -> list[str]:
    """The names, in the file system, of the files there of which the study calls one `…ending`."""
    place = Place(mirrored.address)
    names = place.fs.find(f"{place.root}/files")
    return [name for name in names if name.rpartition(".")[0].endswith(ending)]


def overwrite(mirrored, ending: str, change) -> str:
    """Replace one file there by what `change` makes of it; None removes it. -> the run that it is of."""
    fs, name = Place(mirrored.address).fs, objects(mirrored, ending)[0]
    content = change(fs.cat_file(name))
    fs.rm_file(name)
    if content is not None:
        fs.pipe_file(name, content)
    return name.split("/")[-2]


DAMAGE = {
    "damaged": lambda content: content[:-2] + bytes([content[-2] ^ 1]) + content[-1:],
    "truncated": lambda content: content[: len(content) // 2],
    "missing": lambda content: None,
}


def test_a_study_is_pulled_with_every_byte_and_then_needs_nothing_more(mirrored, tmp_path):
    mirrored.mirror()
    assert mirrored.said[-1].startswith("mirrored: ")
    told = pull(mirrored.config.study.mirror, tmp_path / "there")
    pulled = Study(tmp_path / "there" / "done")
    assert contents(pulled.root) == contents(mirrored.study.root)
    assert told["fetched"] == told["files"] > 20
    assert not told["damaged"]
    assert pull(mirrored.address, tmp_path / "there")["fetched"] == 0  # it is there already
    for name in (".lock", ".driver.json", ".command.json"):  # of that machine
        assert not (pulled.root / name).exists()


@pytest.mark.parametrize("how", DAMAGE)
def test_a_run_with_a_damaged_file_is_left_out_and_named(mirrored, tmp_path, how):
    mirrored.mirror()
    run = overwrite(mirrored, "steps.csv", DAMAGE[how])
    done = called("pull", mirrored.address, str(tmp_path / "there"), "--json", cwd=tmp_path)
    assert done.returncode == 4, done.stderr
    assert list(json.loads(done.stdout)["damaged"]) == [f"runs/{run}/steps.csv"]
    pulled = Study(tmp_path / "there" / "done")
    assert run not in [r for r in pulled.run_ids() if pulled.has_result(r)]
    assert len(pulled.run_ids()) >= len(mirrored.study.run_ids()) - 1


def test_a_damaged_study_json_is_refused_and_a_damaged_table_left_out(mirrored, tmp_path):
    mirrored.mirror()
    overwrite(mirrored, "summary_lr_sweep.csv", DAMAGE["truncated"])
    assert list(pull(mirrored.address, tmp_path / "a")["damaged"]) == ["summary_lr_sweep.csv"]
    overwrite(mirrored, "study.json", DAMAGE["truncated"])
    with pytest.raises(UserError, match=r"study\.json is not what was written"):
        pull(mirrored.address, tmp_path / "b")
    assert not (tmp_path / "b" / "done").exists()


def test_an_index_that_was_cut_off_leaves_the_one_before(mirrored, tmp_path):
    mirrored.mirror()
    before = contents(mirrored.study.root)
    (mirrored.study.root / "acceptance.md").write_text("changed\n")
    mirrored.mirror()
    place = Place(mirrored.address)
    latest = sorted(place.fs.ls(f"{place.root}/index", detail=False))[-1]
    place.fs.pipe_file(latest, place.fs.cat_file(latest)[:-100])
    pull(mirrored.address, tmp_path / "there")
    assert contents(tmp_path / "there" / "done") == before
    mirrored.mirror()  # and the next one is whole again
    pull(mirrored.address, tmp_path / "later")
    assert contents(tmp_path / "later" / "done") == contents(mirrored.study.root)


KILLED = """
import os, pickle, signal, sys
from ebc_lab.study.mirror import place
from ebc_lab.study.mirror.upload import mirroring

def half(self, files):
    [path, entry], content = max(files.items())
    self.fs.pipe_file(self._path(path, entry), content[: len(content) // 2] if self.local else content)
    os.kill(os.getpid(), signal.SIGKILL)

place.Place.write = half
with mirroring(*pickle.load(sys.stdin.buffer), print):
    pass
"""


@pytest.mark.thorough
def test_kill_9_in_the_middle_of_an_upload_leaves_the_state_before(mirrored, tmp_path):
    mirrored.mirror()
    before = contents(mirrored.study.root)
    for path in mirrored.study.root.glob("summary_*.csv"):
        path.write_text(path.read_text() + "\n")
    asked = pickle.dumps((mirrored.config, mirrored.study))
    done = subprocess.run([sys.executable, "-c", KILLED], input=asked, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pull(mirrored.address, tmp_path / "there")
    assert contents(tmp_path / "there" / "done") == before
    mirrored.mirror()
    pull(mirrored.address, tmp_path / "later")
    assert contents(tmp_path / "later" / "done") == contents(mirrored.study.root)
    assert len(Place(mirrored.address)._numbers()) == 2
    assert len(objects(mirrored, "summary_lr_sweep.csv")) <= 2  # what was cut off is swept


def test_a_pull_that_is_interrupted_goes_on_where_it_was(mirrored, tmp_path, monkeypatch):
    mirrored.mirror()
    fetch, calls = Place.fetch, []

    def cut_off(self, *file):
        calls.append(file)
        if len(calls) > 10:
            raise ConnectionError("the line is cut")
        return fetch(self, *file)

    monkeypatch.setattr(Place, "fetch", cut_off)
    with pytest.raises(UserError, match="the line is cut"):
        pull(mirrored.address, tmp_path / "there")
    assert not (tmp_path / "there" / "done").exists()
    monkeypatch.setattr(Place, "fetch", fetch)
    # what lies there half-written is fetched again
    half = next(p for p in (tmp_path / "there" / ".done.pull").rglob("*.*") if p.stat().st_size > 10)
    half.write_bytes(half.read_bytes()[:10])
    told = pull(mirrored.address, tmp_path / "there")
    assert told["fetched"] == told["files"] - 10 + 1
    assert contents(tmp_path / "there" / "done") == contents(mirrored.study.root)


def test_another_study_in_its_folder_is_not_overwritten(mirrored, tmp_path):
    mirrored.mirror()
    shutil.copytree(mirrored.study.root, tmp_path / "there" / "done")
    (tmp_path / "there" / "done" / ".mirror.json").unlink()
    decisions = tmp_path / "there" / "done" / "auto_decisions.json"
    decisions.write_text(decisions.read_text() + "\n")
    said = refused("pull", mirrored.address, str(tmp_path / "there"), cwd=tmp_path)
    assert "is another study, or is not as it is mirrored" in said


def test_who_went_on_elsewhere_shuts_the_first_folder_out(mirrored, tmp_path):
    mirrored.mirror()
    pull(mirrored.address, tmp_path / "there")
    with mirrored.running():  # the first folder goes on: what was pulled is out of date
        (mirrored.study.root / "acceptance.md").write_text("changed\n")
    second = type(mirrored)(mirrored.config, tmp_path / "there" / "done", mirrored.config.study.mirror)
    with pytest.raises(UserError, match="has gone on elsewhere since"):
        second.mirror()
    shutil.rmtree(tmp_path / "there")
    with mirrored.running():
        pull(mirrored.address, tmp_path / "there")
        with second.running():  # the second takes it over while the first still runs
            (mirrored.study.root / "acceptance.md").write_text("a late word of the first\n")
    assert any("is written by another folder now" in line for line in mirrored.said)
    index = Place(mirrored.address).latest()
    assert index.writer == read_json(second.study.mirror_file)["writer"]
    pull(mirrored.address, tmp_path / "last")
    assert contents(tmp_path / "last" / "done") == contents(second.study.root)


@pytest.mark.thorough
@pytest.mark.parametrize("address", ["folder", "s3"], indirect=True)
@pytest.mark.parametrize("later", [0, 3], ids=["its number taken", "its number free again"])
def test_of_two_that_begin_together_the_second_knows(mirrored, tmp_path, monkeypatch, later):
    """Both list the indexes before either writes one; the first may have gone on and swept by then."""
    publish = Place.publish
    mirrored.mirror()
    pull(mirrored.address, tmp_path / "second")
    second = type(mirrored)(mirrored.config, tmp_path / "second" / "done", mirrored.config.study.mirror)

    def first_the_other(*arguments):
        monkeypatch.setattr(Place, "publish", publish)
        for change in range(later + 1):
            (mirrored.study.root / "acceptance.md").write_text(f"change {change}\n")
            mirrored.mirror()
        return publish(*arguments)

    monkeypatch.setattr(Place, "publish", first_the_other)
    with pytest.raises(UserError, match="is being written by somebody else"):
        second.mirror()
    pull(mirrored.address, tmp_path / "there")
    assert contents(tmp_path / "there" / "done") == contents(mirrored.study.root)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("labs", "takes an address"),
        ("s3://key:secret@labs/x", "password"),
        ("s3://labs/x?secret=1", "is not an override"),
        ("'s3://labs/x?secret=1'", "password"),
        ("nowhere://labs", "fsspec knows no nowhere://"),
        ("gs://labs/x", "python -m pip install gcsfs"),
        ("file://labs", "from the root"),
        (f"s3://{BUCKET}-not-there/x", "specified bucket does not exist"),
        ("file:///proc/labs", "cannot be written"),
    ],
)
def test_a_wrong_address_is_refused_before_anything_is_written(s3, tiny, tmp_path, address, why):
    message = refused("autopilot", *tiny, f"output_dir={tmp_path}", f"study.mirror={address}", cwd=tmp_path)
    assert why in message
    assert "secret" not in message.replace("not-a-secret", "")


@pytest.mark.thorough
def test_the_address_is_no_part_of_the_study(finished, tiny):
    header = finished[1].study.header()
    assert "mirror" not in header["requested"]["study"] | header["config"]["study"]
    mirror = ["study.mirror=file:///somewhere", "study.mirror_every_s=1"]
    same = [*tiny, "launcher=inline", "study.name=done", *mirror]
    assert from_recorded(compose(same), header) == []


@pytest.mark.thorough
def test_without_a_study_pull_says_so_or_lets_a_new_one_begin(s3, tmp_path):
    assert "holds no study" in refused("pull", f"s3://{BUCKET}/none", str(tmp_path), cwd=tmp_path)
    done = called("pull", f"s3://{BUCKET}/none", str(tmp_path), "--if-there", cwd=tmp_path)
    assert (done.returncode, os.listdir(tmp_path)) == (0, [])


# -- indexes and what lies around them -----------------------------------------------------------------------

ENTRY = Entry("0" * 64, 3)


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(f"file://{tmp_path}/mirror/small")


def test_the_latest_index_is_the_last_that_is_whole_and_safe(place):
    assert place.latest() is None
    first = place.publish("s", "me", 0, {"b": ENTRY, "a": ENTRY})
    assert (first.number, list(first.files)) == (1, ["a", "b"])
    second = place.publish("s", "me", 1, {"a": ENTRY})
    assert place.latest() == second
    record = json.loads(place.fs.cat_file(place._index_path(2)))
    faults = {
        "a number that is not its name's": record,
        "another checksum": {**record, "number": 7},
        "a path out of the study": with_checksum({**record, "number": 7, "files": {"../a": ENTRY}}),
        "no files": with_checksum({"number": 7}),
        "no index": [],
    }
    for fault, content in faults.items():
        place.fs.pipe_file(place._index_path(7), json.dumps(content).encode())
        assert place.latest() == second, fault
    place.fs.pipe_file(f"{place.root}/index/notes.json", b"{}")
    place.fs.pipe_file(f"{place.root}/index/²³.json", b"{}")
    assert place._numbers() == [1, 2, 7]


def test_an_index_takes_the_next_number_unless_somebody_else_has_it(place):
    place.publish("s", "me", 4, {"a": ENTRY})
    again = place.publish("s", "me", 4, {"a": ENTRY})
    assert again.number == 5, "it was written, though no answer came"
    for writer, files in (("me", {}), ("you", {"a": ENTRY})):
        with pytest.raises(UserError, match="is being written by somebody else: choose another"):
            place.publish("s", writer, 4, files)
    place.fs.pipe_file(place._index_path(6), b"{")  # it was cut off
    assert place.publish("s", "me", 5, {}).number == 7
    with pytest.raises(UserError, match="is being written by somebody else"):
        place.publish("s", "me", 2, {})
    assert place._numbers() == [5, 6, 7], "nothing stays of an index that came too late"


def test_an_address_of_one_study_or_of_several_is_told_from_one_of_none(small, tmp_path, monkeypatch):
    lab = f"file://{tmp_path}/lab"

    def mirror(name: str, study: str = "", files=("study.json",)) -> Place:
        place = Place(f"{lab}/{name}")
        content = (small.root / "study.json").read_bytes()
        entry = Entry(hashlib.sha256(content).hexdigest(), len(content))
        place.write(dict.fromkeys(((path, entry) for path in files), content))
        place.publish(study or name, "me", 0, dict.fromkeys(files, entry))
        return place

    (tmp_path / "lab/empty").mkdir(parents=True)
    with pytest.raises(UserError, match=r"lab holds no study that was mirrored with study\.mirror"):
        pull(lab, tmp_path / "there")
    place = mirror("b")
    told = pull(f"{lab}/", tmp_path / "there")
    assert (told["study"], told["address"], told["mirror"]) == ("b", f"{lab}/b", lab)
    assert (told["files"], told["bytes"], told["fetched"]) == (1, 2, 1)
    assert told["root"] == str(tmp_path / "there/b")
    mirror("a")
    with pytest.raises(UserError, match=rf"lab holds 2 studies: name one of {lab}/a, {lab}/b\."):
        pull(lab, tmp_path / "there")
    assert pull(f"{lab}/a", tmp_path / "there")["fetched"] == 1
    for name, study, files, said in [
        ("c", "..", ("study.json",), "is not as ebc-lab writes it: its study has no plain name"),
        ("d", "d", ("acceptance.md",), "holds no study that was mirrored"),
    ]:
        mirror(name, study, files)
        with pytest.raises(UserError, match=said):
            pull(f"{lab}/{name}", tmp_path / "there")
    assert sorted(os.listdir(tmp_path / "there")) == [".a.pull.lock", ".b.pull.lock", "a", "b"]
    assert not place.holds_others()
    place.fs.pipe_file(f"{place.root}/something.txt", b"of somebody's")
    assert place.holds_others()


@pytest.mark.thorough
def test_what_is_here_already_is_not_fetched(small, tmp_path):
    address = f"file://{tmp_path}/mirror"
    config = compose(["scale=smoke", "device=cpu", f"study.mirror={address}"])
    with mirroring(config, small, print):
        pass
    said: list[str] = []
    assert pull(address, tmp_path, said.append)["fetched"] == 0
    assert said.pop() == f"{small.root} is what is mirrored there: nothing was fetched"
    there = tmp_path / "there"
    files = len(contents(small.root))
    assert pull(address, there, said.append)["fetched"] == files
    assert said == []
    assert pull(address, there, said.append)["fetched"] == 0
    assert said.pop() == f"{there / 'small'} has all of it already"
    (there / "small/runs/on/progress.json").write_text("of a run that goes on here")
    assert pull(address, there)["fetched"] == 0
    for change in ("acceptance.md", "study.json"):  # one more, or another
        (there / "small" / change).write_text("mine")
        with pytest.raises(UserError, match=r"small is another study, or is not as it is mirrored"):
            pull(address, there)
        (there / "small" / change).unlink()
    with pytest.raises(UserError, match=r"small is another study, or is not as it is mirrored"):
        pull(address, there)  # one less


def test_a_place_that_does_not_keep_what_is_written_is_refused_and_left_empty(place, monkeypatch):
    place.fs.makedirs(f"{place.root}/files")
    place.probe("token")
    assert place.fs.find(place.root) == []
    monkeypatch.setattr(type(place._fs), "cat_file", lambda self, path: b"something else")
    with pytest.raises(OSError, match="what was written is not what is read"):
        place.probe("token")


@pytest.mark.parametrize(
    ("error", "phrase"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (ConnectionError("no route\n  to host."), "no route to host"),
        (ValueError("x" * 301), "x" * 300),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_an_error_of_a_file_system_is_a_phrase_within_a_sentence(error, phrase):
    assert why(error) == phrase
