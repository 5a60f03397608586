import io
import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ebc_lab.config import identity
from ebc_lab.config.errors import UserError
from ebc_lab.records.json_files import with_checksum
from ebc_lab.report.conclude import report
from ebc_lab.study.inspect.status import status
from ebc_lab.study.inspect.why import why
from ebc_lab.study.store import bundle, container, manifest
from ebc_lab.study.store import find as find_module
from ebc_lab.study.store.find import find
from ebc_lab.study.store.replay import replay
from ebc_lab.study.store.study import Study

CLI = [sys.executable, "-c", "from ebc_lab.cli import main; main()"]


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "done.zip"
    bundle.export(finished[1].study, path)
    return path


@pytest.fixture(scope="module")
def small(finished, tmp_path_factory) -> Path:
    """The bundle of a study without its pictures and most of its runs: one that can be checked many times."""
    root = tmp_path_factory.mktemp("small") / "done"
    shutil.copytree(finished[1].study.root, root)
    for picture in root.glob("*.*g"):
        picture.unlink()
    keep = sorted((root / "runs").iterdir())[:2]
    for run in set((root / "runs").iterdir()) - set(keep):
        shutil.rmtree(run)
    (root / "manifest.json").unlink()
    manifest.complete(root)
    bundle.export(Study(root), root.parent / "done.zip")
    return root.parent / "done.zip"


def contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as found:
        return {name: found.read(name) for name in found.namelist()}


def made_again(path: Path, files: dict[str, bytes]) -> Path:
    """A bundle that a careless editor's own script wrote: every byte in its place, other contents."""
    ordered = {name: files[name] for name in sorted(files, key=lambda n: (n != container.FIRST, n))}
    with open(path, "wb") as out:
        container.write(
            out, ((name, lambda content=content: iter([content])) for name, content in ordered.items())
        )
    return path


def wrong(path: Path) -> dict[str, str]:
    found = bundle.verify(path)
    assert found["ok"] == (not found["bad"])
    return {b["file"]: b["what"] for b in found["bad"]}


def regions(raw: bytes) -> list[tuple[int, str]]:
    """(first byte, the file or part of the container that it lies in), in order."""
    with zipfile.ZipFile(io.BytesIO(raw)) as found:
        out = [(info.header_offset, info.filename) for info in found.infolist()]
        return [*out, (found.start_dir, "the central directory"), (len(raw) - 22, "the end record")]


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
    assert again["files"] == len(found)
    assert not list(tmp_path.glob(".*"))


def test_a_bundle_is_as_recorded_and_can_be_held_against_a_published_sha256(exported):
    own = manifest.sha256_of(exported)
    found = bundle.verify(exported, own.upper())
    assert found["ok"]
    assert found["sha256"] == own
    assert found["files"] == len(contents(exported)) - 1
    assert not found["under_way"]
    [bad] = bundle.verify(exported, "0" * 64)["bad"]
    assert bad["what"] == f"its sha256 is {own}, and {'0' * 64} was expected"
    with pytest.raises(UserError, match="64 hex digits"):
        bundle.verify(exported, "abc")


def test_one_flipped_byte_is_named_wherever_it_is(small, tmp_path):
    """Every byte of some headers, of the directory's end and of the end record, and 150 bytes anywhere."""
    raw, path = small.read_bytes(), tmp_path / "done.zip"
    places = regions(raw)
    draw = random.Random(0)
    first, second, last = places[0][0], places[1][0], places[-1][0]
    offsets = {*range(first, first + 79, 3), *range(second, second + 90, 3), *range(last - 40, len(raw), 2)}
    for at in sorted(offsets | {draw.randrange(len(raw)) for _ in range(150)}):
        damaged = bytearray(raw)
        damaged[at] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        said = wrong(path)
        name = [what for start, what in places if start <= at][-1]
        assert any(name in part for part in said), (at, name, said)
        assert len(said) <= 3, (at, said)


def test_contents_that_do_not_belong_are_named_however_well_they_are_packed(exported, tmp_path):
    files = contents(exported)
    run = next(n for n in files if n.endswith("/steps.csv"))
    result = next(n for n in files if n.endswith("/result.json"))
    edited = json.loads(files[result])
    edited["val_loss"] = 0.5
    path = tmp_path / "done.zip"
    made_again(
        path,
        {
            **files,
            run: files[run].replace(b"1", b"2", 1),
            "notes.txt": b"mine",
            result: json.dumps(edited).encode(),
        },
    )
    assert wrong(path) == {
        "notes.txt": "not in the manifest",
        run: "changed since it was recorded",
        result: "changed since it was recorded",
    }
    made_again(path, {n: c for n, c in files.items() if n not in (run, "study.json")})
    assert wrong(path) == {run: "missing", "study.json": "missing"}
    made_again(path, {n: c for n, c in files.items() if n != "manifest.json"})
    assert "manifest.json" in wrong(path)
    made_again(path, {**files, "manifest.json": files["manifest.json"].replace(b"a", b"b", 1)})
    assert wrong(path) == {"manifest.json": "edited: its checksum does not hold"}


