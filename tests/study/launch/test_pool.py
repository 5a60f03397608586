"""The pool's protocol, with real worker processes: what they see, which runs they take, and that none is
left behind.

The runs are `idle` ones, which train nothing; what training itself has to survive is in test_join.py,
tests/study/test_promises.py and tests/study/test_autopilot.py.
"""

import fcntl
import json
import os
import select
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from filelock import FileLock
from support import idle
from support.called import refused
from support.drivers import family, site, started, until
from support.idle import Bench

from ebc_lab.config.compose import compose
from ebc_lab.config.dicts import to_dict
from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import Config, LauncherConfig
from ebc_lab.records.locks import run_lock
from ebc_lab.records.paths import RunFiles
from ebc_lab.study.launch import local
from ebc_lab.study.launch import pool as pool_module
from ebc_lab.study.launch.pool import Death, WorkersFailed
from ebc_lab.study.launch.submit import _sbatch
from ebc_lab.study.store import attempts
from ebc_lab.study.store.study import recorded_config

PATIENCE_S = 60


@pytest.fixture
def bench(tmp_path):
    made = Bench(tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="module")
def shared_bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("quiet"))


@pytest.fixture
def quiet(shared_bench):
    """A bench without runs, for pools that start no worker: to make one takes longer than what it is for."""
    yield shared_bench
    shared_bench.close()
    shared_bench.said.clear()
    for run in shared_bench.study.runs.iterdir():
        shutil.rmtree(run)


# -- what workers see ----------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_a_worker_has_nothing_of_an_enclosing_job_and_torch_only_for_runs_that_need_it(bench, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PMI_RANK", "3")
    [spec] = bench.idle(1, at=1, do="hold")
    seen = []

    def release(done, busy):
        if busy and not seen:
            seen.extend(Path(f"/proc/{bench.worker()}/{name}").read_text() for name in ("environ", "maps"))
            bench.release(spec)

    bench.pool().run([spec], [], release, canary=False)
    environment, mapped = seen
    assert "SLURM_JOB_ID" not in environment
    assert "PMI_RANK" not in environment
    assert "OMP_NUM_THREADS=1" in environment
    assert "slurm_job_id" not in bench.events(spec)[0]
    assert "libtorch" not in mapped


def test_slots_follow_gpus_and_workers_per_gpu_and_cores(bench, machine_with, monkeypatch):
    def on(config: Config, **launcher) -> Config:
        settings = {"name": "local", "slots": 0, **launcher}
        return replace(config, launcher=replace(config.launcher, **settings))

    machine_with(3)
    monkeypatch.setattr(pool_module, "cores", lambda: 8)
    cuda = replace(bench.config, device="cuda")
    assert pool_module.slots(on(cuda)) == 3
    assert pool_module.slots(on(cuda, workers_per_gpu=2)) == 6
    assert pool_module.slots(on(cuda, slots=5)) == 5
    assert pool_module.slots(on(bench.config)) == 8
    assert pool_module.slots(on(replace(bench.config, threads_per_run=3))) == 2
    assert pool_module.slots(on(replace(bench.config, threads_per_run=2), processes_per_run=2)) == 2
    assert pool_module.slots(on(cuda, processes_per_run=2)) == 1
    assert pool_module.slots(on(cuda, processes_per_run=3, workers_per_gpu=2)) == 2


def test_a_job_has_the_cores_and_gpus_of_all_processes_of_its_run(bench):
    def asked(device: str, **launcher) -> tuple[int, int | None]:
        settings = replace(bench.config.launcher, name="slurm", processes_per_run=4, **launcher)
        config = replace(bench.config, device=device, threads_per_run=3, launcher=settings)
        options = _sbatch(config, "name", 1, [])
        return options["cpus_per_task"], options.get("gpus_per_node")

    assert asked("cpu") == (12, None)
    assert asked("cuda") == (12, 4)
    assert asked("cuda", cpus_per_task=32, gpus_per_node=8) == (32, 8)
    assert asked("cuda", nodes_per_run=2) == (6, 2), "on each of its nodes"


