"""A study is mirrored while it runs, and goes on elsewhere as if its machine had never been lost."""

import functools
import io
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support.called import CLI, called
from support.drivers import held_at_first, sessions, until_true, without_timing
from support.nodes import kill, state_of
from support.s3 import BUCKET

from ebc_lab.config.compose import compose
from ebc_lab.config.errors import UserError
from ebc_lab.study.mirror import upload
from ebc_lab.study.mirror.place import Place, parts
from ebc_lab.study.mirror.pull import pull
from ebc_lab.study.mirror.upload import kept_elsewhere, refuse_unusable
from ebc_lab.study.store import attempts
from ebc_lab.study.store.study import Study
from ebc_lab.study.store.verify import verify

until = functools.partial(until_true, within_s=180.0)


def command(tiny, out: Path, *more: str) -> list[str]:
    """The first stage of a study, on two workers that write a checkpoint at every step."""
    launcher = ["launcher=local", "launcher.slots=2", "launcher.checkpoint_every_s=0"]
    mirror = [f"study.mirror=s3://{BUCKET}/lab", "study.mirror_every_s=0.1"]
    return ["autopilot", *tiny, "study.stages=[lr_sweep]", *launcher, *mirror, f"output_dir={out}", *more]


def lose_the_machine(driver: subprocess.Popen, study: Study) -> None:
    """Kill everything that runs a study, and its disk."""
    at_work = [note["pid"] for s in sessions(study, "local") for note in s.notes().values()]
    driver.kill()
    for pid in at_work:
        kill(pid)
    driver.wait()
    until(lambda: not any(map(state_of, at_work)))
    shutil.rmtree(study.root.parent)


def begins(study: Study, run_id: str) -> int:
    return [event["event"] for event in attempts.log(study.run_dir(run_id))].count("begin")


@pytest.mark.thorough
def test_a_study_whose_machine_is_lost_goes_on_from_its_mirror(tiny, finished, s3, tmp_path):
    env = {**os.environ, "PYTHONPATH": held_at_first(tmp_path)}
    here, there = tmp_path / "here", tmp_path / "there"
    study = Study(here / "lost")
    driver = subprocess.Popen(
        [*CLI, *command(tiny, here, "study.name=lost")], env=env, stdout=subprocess.DEVNULL
    )
    place = Place(f"s3://{BUCKET}/lab/lost")

    def mirrored(ending: str) -> list[str]:
        index = place.latest()
        return [path for path in (index.files if index else {}) if path.endswith(ending)]

    until(lambda: mirrored("checkpoint.pt"))  # the first run goes alone, and is held
    [first] = mirrored("checkpoint.pt")
    (study.root / first).with_name("go").touch()
    until(lambda: mirrored("result.json") and len(mirrored("checkpoint.pt")) == 2)
    lose_the_machine(driver, study)

    told = called("pull", f"s3://{BUCKET}/lab/lost", str(there), cwd=tmp_path)
    assert told.returncode == 0
    assert "\nthis continues the study:\n  ebc-lab autopilot " in told.stdout
    pulled = Study(there / "lost")
    done = {run for run in pulled.run_ids() if pulled.has_result(run)}
    begun = {run for run in pulled.run_ids() if pulled.run_files(run).checkpoint.exists()}
    assert (len(done), len(begun)) == (1, 2)
    on = called(*command(tiny, there, "study.name=lost"), cwd=tmp_path)
    assert on.returncode == 0, on.stdout + on.stderr
    assert all(begins(pulled, run) == 1 for run in done)  # not trained again
    assert all(begins(pulled, run) == 2 for run in begun)
    assert not any(attempts.restarts(pulled.run_dir(run)) for run in begun)  # but from their checkpoints
    assert verify(pulled)["ok"]
    ours, theirs = (s.root / "summary_lr_sweep.csv" for s in (pulled, finished[1].study))
    assert without_timing(ours) == without_timing(theirs)
    assert set(mirrored("")) == set(kept_elsewhere(pulled.root))


