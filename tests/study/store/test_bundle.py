import hashlib
import json
import os
import random
import shutil
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from rocrate.rocrate import ROCrate
from support.called import CLI, answered, called, refused
from support.drivers import site

import ebc_lab
from ebc_lab.config import identity
from ebc_lab.config.errors import UserError
from ebc_lab.records.json_files import with_checksum
from ebc_lab.report.conclude import report
from ebc_lab.study.inspect.status import status
from ebc_lab.study.inspect.why import why
from ebc_lab.study.store import attempts, bundle, manifest, snapshot
from ebc_lab.study.store.find import find
from ebc_lab.study.store.replay import replay
from ebc_lab.study.store.reuse import remaining_work
from ebc_lab.study.store.study import Study


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "done.zip"
    bundle.export(finished[1].study, path)
    return path


def contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as found:
        return {name: found.read(name) for name in found.namelist()}


def made_again(path: Path, files: dict[str, bytes]) -> Path:
    """A bundle that a careless editor's own script wrote: every byte in its place, other contents."""
    names = sorted(files, key=lambda name: (name != "manifest.json", name))
    with open(path, "wb") as out:
        bundle.pack(out, ((name, files[name]) for name in names))
    return path


def wrong(path: Path) -> dict[str, str]:
    found = bundle.verify(path)
    assert found["ok"] == (not found["bad"])
    return {b["file"]: b["what"] for b in found["bad"]}


@pytest.fixture
def small(tmp_path) -> Path:
    """An archive of a few bytes that `verify` can check a thousand times; no study is in it."""
    pixels = random.Random(0).randbytes(60)  # which do not compress
    files = {"empty.md": b"", "runs/a/steps.csv": b"1,2\n" * 50, "lr.png": pixels}
    recorded = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    files[manifest.NAME] = manifest.content_for(recorded)
    return made_again(tmp_path / "small.zip", files)


def packed_data(path: Path) -> dict[range, str]:
    """The bytes of an archive in which each file lies -> its name."""
    with zipfile.ZipFile(path) as found:
        starts = {info.header_offset + 30 + len(info.filename): info for info in found.infolist()}
        return {range(at, at + info.compress_size): info.filename for at, info in starts.items()}