# -- no process is left --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGHUP, -1)], ids=str
)
def test_no_process_is_left_when_the_driver_goes(tmp_path, number, code):
    """Killed, interrupted, or its terminal closed."""
    driver = started(idle.driver(tmp_path))
    until(driver, "both are held")
    processes = [os.pidfd_open(pid) for pid in family(driver.pid)]
    assert len(processes) == 2
    driver.send_signal(number)
    out, _ = driver.communicate(timeout=PATIENCE_S)
    assert all(select.select([process], [], [], PATIENCE_S)[0] for process in processes)
    assert driver.returncode == code, out
    assert "Traceback" not in out
    assert out.count("stopping …") == (number == signal.SIGINT), "at once, since checkpoints may take seconds"
    for checkpoint in (tmp_path / "s/runs").glob("*/checkpoint.pt"):
        assert json.loads(checkpoint.read_text()) == {"step": 1}, "a worker left no checkpoint"


# -- workers that die, hang, or take too long ----------------------------------------------------------------


@pytest.mark.thorough
def test_a_worker_that_hangs_is_killed_and_its_run_tried_again(bench):
    """A stopped process is as unresponsive as one that hangs in a driver call."""
    [spec] = bench.idle(1, at=2, do="hold")
    stopped = []

    def stop(done, busy):
        if busy and not stopped and (bench.study.progress(spec.run_id) or {}).get("step"):
            stopped.append(bench.worker())
            os.kill(stopped[0], signal.SIGSTOP)
            bench.release(spec)

    bench.pool(heartbeat_s=2).run([spec], [], stop, canary=False)
    assert f"worker 0 on {spec.run_id}: no sign of life for 2 s; it is killed" in bench.said
    assert bench.kinds(spec) == ["begin", "lost", "begin", "end"]


SLOW_TO_IMPORT = """
import fcntl, os, sys
if "ebc_lab.study.launch.worker" in " ".join(sys.orig_argv):
    open({here!r} + "/importing", "w").close()
    fcntl.flock(os.open({here!r} + "/held", os.O_RDONLY), fcntl.LOCK_SH)
"""