@pytest.mark.parametrize("address", ["folder"], indirect=True)
def test_a_mirror_out_of_reach_is_said_once_and_caught_up_with(mirrored, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no route to host")

    def said(what: str) -> int:
        return sum(what in line for line in mirrored.said)

    with mirrored.running():
        until(lambda: "acceptance.json" in (Place(mirrored.address).latest().files or {}))
        with monkeypatch.context() as patch:
            patch.setattr(Place, "write", fail)
            (mirrored.study.root / "acceptance.md").write_text("later\n")
            until(lambda: said("cannot be written"))
        until(lambda: said("answers again"))
    assert said("cannot be written") == 1
    assert mirrored.said[-1].startswith("mirrored: ")
    (mirrored.study.root / "acceptance.md").write_text("still later\n")
    mirrored.said.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Place, "write", fail)
        mirrored.mirror()  # it was there before, so it does not stop the study
    assert "the same command mirrors them" in mirrored.said[-1]
    mirrored.mirror()
    pull(mirrored.address, tmp_path / "there")
    assert (tmp_path / "there" / "done" / "acceptance.md").read_text() == "still later\n"


@pytest.mark.parametrize("mirror", ["lab", "lab/done/copies", ""], ids=["the study", "in it", "around it"])
def test_a_mirror_is_neither_the_studys_folder_nor_in_or_around_it(mirror, tmp_path):
    config = compose(["scale=smoke", "study.name=done", f"study.mirror=file://{tmp_path}/{mirror}"])
    root = tmp_path / ("lab/done" if mirror else "done/done")
    with pytest.raises(UserError, match="is the study's own folder: choose another"):
        refuse_unusable(config, Study(root))
    assert not root.exists()


# -- what a pass reads and lists -----------------------------------------------------------------------------


class Passes(upload._Mirror):
    """The passes of a mirror without its thread, and the files that each of them reads."""

    def __init__(self, study: Study, address: str):
        self.said: list[str] = []
        super().__init__(Place(address), study, 0.0, self.said.append)
        self.looked_at: list[str] = []
        self.meanwhile = lambda path: None  # what happens when a file is read
        self._take()

    def _read(self, path):
        self.looked_at.append(path)
        self.meanwhile(path)
        return super()._read(path)

    def look(self, *, whole: bool = False) -> list[str]:
        """-> what was read"""
        self.looked_at = []
        assert self._look(whole=whole)
        return self.looked_at

    def fetched(self, tmp_path: Path) -> dict[str, str]:
        """The study as it is at the address."""
        found = {}
        for path, entry in self.place.latest().files.items():
            self.place.fetch(path, entry, tmp_path / "fetched")
            found[path] = (tmp_path / "fetched").read_text()
        return found


@pytest.fixture
def passes(small, tmp_path) -> Passes:
    return Passes(small, f"file://{tmp_path}/mirror/small")


OWN = ["auto_decisions.json", "manifest.json", "study.json"]
ON = [f"runs/on/{name}" for name in ("checkpoint.pt", "attempts.jsonl", "spec.json", "steps.csv")]
OVER = [f"runs/over/{name}" for name in ("result.json", "spec.json", "steps.csv")]


def written(study: Study) -> dict[str, str]:
    return {path: (study.root / path).read_text() for path in kept_elsewhere(study.root)}


def test_a_pass_reads_a_runs_checkpoint_before_what_grows_and_afterwards_only_what_changed(
    passes, small, tmp_path
):
    assert passes.look() == [*OWN, *ON, *OVER]
    assert passes.fetched(tmp_path) == written(small)
    assert set(written(small)) == {*OWN, *ON, *OVER}
    (small.run_dir("over") / "attempts.jsonl").write_text("its end, which is noted after its result")
    assert passes.look() == ["runs/over/attempts.jsonl"]
    number = passes.index.number
    assert passes.look() == []
    assert passes.index.number == number, "an index was written though nothing changed"
    for change in (ON[3], ON[0], OWN[0]):
        (small.root / change).write_text("longer than before")
        assert passes.look() == [change]
        number += 1
        assert passes.index.number == number
        assert passes.fetched(tmp_path) == written(small)
    (small.root / OVER[2]).write_text("edited, which only the last pass looks for")
    assert passes.look() == []
    assert passes.look(whole=True) == [OVER[2]]
    (small.root / OWN[1]).unlink()
    (small.root / ON[2]).unlink()  # a run without a spec is not planned any more
    assert passes.look() == []
    assert passes.fetched(tmp_path) == written(small)


def kept_at(passes: Passes) -> tuple[list[str], int]:
    """The indexes there, and how many files."""
    place = passes.place
    return place._listed("index"), len(place.fs.find(f"{place.root}/files"))


def test_the_last_two_indexes_stay_with_the_files_in_them_and_what_was_before_goes(passes, small):
    passes.look()
    seen = []
    for change in range(3):
        (small.root / "study.json").write_text(f"change {change}")
        passes.look()
        seen.append(kept_at(passes))
    numbers = [(f"{number:08d}.json", f"{number + 1:08d}.json") for number in (2, 3, 4)]
    assert [tuple(names) for names, _ in seen] == numbers
    assert {count for _, count in seen} == {len([*OWN, *ON, *OVER]) + 1}


