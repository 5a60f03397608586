"""What an attempt at a run still writes after the next one has begun, whatever it was doing then."""

import pytest

from ebc_lab.records import fence
from ebc_lab.records.fence import Superseded
from ebc_lab.records.files import atomic_writer, write_atomic
from ebc_lab.records.locks import run_lock
from ebc_lab.records.paths import RunFiles
from ebc_lab.records.streams import Stream


@pytest.fixture
def run(tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    return RunFiles(directory)


def test_a_late_checkpoint_is_refused_whether_it_was_begun_before_or_after(run):
    first = fence.claim(run.directory)
    with fence.within(run.directory, first):
        write_atomic(run.checkpoint, b"first")
        late = atomic_writer(run.checkpoint)
        late.__enter__().write(b"all of it is written when the next attempt begins")
        second = fence.claim(run.directory)
        with pytest.raises(Superseded, match="another attempt at run has begun"):
            late.__exit__(None, None, None)
        assert run.checkpoint.read_bytes() == b"first"
        with pytest.raises(Superseded):
            write_atomic(run.checkpoint, b"later still")
        with pytest.raises(Superseded):
            write_atomic(run.models / "step_3.pt", b"a folder below")
    with fence.within(run.directory, second):
        write_atomic(run.checkpoint, b"second")
    assert run.checkpoint.read_bytes() == b"second"
    fence.leave(run.directory, first)
    fence.leave(run.directory, second)
    assert [path.name for path in run.directory.iterdir()] == ["checkpoint.pt"], "nothing is left behind"


def test_late_rows_go_where_nobody_reads_them(run):
    with fence.within(run.directory, fence.claim(run.directory)):
        early = Stream(run.steps, ["step"])
        early.append({"step": 0})
        early.sync()
        mark = early.mark()
    with fence.within(run.directory, fence.claim(run.directory)):
        now = Stream(run.steps, ["step"], mark)
        now.append({"step": 1})
        early.append({"step": 77})
        early.close()
        now.close()
    assert run.steps.read_text() == "step\n0\n1\n"


def test_an_attempt_that_only_now_opens_its_streams_does_not_replace_those_of_the_next(run):
    first, second = fence.claim(run.directory), fence.claim(run.directory)
    with fence.within(run.directory, second):
        now = Stream(run.steps, ["step"])
    with fence.within(run.directory, first), pytest.raises(Superseded):
        Stream(run.steps, ["step"])
    now.append({"step": 0})
    now.close()
    assert run.steps.read_text() == "step\n0\n"


def test_of_two_that_begin_at_once_at_most_one_goes_on(run, monkeypatch):
    tokens = iter(["aa", "bb"])
    monkeypatch.setattr(fence.secrets, "token_hex", lambda size: next(tokens))
    # the other one makes its folder after this one has looked for earlier ones, and before it looks again
    remove = fence._remove
    earlier = run.directory / f"{fence.PREFIX}00"
    earlier.mkdir()

    def meanwhile(folder):
        remove(folder)
        if folder == earlier:
            assert fence.claim(run.directory) == "aa"

    monkeypatch.setattr(fence, "_remove", meanwhile)
    with pytest.raises(Superseded):
        fence.claim(run.directory)
    assert fence.attempt_at(run.directory) == "aa"


def test_an_error_that_has_another_cause_stays_what_it_is(run):
    with fence.within(run.directory, fence.claim(run.directory)):
        with pytest.raises(FileNotFoundError):
            write_atomic(run.models / "step_3.pt", b"")
        with pytest.raises(OSError, match="disk"), atomic_writer(run.checkpoint):
            raise OSError("disk full")
        assert not list(fence.attempt_folder(run.checkpoint).iterdir())


def test_a_lock_that_was_taken_away_lets_another_claim_and_does_not_come_back(run):
    with run_lock(run.directory) as lost:
        with run_lock(run.directory) as other:
            assert other is None
        run.lock.unlink()
        with run_lock(run.directory) as mine:
            assert mine not in (None, lost)
            write_atomic(run.result, b"{}")
        run.lock.unlink()
    with run_lock(run.directory) as again:
        assert again