@pytest.mark.parametrize(
    "name", ["../out.txt", "/out.txt", "runs/../../out.txt", "a//b", "a\\b", "C:x", "runs/./x", "x\n"]
)
def test_nothing_is_written_outside_the_folder(exported, tmp_path, name):
    (tmp_path / "in").mkdir()
    path = made_again(tmp_path / "in" / "done.zip", {**contents(exported), name: b"out"})
    assert "such a name does not belong" in wrong(path)[name]
    with pytest.raises(UserError, match="is damaged"):
        bundle.unpack(path, tmp_path / "in" / "unpacked")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["done.zip", "in"]


def test_a_manifest_that_points_outside_is_not_followed(exported, tmp_path):
    files = contents(exported)
    found = json.loads(files["manifest.json"])
    found["files"]["../../outside"] = "0" * 64
    path = made_again(
        tmp_path / "done.zip", {**files, "manifest.json": json.dumps(with_checksum(found)).encode()}
    )
    assert "manifest.json" in wrong(path)


def test_truncated_repacked_and_foreign_files_are_said_with_a_remedy(exported, tmp_path):
    raw, path = exported.read_bytes(), tmp_path / "done.zip"
    path.write_bytes(raw[: len(raw) // 2])
    [bad] = bundle.verify(path)["bad"]
    assert f"the file ends at byte {len(raw) // 2}" in bad["what"]
    assert "get the bundle anew" in bad["remedy"]
    with zipfile.ZipFile(path, "w") as out:
        for name, content in contents(exported).items():
            out.writestr(name, content)
    [bad] = bundle.verify(path)["bad"]
    assert "packed again" in bad["what"]
    assert "unpack it, and `ebc-lab verify FOLDER`" in bad["remedy"]
    path.write_text("not a zip")
    assert wrong(path) == {"the file": "it is no zip"}
    with pytest.raises(UserError, match="there is no bundle at"):
        bundle.verify(tmp_path / "nothing.zip")


def test_the_decisions_are_explained_and_made_again_from_a_bundle(finished, exported):
    study = find(str(exported), "nowhere")
    assert replay(study)["same"]
    assert why(study, "finals") == why(finished[1].study, "finals")
    assert not exported.with_suffix("").exists()


def test_another_torch_makes_nothing_in_a_bundle_stale(finished, exported, monkeypatch):
    monkeypatch.setattr(identity, "_torch_version", lambda: "99.0")
    study = find(str(exported), "nowhere")
    assert bundle.verify(exported)["ok"]
    assert replay(study)["same"]
    assert all(found["stale_because"] is None for found in why(study, None).values())
    assert status(study)["state"] == "finished"
    assert status(finished[1].study)["state"] == "stale"  # where a call would train again


def test_a_report_is_rebuilt_beside_the_bundle_which_stays_as_it_is(exported, finished, tmp_path):
    path = tmp_path / "done.zip"
    shutil.copy(exported, path)
    study = find_module.to_rebuild(str(path), "nowhere", None)
    for name in ("summary_final.csv", "acceptance.json", "lr_scale.png"):
        (study.root / name).unlink()
    report(study)
    assert study.root == tmp_path / "done"
    assert path.read_bytes() == exported.read_bytes()
    for name in manifest.read(finished[1].study.root)["files"]:
        assert (study.root / name).read_bytes() == (finished[1].study.root / name).read_bytes(), name
    assert bundle.export(study, tmp_path / "again.zip")["sha256"] == manifest.sha256_of(exported)
    with pytest.raises(UserError, match=r"done is there already: give it to the command instead"):
        find_module.to_rebuild(str(path), "nowhere", None)
    with pytest.raises(UserError, match="--output is for bundles"):
        find_module.to_rebuild(str(study.root), "nowhere", tmp_path / "x")


def test_a_damaged_bundle_is_neither_read_nor_unpacked(exported, tmp_path):
    raw = bytearray(exported.read_bytes())
    raw[len(raw) // 2] ^= 1
    path = tmp_path / "done.zip"
    path.write_bytes(raw)
    for attempt in (lambda: find(str(path), ""), lambda: find_module.to_rebuild(str(path), "", None)):
        with pytest.raises(UserError, match=r"done\.zip is damaged .* `ebc-lab verify"):
            attempt()
    assert [p.name for p in tmp_path.iterdir()] == ["done.zip"]


def test_what_cannot_be_vouched_for_is_not_exported(own_copy, tmp_path):
    _, study = own_copy
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


def test_only_a_bundle_is_overwritten(own_copy, tmp_path):
    _, study = own_copy
    mine = tmp_path / "mine.zip"
    mine.write_text("holiday pictures")
    with pytest.raises(UserError, match="is there already and is no bundle"):
        bundle.export(study, mine)
    assert mine.read_text() == "holiday pictures"
    with pytest.raises(UserError, match="is a folder"):
        bundle.export(study, tmp_path)
    with pytest.raises(UserError, match=r"ends in \.zip"):
        bundle.export(study, tmp_path / "mine.tar")
    once = bundle.export(study, tmp_path / "new.zip")
    assert bundle.export(study, tmp_path / "new.zip") == once


def test_a_checkpoint_that_a_failed_run_kept_is_not_exported_and_not_missed(own_copy, tmp_path):
    _, study = own_copy
    (next(study.runs.glob("*/steps.csv")).parent / "checkpoint.pt").write_bytes(b"weights")
    bundle.export(study, tmp_path / "out.zip")
    assert not any("checkpoint" in name for name in contents(tmp_path / "out.zip"))
    assert wrong(tmp_path / "out.zip") == {}


def test_a_study_that_stopped_early_is_exported_as_far_as_it_is_recorded(own_copy, tmp_path):
    _, study = own_copy
    decisions = study.decisions()
    decisions.pop("finals")
    (study.root / "auto_decisions.json").write_text(json.dumps(decisions))
    manifest.strike(study.root, "auto_decisions.json")
    report(study)
    bundle.export(study, tmp_path / "out.zip")
    assert wrong(tmp_path / "out.zip") == {}
    made_again(tmp_path / "out.zip", {**contents(tmp_path / "out.zip"), "more.txt": b"mine"})
    assert wrong(tmp_path / "out.zip") == {"more.txt": "not in the manifest"}


def test_the_commands_need_nothing_but_the_bundle(exported, tmp_path):
    """Another user, another folder, no corpus, no cache, no torch; the bundle's own folder cannot be written."""
    shelf, desk = tmp_path / "shelf", tmp_path / "desk"
    shelf.mkdir()
    desk.mkdir()
    shutil.copy(exported, shelf / "paper.zip")
    blocked = desk / "site"
    blocked.mkdir()
    (blocked / "sitecustomize.py").write_text(
        "import sys, socket\n"
        "class Never:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'torch':\n"
        "            raise ImportError('torch is not to be needed')\n"
        "sys.meta_path.insert(0, Never())\n"
        "def refuse(*a, **k):\n"
        "    raise OSError('no network here')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
    )
    path = os.pathsep.join([str(blocked), *filter(None, [os.environ.get("PYTHONPATH")])])
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "LANG", "CUDA_VISIBLE_DEVICES")}
    env = {**kept, "HOME": str(desk), "PYTHONPATH": path}

    def call(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([*CLI, *words], cwd=desk, env=env, capture_output=True, text=True)

    before = {p: p.stat().st_mtime_ns for p in shelf.rglob("*")}
    shelf.chmod(0o555)
    try:
        told = call("verify", "../shelf/paper.zip", "--json")
        assert (told.returncode, json.loads(told.stdout)["ok"]) == (0, True), told.stderr
        again = call("why", "../shelf/paper.zip", "--replay")
        assert again.returncode == 0, again.stderr
        assert again.stdout.count("the same") == 4
        one = call("why", "../shelf/paper.zip", "finals", "--json")
        assert list(json.loads(one.stdout)) == ["finals"], one.stderr
        assert call("status", "../shelf/paper.zip").returncode == 0
        assert call("diff", "../shelf/paper.zip", "../shelf/paper.zip").returncode == 0
        made = call("report", "../shelf/paper.zip", "--output", "rebuilt")
        assert made.returncode == 0, made.stderr
    finally:
        shelf.chmod(0o755)
    assert {p: p.stat().st_mtime_ns for p in shelf.rglob("*")} == before
    assert call("verify", "rebuilt").returncode == 0
    acceptance = json.loads((desk / "rebuilt" / "acceptance.json").read_text())
    assert acceptance["study"] == "done"


def test_the_command_line_names_a_flipped_byte_and_exits_with_4(exported, tmp_path):
    raw = bytearray(exported.read_bytes())
    places = regions(bytes(raw))
    start, name = next(p for p in places if p[1].endswith("steps.csv"))
    raw[start + 200] ^= 4
    (tmp_path / "done.zip").write_bytes(raw)
    done = subprocess.run([*CLI, "verify", "done.zip"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 4
    assert name in done.stdout
    assert "get the bundle anew" in done.stdout
    done = subprocess.run([*CLI, "verify", "gone.zip"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