@pytest.fixture
def slow_to_import(tmp_path, monkeypatch):
    """(a folder, a file): workers import until the file is closed; `importing` is in the folder once one
    does.
    """
    monkeypatch.setenv("PYTHONPATH", site(tmp_path, SLOW_TO_IMPORT.format(here=str(tmp_path))))
    with open(tmp_path / "held", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield tmp_path, held


@pytest.mark.thorough
def test_a_worker_that_is_slow_to_start_is_waited_for_and_not_killed(bench, slow_to_import):
    """It imports for several times `heartbeat_s`."""
    [spec] = bench.idle(1)
    folder, held_back = slow_to_import
    watched = []

    def wait(done, busy):
        if pool.signs.known and not watched:
            watched.append(pool.watched)
        checked_twice = watched and pool.watched > watched[0] + 2 * pool.config.launcher.heartbeat_s
        if checked_twice and (folder / "importing").exists():
            held_back.close()

    pool = bench.pool(heartbeat_s=0.2)
    pool.run([spec], [], wait, canary=False)
    assert bench.kinds(spec) == ["begin", "end"]
    assert bench.said == []


def test_a_worker_that_never_starts_is_killed_in_the_end(bench, slow_to_import):
    [spec] = bench.idle(1)
    with pytest.raises(WorkersFailed, match=r"before they take a run \(no sign of life since it was started"):
        bench.run([spec], heartbeat_s=0.1, start_s=0.4)
    assert bench.said == ["worker 0: no sign of life since it was started, for 0.4 s; it is killed"] * 3


@pytest.mark.thorough
def test_a_run_that_takes_longer_than_allowed_is_given_up_as_lost_and_the_others_continue(bench):
    [slow] = bench.idle(1, at=2, do="hold")
    quick = bench.spec(steps=3, seed=9)
    bench.run([slow, quick], run_timeout_s=1, max_lost=1)
    lost = bench.study.result(slow.run_id)
    assert lost["outcome"] == "lost"
    assert "its worker died 2 times, at last: longer than launcher.run_timeout_s, 1 s" in lost["cause"]
    assert bench.kinds(slow) == ["begin", "lost"] * 2
    assert bench.study.result(quick.run_id)["outcome"] == "completed"


@pytest.mark.parametrize("clean", [False, True])
def test_workers_that_never_take_a_run_stop_the_study(bench, clean):
    pool = bench.pool()
    death = Death("0", "exit code 1", Path("the.log"), clean=clean)
    pool._record_death(death, {"ran": 1})  # one that has worked does not count
    for _ in range(pool_module.MAX_FAILED_STARTS - 1):
        pool._record_death(death, {})
    what = "find no run that they can claim" if clean else "die before they take a run"
    with pytest.raises(WorkersFailed, match=rf"workers {what} \(exit code 1\): read the\.log"):
        pool._record_death(death, {})


def test_a_run_may_lose_as_many_workers_as_allowed_and_no_more(quiet):
    """Of those on the list; one that a worker trained to fill its time is only noted."""
    for most, times in ((0, "once"), (1, "2 times"), (2, "3 times")):
        spec, spare = (quiet.spec(steps=5 + most, seed=seed) for seed in (1, 2))
        pool = quiet.pool(max_lost=most)
        pool.specs = {spec.run_id: spec}
        causes = [f"killed by SIGKILL for the {number}th time" for number in range(1, most + 2)]
        for cause in causes:
            assert quiet.study.result(spec.run_id) is None
            for lost in (spare, spec):
                pool._record_death(Death("0", cause, Path("the.log")), {"run_id": lost.run_id, "ran": 1})
        given_up = quiet.study.result(spec.run_id)
        assert given_up["outcome"] == "lost"
        assert given_up["cause"] == f"its worker died {times}, at last: {causes[-1]}; its log: the.log"
        assert (given_up["identity"], given_up["steps"]) == (spec.identity_sha256, 0)
        assert quiet.study.result(spare.run_id) is None
        for run in (spec, spare):
            told = [line for line in quiet.said if line.startswith(run.run_id)]
            assert told == [f"{run.run_id} has lost its worker 0: {cause}" for cause in causes]
            events = [(e["event"], e["worker"], e["cause"]) for e in quiet.events(run)]
            assert events == [("lost", "0", cause) for cause in causes]


def test_a_run_that_another_has_taken_meanwhile_is_not_given_up(quiet):
    [spec] = quiet.idle(1)
    pool = quiet.pool(max_lost=0)
    pool.specs = {spec.run_id: spec}
    with run_lock(quiet.study.run_dir(spec.run_id)) as mine:
        assert mine
        pool._record_death(Death("0", "x", Path("log")), {"run_id": spec.run_id, "ran": 1})
    assert quiet.study.result(spec.run_id) is None
    assert pool.lost == {spec.run_id: 1}


DEATHS = {  # (slot, run, how many runs its worker had begun) of each death, and which slots are avoided then
    "two runs": ([(0, "a", 1), (0, "b", 1)], [0]),
    "one of them before it took a run": ([(0, None, 0), (0, "a", 1)], [0]),
    "one run twice": ([(0, "a", 1), (0, "a", 1)], []),
    "one was finished between them": ([(0, "a", 1), (0, "b", 2)], []),
    "one was finished by the worker that died then": ([(0, "a", 1), (0, None, 1)], []),
    "and no more were": ([(0, "a", 1), (0, "b", 2), (0, "c", 1)], [0]),
    "nowhere is better": ([(0, "a", 1), (1, "b", 1), (2, "c", 1), (0, "d", 1)], []),
    "one place is better": ([(0, "a", 1), (1, "b", 1), (0, "c", 1), (1, "d", 1)], [0, 1]),
    "said as often as it is seen": ([(0, "a", 1), (0, "b", 1), (1, "a", 1), (1, "b", 1)], [0, 1]),
}


def test_a_place_where_workers_die_on_one_run_after_another_is_avoided(quiet, monkeypatch):
    runs = dict(zip("abcd", quiet.idle(4), strict=True))
    started = []
    monkeypatch.setattr(local, "start_worker", lambda session, name, *_: started.append(name) or Mock())
    for case, (deaths, avoided) in DEATHS.items():
        quiet.said.clear()
        pool = quiet.pool(3)
        pool._watch_workers({str(slot): {"host": "h"} for slot in range(3)}, [])  # all three have begun
        for slot, run, begun in deaths:
            note = {"run_id": run and runs[run].run_id, "ran": begun}
            pool._record_death(Death(str(slot), "x", Path("log"), counts=False), note)
        where = [f"slot {slot}" for slot in avoided]
        assert list(pool.avoided) == where, case
        told = [line for line in quiet.said if "keep dying" in line]
        avoids = "workers keep dying in {}, and not elsewhere: no more are started there"
        assert told == [avoids.format(place) for place in where], case
        started.clear()
        pool._start_workers(3)
        pool.workers.clear()
        quiet.close()
        assert started == [str(slot) for slot in range(3) if slot not in avoided], case


# -- workers that joined from elsewhere ----------------------------------------------------------------------

GUEST = "guest-node2-7-ab"


def test_a_worker_that_joins_is_named_with_its_machine_and_its_end_is_told(quiet):
    [spec, done] = quiet.idle(2)
    pool = quiet.pool(max_lost=9)
    pool.specs = {spec.run_id: spec}
    session = pool.session

    def at_work(name: str = GUEST, **note) -> FileLock:
        session.note("worker", name, host="node2", **note)
        lock = FileLock(session.root / f"{name}.lock", fallback_to_soft=False)
        lock.acquire()
        return lock

    def look() -> list[str]:
        quiet.said.clear()
        pool._see_guests(session.notes())
        return quiet.said

    lock = at_work()
    assert look() == [f"worker {GUEST} has joined, on node2"]
    assert pool.guests == [GUEST]
    assert look() == []
    session.forget(GUEST)
    lock.release()
    assert look() == [f"worker {GUEST} has left"]
    assert pool.guests == []

    lost = f"{spec.run_id} has lost its worker {GUEST}: "
    for cause, code in [("its process was killed, or its machine is gone", None), ("killed by SIGSEGV", -11)]:
        lock = at_work(run_id=spec.run_id, ran=1)
        look()
        if code is not None:
            session.note("exit", GUEST, code=code)
        lock.release()
        assert look() == [lost + cause]
        assert pool.guests == []
        assert session.notes() == {}
    at_work(run_id=spec.run_id, ran=1).release()
    assert look() == [f"{lost}killed by SIGSEGV"], "it came and went between two looks"
    (quiet.study.run_dir(done.run_id) / "result.json").write_text("{}")
    for note in ({"run_id": done.run_id, "ran": 1}, {"run_id": None, "ran": 1}):
        lock = at_work(**note)
        look()
        lock.release()
        assert look() == [], "it ended with nothing in its hands"
    at_work("0", run_id=spec.run_id).release()
    assert look() == [], "one of the driver's own is no guest"
    assert pool.lost == {spec.run_id: 3}
    assert pool.failed_starts == 0


def test_a_worker_that_joined_and_shows_no_sign_of_life_is_named_once_and_not_killed(quiet, monkeypatch):
    [spec] = quiet.idle(1)
    pool = quiet.pool(heartbeat_s=8, start_s=9)
    clock = [100.0]
    monkeypatch.setattr(pool_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    pool.guests = [GUEST, "guest-other"]
    told = []
    for seconds, beat in [(0, 1), (9, 1), (10, 2), (19, 2), (20, 2), (99, 2)]:
        clock[0] = 100.0 + seconds
        notes = {GUEST: {"run_id": spec.run_id, "host": "node2", "beat": beat}}
        pool._watch_workers({**notes, "guest-other": {"beat": seconds}}, [])
        told.append(quiet.said.copy())
    line = f"worker {GUEST} on {spec.run_id}: no sign of life for 9 s; end it on node2"
    assert told == [[]] * 4 + [[line]] * 2
    assert pool.killed == {}


def test_a_run_that_broke_the_device_itself_is_not_lost(bench):
    spec = bench.spec()
    (bench.study.run_dir(spec.run_id) / "result.json").write_text("{}")
    pool = bench.pool(max_lost=0)
    note = {"run_id": spec.run_id, "ran": 1, "cause": "device-side assert", "device_failed": True}
    pool.specs = {spec.run_id: spec}
    pool._record_death(Death("0", "exit code 75", Path("log")), note)
    assert pool.lost == {}
    assert bench.events(spec) == []


# -- which runs are offered, and to whom ---------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_the_canary_goes_alone_until_it_has_taken_a_step_and_where_it_fails_another_does(bench, fails):
    specs = [*([bench.spec("unheard_of", steps=9)] if fails else []), *bench.idle(3)]
    pool = bench.pool(2)
    offered: list[list[str]] = []
    publish = pool.session.publish
    pool.session.publish = lambda runs, **how: (offered.append(list(runs)), publish(runs, **how))
    pool.run(specs, [], lambda done, busy: None, canary=True)
    assert [len(runs) for runs in offered] == ([1, 2, 4] if fails else [1, 3])
    assert sorted(offered[-1]) == sorted(s.run_id for s in specs)
    first = bench.study.result(offered[0][0])
    assert first["outcome"] == ("failed" if fails else "completed")
    kinds = "a run of kind 'unheard_of' is unknown here; the kinds are train, overhead, step or idle"
    assert not fails or kinds in first["cause"]


def test_the_costliest_run_comes_first_and_spare_ones_last(quiet):
    short, long, middle, spare, other = (quiet.spec(steps=steps) for steps in (3, 9, 5, 99, 7))
    pool = quiet.pool(slots=1)
    offered: list[list[str]] = []
    pool.session.publish = lambda runs, **how: offered.append(list(runs))
    pool._start_workers = lambda wanted: waiting.append(wanted)
    waiting: list[int] = []

    def check_in(done, busy):
        for spec in (short, long, middle)[len(waiting) : 3] if len(waiting) == 2 else ():
            (quiet.study.run_dir(spec.run_id) / "result.json").write_text("{}")
        if len(waiting) == 3:
            raise KeyboardInterrupt
        return [[other.run_id], None, None][len(waiting)]

    with pytest.raises(KeyboardInterrupt):
        pool.run([short, long, middle], [spare], check_in, canary=False)
    first = [spec.run_id for spec in (long, middle, short)]
    assert offered == [[*first, spare.run_id], [*first, other.run_id]]
    assert waiting == [3, 3, 3]


@pytest.mark.thorough
def test_a_slot_that_the_wave_leaves_free_has_a_worker_for_spare_runs_from_the_start(bench):
    """As where a study is resumed with one run of its stage left."""
    [last, spare] = specs = bench.idle(2, at=1, do="hold")

    def release(done, busy):
        if len(busy) == 2:
            bench.release(*specs)
        return [spare.run_id]

    bench.pool(2).run([last], [spare], release, canary=False)
    assert bench.kinds(spare)[0] == "begin"


@pytest.mark.thorough
def test_three_workers_never_train_one_run_at_once(bench):
    specs = bench.idle(2, steps=40)
    bench.run(specs, 3)
    assert [bench.kinds(s) for s in specs] == [["begin", "end"]] * 2


# -- what lies where -----------------------------------------------------------------------------------------


def test_a_log_cut_off_by_a_crash_is_still_read(tmp_path):
    attempts.note(tmp_path, "begin", pid=1)
    with open(RunFiles(tmp_path).attempts, "a") as f:
        f.write('{"at": "2026-')
    attempts.note(tmp_path, "begin", pid=2)
    assert [e["pid"] for e in attempts.log(tmp_path)] == [1, 2]


def test_the_launcher_settings_of_another_launcher_are_refused():
    with pytest.raises(UserError, match=r"workers_per_gpu goes with launcher=local"):
        compose(["scale=smoke", "device=cpu", "launcher=slurm", "launcher.workers_per_gpu=2"])
    with pytest.raises(UserError, match=r"launcher\.sbatch\.array is set by the launcher"):
        compose(["scale=smoke", "device=cpu", "launcher=slurm", "+launcher.sbatch.array=3"])
    with pytest.raises(UserError, match="says nothing about the nodes"):
        compose(["scale=smoke", "launcher=slurm"])
    config = compose(["scale=smoke", "device=cpu", "launcher=slurm", "+launcher.sbatch.reservation=x"])
    assert config.launcher.sbatch == {"reservation": "x"}


def test_how_many_runs_shared_a_worker_is_no_setting_any_more(finished, tmp_path):
    """Studies that earlier versions recorded have it, and are read and continued without it."""
    said = refused("plan", "scale=smoke", "launcher.runs_per_worker=2", cwd=tmp_path)
    assert "launcher.runs_per_worker is no setting any more: a worker trains one run at a time" in said
    assert "launcher.workers_per_gpu=2" in said
    header = dict(finished[1].study.header())
    header["config"] = {**header["config"], "launcher": to_dict(LauncherConfig()) | {"runs_per_worker": 4}}
    assert recorded_config(header).launcher == LauncherConfig()


def test_a_session_folder_is_private(bench):
    root = bench.pool().session.root
    for level in (root, root.parent, root.parent.parent):
        assert level.stat().st_mode & 0o077 == 0