@pytest.mark.thorough
def test_a_bundle_holds_what_the_manifest_records_and_the_same_study_gives_the_same_bytes(
    finished, exported, tmp_path
):
    study = finished[1].study
    found = contents(exported)
    assert set(found) == {"manifest.json", *manifest.read(study.root)["files"]}
    assert all((study.root / name).read_bytes() == content for name, content in found.items())
    copy = tmp_path / "elsewhere" / "done"
    shutil.copytree(study.root, copy, copy_function=shutil.copyfile)
    again = bundle.export(Study(copy), tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == exported.read_bytes()
    assert again["sha256"] == manifest.sha256_of(exported)
    assert again["files"] == len(found) - 1 == bundle.verify(exported)["files"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.thorough
def test_a_bundle_is_an_ro_crate(exported, tmp_path):
    """As another library reads it: rocrate."""
    folder = tmp_path / "done"
    shutil.unpack_archive(exported, folder)
    crate = ROCrate(folder)
    recorded = manifest.read(folder)["files"]
    files = {entity.id: entity for entity in crate.data_entities if entity.type == "File"}
    assert set(files) == {"manifest.json", *recorded} - {"ro-crate-metadata.json"}
    del files["manifest.json"]
    for name, entity in files.items():
        size = str((folder / name).stat().st_size)
        assert (entity["sha256"], entity["contentSize"]) == (recorded[name], size)
        assert entity["encodingFormat"] != "application/octet-stream", name
    header = json.loads((folder / "study.json").read_text())
    action = crate.dereference("#study")
    assert action["instrument"]["version"] == ebc_lab.__version__
    assert header["corpus"]["sha256"] in crate.dereference("#corpus")["identifier"]
    ends = [event["at"] for run in (folder / "runs").iterdir() for event in attempts.log(run)]
    assert crate.root_dataset["datePublished"] == action["endTime"] == max(ends)
    assert action["startTime"][:19] == header["created"][:19]


def test_a_bundle_is_as_recorded_and_can_be_held_against_a_published_sha256(exported):
    own = manifest.sha256_of(exported)
    found = bundle.verify(exported, own.upper())
    assert (found["ok"], found["under_way"], found["sha256"]) == (True, False, own)
    assert found["files"] == len(contents(exported)) - 1
    [bad] = bundle.verify(exported, "0" * 64)["bad"]
    assert bad["what"] == f"its sha256 is {own}, and {'0' * 64} was expected"
    with pytest.raises(UserError, match="64 hex digits"):
        bundle.verify(exported, "abc")


def assert_whole_or_named(path: Path, whole: dict[str, bytes]) -> dict[str, str]:
    found = wrong(path)
    if not found:  # a date, a permission, bytes that no unpacking looks at
        assert contents(path) == whole
    return found


def test_any_bit_flipped_byte_added_or_end_cut_off_is_noticed_where_it_changes_what_is_in_a_file(
    small, tmp_path
):
    raw, data, whole = small.read_bytes(), packed_data(small), contents(small)
    path = tmp_path / "done.zip"
    draw = random.Random(1)
    for at in range(len(raw)):
        damaged = bytearray(raw)
        damaged[at] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        found = assert_whole_or_named(path, whole)
        lies_in = next((name for place, name in data.items() if at in place), None)
        assert not (found and lies_in) or list(found) == [lies_in], (at, found)
    for at in (0, *(place.start for place in data), len(raw) // 2, len(raw)):
        path.write_bytes(raw[:at] + b"\0" + raw[at:])
        assert_whole_or_named(path, whole)
    for cut in range(0, len(raw), 7):
        path.write_bytes(raw[:cut])
        assert list(wrong(path)) == [bundle.ARCHIVE], cut


def test_what_unpacks_to_very_much_more_is_not_unpacked(small, tmp_path):
    path = made_again(tmp_path / "bomb.zip", {**contents(small), "runs/c/steps.csv": bytes(4 << 20)})
    assert "more than 200 times its packed size" in wrong(path)["runs/c/steps.csv"]


LONG = ["a/" * 1500 + "b", "n" * 5000, "n" * 300]
OUTSIDE = ["../out.txt", "/out.txt", "runs/../../out.txt", "a//b", "a\\b", "C:x", "runs/./x"]


@pytest.mark.parametrize("name", [*LONG, "a\x1b[2J", "a\u202eb", "x\n", *OUTSIDE])
def test_a_name_that_no_file_of_ours_has_is_not_unpacked(small, tmp_path, name):
    (tmp_path / "in").mkdir()
    path = made_again(tmp_path / "in" / "names.zip", {**contents(small), name: b"x"})
    [bad] = [b for b in bundle.verify(path)["bad"] if b["file"] != "manifest.json"]
    assert "not a plain path inside the study" in bad["what"]
    assert len(bad["file"]) < 600
    assert "\x1b" not in bad["file"]
    with pytest.raises(UserError, match="is damaged"):
        bundle.unpack(path, tmp_path / "in" / "out")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["in", "names.zip", "small.zip"]


def test_the_longest_names_are_read_and_longer_ones_are_not(small, tmp_path):
    folder = "f" * 200
    longest = [f"{folder}/{folder}/{'n' * 110}", "n" * 200, f"{folder}/n"]
    longer = [f"{folder}/{folder}/{'n' * 111}", "n" * 201, f"f{folder}/n"]
    path = made_again(tmp_path / "names.zip", {**contents(small), **dict.fromkeys(longest + longer, b"x")})
    found = wrong(path)
    assert {name for name in longest if found[name] == "not in the manifest"} == set(longest)
    assert [what for what in found.values() if "not a plain path inside the study" in what] == [
        found[name] for name in found if name not in longest
    ]
    assert len(found) == len(longest + longer)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_pipe_or_a_device_is_no_bundle(tmp_path, finished, make):
    path = tmp_path / "done.zip"
    make(path)
    for call in (bundle.verify, lambda path: find(str(path), "nowhere")):
        with pytest.raises(UserError, match="not a file but a folder, a pipe or a device"):
            call(path)
    with pytest.raises(UserError, match="is not a bundle"):
        bundle.export(finished[1].study, path)


def test_what_is_none_of_ours_is_bad_however_well_it_is_packed(exported, tmp_path):
    files = contents(exported) | {"auto_decisions.json": b'{"lr_sweep": null}'}
    recorded = json.loads(files["manifest.json"])
    sha256 = hashlib.sha256(files["auto_decisions.json"]).hexdigest()
    for more, file, said in (
        ({"auto_decisions.json": sha256}, "auto_decisions.json", "holds no decisions"),
        ({"../../outside": "0" * 64}, "manifest.json", "it lists a file outside the study"),
    ):
        listed = with_checksum({**recorded, "files": recorded["files"] | more})
        made_again(tmp_path / "done.zip", files | {"manifest.json": json.dumps(listed).encode()})
        assert said in wrong(tmp_path / "done.zip")[file]


def test_what_the_disk_has_no_room_for_is_not_unpacked(small, tmp_path, monkeypatch):
    monkeypatch.setattr(bundle.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(UserError, match=r"has no room for what .*small\.zip holds"):
        bundle.unpack(small, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("more", ["", "/more"], ids=["itself", "below what is a file already"])
def test_a_file_that_is_there_twice_is_named(small, tmp_path, more):
    again = f"runs/a/steps.csv{more}"
    with open(tmp_path / "twice.zip", "wb") as out:
        bundle.pack(out, [*contents(small).items(), (again, b"other")])
    assert wrong(tmp_path / "twice.zip")[again] == "it is there twice"


@pytest.mark.thorough
def test_contents_that_do_not_belong_are_named_however_well_they_are_packed(exported, tmp_path):
    files = contents(exported)
    run = next(n for n in files if n.endswith("/steps.csv"))
    path = made_again(
        tmp_path / "done.zip", {**files, run: files[run].replace(b"1", b"2", 1), "notes.txt": b"mine"}
    )
    assert wrong(path) == {"notes.txt": "not in the manifest", run: "changed since it was recorded"}
    with pytest.raises(UserError, match=r"is damaged \(notes\.txt: not in the manifest"):
        find(str(path), "nowhere")
    made_again(path, {n: c for n, c in files.items() if n not in (run, "study.json")})
    assert wrong(path) == {run: "missing", "study.json": "missing"}
    made_again(path, {n: c for n, c in files.items() if n != "manifest.json"})
    assert "manifest.json" in wrong(path)
    made_again(path, {**files, "manifest.json": files["manifest.json"].replace(b"a", b"b", 1)})
    assert wrong(path) == {"manifest.json": "edited: its checksum does not match"}


def test_a_bundle_that_another_program_packed_again_is_as_sound_and_other_files_are_none(exported, tmp_path):
    shutil.unpack_archive(exported, tmp_path / "done")
    path = Path(shutil.make_archive(str(tmp_path / "again"), "zip", tmp_path / "done"))  # with its folders
    assert path.read_bytes() != exported.read_bytes()
    assert wrong(path) == {}
    assert replay(bundle.unpack(path, tmp_path / "unpacked"))["same"]
    path.write_text("not a zip")
    assert "it is not a zip" in wrong(path)[bundle.ARCHIVE]
    with pytest.raises(UserError, match="there is no bundle at"):
        bundle.verify(tmp_path / "nothing.zip")


@pytest.mark.thorough
def test_a_brief_bundle_is_enough_for_the_decisions_and_to_go_on(finished, exported, tmp_path, undrawn):
    path = tmp_path / "done.zip"
    bundle.export(finished[1].study, path, brief=True)
    whole, brief = contents(exported), contents(path)
    made_anew = {"manifest.json", "ro-crate-metadata.json"}
    own = {name for name in whole if not name.startswith("runs/") and not name.endswith(bundle.PICTURES)}
    assert set(brief) == own | {bundle.JOINED}
    assert bundle.verify(path)["ok"]
    study = bundle.unpack(path, tmp_path / "done")
    kept = set(brief) - made_anew - {bundle.JOINED}
    kept |= {name for name in whole if name.endswith(("/spec.json", "/result.json", "/attempts.jsonl"))}
    there = {str(p.relative_to(study.root)) for p in study.root.rglob("*.*") if p.is_file()}
    assert there == kept | made_anew
    assert all((study.root / name).read_bytes() == whole[name] for name in kept)
    assert replay(study)["same"]
    found = snapshot.read(study)
    assert all(work.missing == 0 for work in remaining_work(found.config, found.reusable_results()))
    report(study)
    bundle.export(study, tmp_path / "again.zip", brief=True)
    assert contents(tmp_path / "again.zip") == brief


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"run": "../../out", "spec.json": "", "result.json": ""}, "outside the study"),
        ({"run": "a", "result.json": 1}, "not the list of runs"),
        ({"run": "a"}, "not the list of runs"),
        ([], "not the list of runs"),
    ],
)
def test_a_list_of_runs_that_is_none_is_named_and_leads_nowhere(small, tmp_path, line, said):
    files = contents(small) | {bundle.JOINED: json.dumps(line).encode()}
    (tmp_path / "in").mkdir()
    path = made_again(tmp_path / "in" / "x.zip", files)
    assert said in wrong(path)[bundle.JOINED]
    with pytest.raises(UserError, match=r"is damaged \(runs.jsonl"):
        bundle.unpack(path, tmp_path / "in" / "x")
    assert sorted(p.name for p in (tmp_path / "in").iterdir()) == ["x.zip"]


@pytest.mark.thorough
def test_another_torch_makes_nothing_in_a_bundle_stale(finished, exported, monkeypatch):
    monkeypatch.setattr(identity, "_torch_version", lambda: "99.0")
    study = find(str(exported), "nowhere")
    assert bundle.verify(exported)["ok"]
    assert replay(study)["same"]
    assert all(found["stale_because"] is None for found in why(study, None).values())
    assert (status(study)["state"], status(study)["root"]) == ("finished", str(exported))
    assert ebc_lab.load(exported).source == exported
    assert status(finished[1].study)["state"] == "stale"  # where a call would train again


def test_a_bundle_goes_beside_its_study_and_nothing_that_is_made_shadows_a_study(own_copy, tmp_path, undrawn):
    """In a working folder where `outputs/ebc_ablation` holds the study `done`."""
    shelf = tmp_path / "outputs/ebc_ablation"
    shelf.mkdir(parents=True)
    (tmp_path / "done").rename(shelf / "done")
    assert "outputs/ebc_ablation/done.zip: " in answered("export", "done", cwd=tmp_path).stdout
    assert [p.name for p in tmp_path.iterdir()] == ["outputs"]
    there = "outputs/ebc_ablation/done is there already: `ebc-lab report"
    assert there in refused("report", "done.zip", cwd=tmp_path)
    assert "--output is for bundles" in refused("report", "done", "--output", "x", cwd=tmp_path)
    shutil.copy(shelf / "done.zip", tmp_path)
    taken = "taking outputs/ebc_ablation/{0} for {0}; the one in this folder is ./{0}\n"
    assert answered("verify", "done.zip", cwd=tmp_path).stderr == taken.format("done.zip")
    shadows = "it would have the name of the study outputs/ebc_ablation/done"
    assert shadows in refused("report", "./done.zip", cwd=tmp_path)
    assert "rebuilt in mine" in answered("report", "./done.zip", "--output", "mine", cwd=tmp_path).stdout
    assert answered("status", "mine", cwd=tmp_path).stderr == ""
    shutil.copytree(shelf / "done", tmp_path / "done")
    for name, root, said in (
        ("done", "outputs/ebc_ablation/done", taken.format("done")),
        ("./done", "done", ""),
    ):
        asked = answered("status", name, "--json", cwd=tmp_path)
        assert (json.loads(asked.stdout)["root"], asked.stderr) == (root, said)


def test_a_damaged_bundle_is_neither_read_nor_unpacked_and_the_command_names_the_file(exported, tmp_path):
    raw = bytearray(exported.read_bytes())
    place, name = next(found for found in packed_data(exported).items() if found[1].endswith("steps.csv"))
    raw[place.start + 200] ^= 4
    path = tmp_path / "done.zip"
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"done\.zip is damaged .* `ebc-lab verify"):
        find(str(path), "")
    assert "done.zip is damaged" in refused("report", "done.zip", cwd=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["done.zip"]
    done = called("verify", "done.zip", cwd=tmp_path)
    assert done.returncode == 4
    assert name in done.stdout
    assert "get the bundle again" in done.stdout
    done = called("verify", "gone.zip", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")


def test_what_cannot_be_vouched_for_is_not_exported(study, tmp_path):
    out = tmp_path / "out.zip"
    with study.held(), pytest.raises(UserError, match="is being run"):
        bundle.export(study, out)
    manifest.begin(study.root)
    with pytest.raises(UserError, match=r"was cut off.*ebc-lab report done"):
        bundle.export(study, out)
    manifest.complete(study.root)
    (study.root / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"not as recorded \(notes\.txt: not in the manifest\): move it out"):
        bundle.export(study, out)
    (study.root / "notes.txt").unlink()
    csv = next(study.runs.glob("*/steps.csv"))
    csv.write_text(csv.read_text() + "\n")
    with pytest.raises(UserError, match=r"steps\.csv: changed since it was recorded"):
        bundle.export(study, out)
    assert not out.exists()
    with pytest.raises(UserError, match="there is no study"):
        bundle.export(Study(tmp_path / "nothing"), out)


def test_only_a_bundle_is_overwritten_and_only_by_a_whole_one(study, tmp_path, monkeypatch):
    mine = tmp_path / "mine.zip"
    mine.write_text("holiday pictures")
    with pytest.raises(UserError, match="exists and is not a bundle"):
        bundle.export(study, mine)
    assert mine.read_text() == "holiday pictures"
    with pytest.raises(UserError, match="is a folder"):
        bundle.export(study, tmp_path)
    with pytest.raises(UserError, match=r"ends in \.zip"):
        bundle.export(study, tmp_path / "mine.tar")
    new = made_again(tmp_path / "new.zip", {"manifest.json": b"{}"})
    other = manifest.sha256_of(new)
    once = bundle.export(study, new)
    assert once["replaced"] == other
    assert bundle.export(study, new) == once | {"replaced": None}  # the same bytes
    monkeypatch.setattr(zipfile.ZipFile, "writestr", Mock(side_effect=[None, None, KeyboardInterrupt]))
    with pytest.raises(KeyboardInterrupt):
        bundle.export(study, tmp_path / "new.zip")
    assert manifest.sha256_of(tmp_path / "new.zip") == once["sha256"]


@pytest.mark.thorough
def test_a_checkpoint_that_a_failed_run_kept_is_not_exported_and_not_missed(study, tmp_path):
    run = next(study.runs.glob("*/steps.csv")).parent
    for name in ("checkpoint.pt", "checkpoint.damaged-1.pt", "checkpoint.damaged-12.pt"):
        (run / name).write_bytes(b"weights")
    bundle.export(study, tmp_path / "out.zip")
    assert not any("checkpoint" in name for name in contents(tmp_path / "out.zip"))
    assert wrong(tmp_path / "out.zip") == {}


@pytest.mark.thorough
def test_a_study_that_stopped_early_is_exported_as_far_as_it_is_recorded(study, tmp_path, undrawn):
    decisions = study.decisions()
    decisions.pop("finals")
    (study.root / "auto_decisions.json").write_text(json.dumps(decisions))
    manifest.remove_entries(study.root, "auto_decisions.json")
    report(study)
    bundle.export(study, tmp_path / "out.zip")
    assert wrong(tmp_path / "out.zip") == {}
    made_again(tmp_path / "out.zip", {**contents(tmp_path / "out.zip"), "more.txt": b"mine"})
    assert wrong(tmp_path / "out.zip") == {"more.txt": "not in the manifest"}


@pytest.mark.thorough
def test_the_commands_need_nothing_but_the_bundle(exported, finished, tmp_path):
    """Another user and folder, no corpus, no cache, no torch; the bundle's own folder cannot be written."""
    shelf, desk = (tmp_path / name for name in ("shelf", "desk"))
    shelf.mkdir()
    desk.mkdir()
    shutil.copy(exported, shelf / "paper.zip")
    path = site(
        desk,
        "import sys, socket\n"
        "class Never:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'torch':\n"
        "            raise ImportError('torch is not to be needed')\n"
        "sys.meta_path.insert(0, Never())\n"
        "def refuse(*a, **k):\n"
        "    raise OSError('no network here')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n",
    )
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "LANG", "CUDA_VISIBLE_DEVICES")}
    env = {**kept, "HOME": str(desk), "PYTHONPATH": path}

    def told(*words: str) -> str:
        done = subprocess.run([*CLI, *words], cwd=desk, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    before = {p: p.stat().st_mtime_ns for p in shelf.rglob("*")}
    shelf.chmod(0o555)
    try:
        assert json.loads(told("verify", "../shelf/paper.zip", "--json"))["bad"] == []
        assert told("why", "../shelf/paper.zip", "--replay").count("the same") == 4
        assert list(json.loads(told("why", "../shelf/paper.zip", "finals", "--json"))) == ["finals"]
        told("status", "../shelf/paper.zip")
        told("diff", "../shelf/paper.zip", "../shelf/paper.zip")
        told("report", "../shelf/paper.zip", "--output", "rebuilt")
    finally:
        shelf.chmod(0o755)
    assert {p: p.stat().st_mtime_ns for p in shelf.rglob("*")} == before
    told("verify", "rebuilt")
    original = finished[1].study.root
    for name in manifest.read(original)["files"]:  # pictures among them
        assert (desk / "rebuilt" / name).read_bytes() == (original / name).read_bytes(), name