@pytest.mark.parametrize("what", ["result.json", "attempts.jsonl"], ids=["ends", "changes hands"])
def test_a_run_that_ends_or_changes_hands_during_a_pass_is_as_the_pass_before_left_it(
    passes, small, tmp_path, what
):
    passes.look()
    before = passes.fetched(tmp_path)
    (small.root / ON[3]).write_text("a few rows more")

    def go_on(path):
        if path == ON[3]:
            (small.run_dir("on") / what).write_text("just now, and longer")

    passes.meanwhile = go_on
    assert passes.look() == [ON[3]]
    assert passes.fetched(tmp_path) == before
    passes.meanwhile = lambda path: None
    first = f"runs/on/{what}"
    assert passes.look() == sorted([first, ON[3]], key=lambda path: path != first)
    assert passes.fetched(tmp_path) == written(small)


@pytest.mark.parametrize("what", OWN)
def test_no_index_lists_runs_beside_decisions_that_are_older(passes, small, tmp_path, what):
    passes.look()
    before, number = passes.fetched(tmp_path), passes.index.number
    (small.root / ON[3]).write_text("a few rows more")
    passes.meanwhile = lambda path: (small.root / what).write_text("decided meanwhile")
    assert not passes._look(whole=False)
    assert (passes.fetched(tmp_path), passes.index.number) == (before, number)
    passes.meanwhile = lambda path: None
    passes.look()
    assert passes.fetched(tmp_path) == written(small)


@pytest.mark.parametrize(("in_memory", "at_a_time"), [(0, 200), (15, 200), (30, 200), (99, 2)])
def test_files_are_written_in_batches_or_if_large_in_parts(
    passes, small, tmp_path, monkeypatch, in_memory, at_a_time
):
    monkeypatch.setattr(upload, "IN_MEMORY", in_memory)
    monkeypatch.setattr(upload, "AT_A_TIME", at_a_time)
    batches, large = [], []
    write, write_large = Place.write, Place.write_large
    monkeypatch.setattr(Place, "write", lambda self, files: (batches.append(files), write(self, files)))
    monkeypatch.setattr(
        Place, "write_large", lambda self, path, *a: (large.append(path), write_large(self, path, *a))
    )
    (small.root / "empty").touch()
    passes.look()
    assert passes.fetched(tmp_path) == written(small)
    sizes = {path: len(content) for path, content in written(small).items()}
    assert set(large) == {path for path, size in sizes.items() if size > in_memory}
    assert max(map(len, batches)) <= at_a_time
    assert sum(map(len, batches)) == len(sizes) - len(large)
    for batch in batches[:-1]:  # each is as large as it needs to be
        written_bytes = sum(map(len, batch.values()))
        last = len(list(batch.values())[-1])
        assert len(batch) == at_a_time or written_bytes - last <= in_memory < written_bytes
    passes.index = None  # as in a later command, which asks what is there
    passes.read, batches[:], large[:] = {}, [], []
    passes.look()
    assert (batches, large) == ([], []), "what is there already was written again"


def test_a_large_file_is_read_from_its_beginning_in_parts_up_to_the_size_that_it_had():
    most = 8 << 20
    for there, size, read in [(9, 4, [4]), (4, 9, [4]), (9, 0, []), (most + 9, most + 3, [most, 3])]:
        file = io.BytesIO(bytes(there))
        file.seek(2)
        assert [len(part) for part in parts(file, size)] == read


@pytest.mark.parametrize(
    ("waiting", "told"),
    [
        ([], "mirrored: 0 files, at {}"),
        (["b"], "warning: 1 file(s) are not mirrored (b): the same command mirrors them"),
        (["c", "a", "b"], "warning: 3 file(s) are not mirrored (a, b, c): the same command mirrors them"),
        (
            ["d", "c", "b", "a"],
            "warning: 4 file(s) are not mirrored (a, b, c, …): the same command mirrors them",
        ),
        (None, "warning: the latest files are not mirrored: the same command mirrors them"),
    ],
)
def test_what_is_not_mirrored_in_the_end_is_said(passes, waiting, told):
    if waiting is None:
        passes.index = None
    passes.waiting = set(waiting or ())
    passes.finish()
    assert passes.said == [told.format(passes.place.address)]
    passes.over = True  # written by another folder now, which was said then
    passes.finish()
    assert len(passes.said) == 1
