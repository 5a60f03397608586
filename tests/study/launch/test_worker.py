"""Several runs of one worker: the same bytes as one at a time, whatever happens to the worker or to one of
them.
"""

import json
import os
import signal
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from support.called import CLI
from support.drivers import held_at_first, struck_once, without_timing
from support.idle import Bench

from ebc_lab.bench import packing
from ebc_lab.config.compose import compose
from ebc_lab.config.errors import UserError
from ebc_lab.config.parts.determinism import DeterminismConfig
from ebc_lab.records.locks import run_lock
from ebc_lab.study import resolve
from ebc_lab.study.inspect.status import status
from ebc_lab.study.launch import on_node, worker
from ebc_lab.study.launch.pool import Death, worker_settings
from ebc_lab.study.launch.session import Session
from ebc_lab.study.store import attempts
from ebc_lab.study.store.study import Study
from ebc_lab.training.outcome import run_and_record


class Seen(Exception):
    """What a test was waiting for has happened."""


class Unasked:
    """Nobody stops the worker, which is in this process."""

    told_to_end = replaced = False

    def __init__(self, *asked, **named):
        self.final = self.event = threading.Event()

    def __call__(self) -> bool:
        return False


EITHER = pytest.mark.parametrize("kind", ["idle", pytest.param("train", marks=pytest.mark.slow)])


@pytest.fixture
def packed(tiny, tmp_path):
    """Runs of a tiny study without a driver."""
    made = Bench(tmp_path, *tiny, "dtype=float32", "threads_per_run=1", "compile=off")
    yield made
    made.close()


def same_as_alone(packed: Bench, specs, out: Path) -> None:
    """Each run's steps and figures, against the same run by itself in this process."""
    for spec in specs:
        alone = run_and_record(spec.run, out / "alone" / spec.run_id, spec.run_id)
        found = packed.study.result(spec.run_id)
        for key in ("outcome", "steps", "val_loss", "val_se", "c_mean"):
            assert found[key] == alone[key], (spec.run_id, key)
        steps = packed.study.run_dir(spec.run_id) / "steps.csv"
        assert steps.read_bytes() == (out / "alone" / spec.run_id / "steps.csv").read_bytes()


@pytest.mark.parametrize(
    "stages", [["lr_sweep"], pytest.param([], marks=pytest.mark.slow)], ids=["sweep", "all"]
)
def test_a_study_of_packed_runs_is_byte_for_byte_that_of_single_ones(finished, tiny, tmp_path, stages):
    command = ["stage", *stages] if stages else ["autopilot"]
    packing = ["launcher.slots=1", "launcher.runs_per_worker=3", f"output_dir={tmp_path}", "study.name=s"]
    done = subprocess.run([*CLI, *command, *tiny, *packing], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    single = finished[1].study
    study = Study(tmp_path / "s")
    for table in study.root.glob("summary_*.csv"):
        assert without_timing(table) == without_timing(single.root / table.name)
    beside = {}
    for name in study.run_ids():
        [begun] = [e for e in attempts.log(study.run_dir(name)) if e["event"] == "begin"]
        beside[name] = begun["beside"]
        if not name.startswith("overhead_"):
            ours, theirs = (place.run_files(name).steps.read_bytes() for place in (study, single))
            assert ours == theirs
    assert max(beside.values()) == 2, "three at a time"
    assert stages or study.run_ids() == single.run_ids()
    alone = {n for name, n in beside.items() if name.startswith("overhead_")}
    assert alone <= {0}, "time is measured alone"


def test_a_run_that_diverges_or_fails_leaves_its_neighbours_bits_alone(packed, tmp_path):
    good = [packed.spec("train", steps=60, seed=s) for s in (5, 6)]
    wild = packed.spec(
        "train", steps=60, optimizer=replace(packed.first.run.optimizer, name="sgd", lr=1e30, momentum=0.0)
    )
    lost_text = packed.spec("train", steps=60, data=replace(packed.first.run.data, sha256="0" * 64))
    specs = [*good, wild, lost_text]
    packed.pool(runs_per_worker=4).run(specs, [], lambda done, busy: None, canary=False)
    assert [packed.study.result(s.run_id)["outcome"] for s in specs] == [
        "completed",
        "completed",
        "diverged",
        "failed",
    ]
    assert all(packed.events(s)[0]["beside"] >= 1 for s in (wild, lost_text))
    same_as_alone(packed, [*good, wild], tmp_path)


@EITHER
def test_kill_9_of_a_packed_worker_charges_none_of_its_runs_and_each_continues_alone(
    packed, tmp_path, monkeypatch, kind
):
    if kind == "idle":
        specs = packed.idle(3, at=3, do="hold")
    else:
        monkeypatch.setenv("PYTHONPATH", held_at_first(tmp_path))
        specs = [packed.spec("train", steps=100, seed=s) for s in (5, 6, 7)]
    begun = "progress.json" if kind == "idle" else "checkpoint.pt"
    killed = []

    def kill(done, busy):
        if not killed and busy and len(busy[0]) == 3 and packed.all_in(specs, begun):
            killed.append(packed.worker())
            os.kill(killed[0], signal.SIGKILL)
            packed.release(*specs)

    pool = packed.pool(runs_per_worker=3, checkpoint_every_s=0, max_lost=0)
    pool.run(specs, [], kill, canary=False)
    assert killed
    for spec in specs:
        events = packed.events(spec)
        assert [e["event"] for e in events] == ["begin", "lost", "begin", "end"]
        assert events[2]["beside"] == 0
    assert "any of these 3 may be to blame" in "\n".join(packed.said)
    if kind == "train":
        same_as_alone(packed, specs, tmp_path)


@EITHER
def test_memory_that_lacked_only_because_of_others_is_no_result(packed, tmp_path, monkeypatch, kind):
    if kind == "idle":
        specs = packed.idle(3, steps=40)
        (packed.study.run_dir(specs[0].run_id) / "idle.json").write_text('{"at": 1, "do": "oom"}')
    else:
        monkeypatch.setenv("PYTHONPATH", struck_once(tmp_path, 'MemoryError("what the others took")'))
        specs = [packed.spec("train", steps=40, seed=s) for s in (5, 6, 7)]
    packed.pool(runs_per_worker=3).run(specs, [], lambda done, busy: None, canary=False)
    first = packed.events(specs[0])
    assert [(e["event"], e.get("outcome")) for e in first][:2] == [("begin", None), ("end", "oom")]
    assert (first[2]["beside"], first[3]["outcome"], len(first)) == (0, "completed", 4)
    if kind == "train":
        assert (tmp_path / "struck").exists()
        same_as_alone(packed, specs, tmp_path)


@pytest.mark.parametrize("word", ["barred", "alone"])
def test_a_run_is_not_claimed_against_its_drivers_last_word_on_it(packed, monkeypatch, word):
    """The driver speaks after this worker has read the list, and before it claims the run."""
    first, second = packed.idle(2)
    runs = [first.run_id, second.run_id]
    settings = worker_settings(packed.config) | {"runs_per_worker": 2}
    session = Session.begin(packed.study, "local", bound=False, idle_s=0.0, **settings)
    said = {"barred": {second.run_id: ["me"]}} if word == "barred" else {"alone": [second.run_id]}

    def lock(directory: Path):
        if directory == packed.study.run_dir(second.run_id):
            session.publish(runs, **said)
        return run_lock(directory)

    monkeypatch.setattr(worker, "run_lock", lock)
    monkeypatch.setattr(worker, "_Stop", Unasked)
    session.publish(runs)
    assert worker.Worker(Session(session.root), "me").work() == 0
    assert packed.kinds(first) == ["begin", "end"]
    began = [e["beside"] for e in packed.events(second) if e["event"] == "begin"]
    assert began == ([] if word == "barred" else [0])


@pytest.mark.slow  # test_guards.py interrupts workers, and each kind of run resumes in tests/training
def test_a_stopped_worker_leaves_a_checkpoint_of_every_run_which_continues_to_the_same_bits(
    packed, tmp_path, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", held_at_first(tmp_path))
    specs = [packed.spec("train", steps=60, seed=s) for s in (5, 6, 7)]

    def stop(done, busy):
        if busy and len(busy[0]) == 3 and packed.all_in(specs, "checkpoint.pt"):
            os.kill(packed.worker(), signal.SIGINT)
            packed.release(*specs)
            raise Seen

    pool = packed.pool(runs_per_worker=3, checkpoint_every_s=0)
    with pytest.raises(Seen):
        pool.run(specs, [], stop, canary=False)
    packed.close()
    assert packed.all_in(specs, "checkpoint.pt")
    assert [[e["event"] for e in packed.events(s)] for s in specs] == [["begin", "stopped"]] * 3
    packed.pool(runs_per_worker=3).run(specs, [], lambda done, busy: None, canary=False)
    assert [[e["event"] for e in packed.events(s)][2:] for s in specs] == [["begin", "end"]] * 3
    same_as_alone(packed, specs, tmp_path)


def test_runs_with_dropout_share_a_worker_and_draw_numbers_of_their_own(packed, tmp_path):
    dropping = replace(packed.first.run.model, dropout=0.2)
    plain = packed.spec("train", steps=40, seed=5)
    noisy = [packed.spec("train", steps=40, seed=s, model=dropping) for s in (5, 6)]
    packed.pool(runs_per_worker=3).run([noisy[0], plain, noisy[1]], [], lambda done, busy: None, canary=False)
    assert max(packed.events(s)[0]["beside"] for s in noisy) == 2
    same_as_alone(packed, [plain, *noisy], tmp_path)


def test_runs_share_a_worker_with_those_of_the_same_determinism(packed):
    """Deterministic kernels and verity's engine are settings of the process."""
    strict = DeterminismConfig(name="torch")
    plain = [packed.spec("idle", steps=40, seed=s) for s in (5, 6)]
    others = [packed.spec("idle", steps=40, seed=s, determinism=strict) for s in (5, 6)]
    packed.pool(runs_per_worker=4).run([*plain, *others], [], lambda done, busy: None, canary=False)
    assert [packed.events(s)[0]["beside"] for s in [*plain, *others]] == [0, 1, 0, 1]


def test_no_worker_carries_more_than_its_share(packed):
    specs = packed.idle(4, at=2, do="hold")

    def release(done, busy):
        if sum(map(len, busy)) == 4:
            packed.release(*specs)

    packed.pool(2, runs_per_worker=8).run(specs, [], release, canary=False)
    assert max(packed.events(s)[0]["beside"] for s in specs) == 1, "four runs on two workers are two each"


def test_status_shows_every_run_in_progress(packed):
    specs = packed.idle(3, at=2, do="hold")
    shown = []

    def look(done, busy):
        if not shown and busy and len(busy[0]) == 3 and packed.all_in(specs, "progress.json"):
            shown.extend(r["run_id"] for r in status(packed.study)["running"])
            packed.release(*specs)

    with packed.study.held():
        packed.pool(runs_per_worker=3).run(specs, [], look, canary=False)
    assert sorted(shown) == sorted(s.run_id for s in specs)


def test_only_the_run_that_took_too_long_is_charged(packed):
    specs = [packed.spec(seed=s) for s in (5, 6)]
    late, other = (s.run_id for s in specs)
    pool = packed.pool(runs_per_worker=3, max_lost=0)
    pool.killed["0"] = ("longer than allowed", [late])
    pool._record_death(
        Death("0", "killed", Path("log")), {"run_ids": [late, other], "ran": 2}, {s.run_id: s for s in specs}
    )
    assert packed.study.result(late)["outcome"] == "lost"
    assert packed.study.result(other) is None
    assert (pool.lost, pool.alone) == ({late: 1}, set())
    assert [e["event"] for s in specs for e in packed.events(s)] == ["lost", "lost"]


def test_a_run_that_broke_the_device_itself_is_the_only_one_to_blame(packed):
    specs = [packed.spec(seed=s) for s in (5, 6)]
    guilty, other = (s.run_id for s in specs)
    (packed.study.run_dir(guilty) / "result.json").write_text("{}")
    pool = packed.pool(runs_per_worker=3, max_lost=0)
    note = {"run_ids": [guilty, other], "ran": 2, "guilty": [guilty], "cause": "device-side assert"}
    pool._record_death(Death("0", "exit code 75", Path("log")), note, {s.run_id: s for s in specs})
    assert (pool.lost, pool.alone) == ({}, set())
    assert [e["event"] for e in packed.events(specs[1])] == ["lost"]
    assert not (packed.study.run_dir(other) / "result.json").exists()


def test_deaths_that_one_run_explains_are_one_death_of_a_place(packed):
    pool = packed.pool(2, runs_per_worker=3)
    pool.places = {"slot 0", "slot 1"}
    pool._blame_place("slot 0", ["a", "b", "c"], 0)
    pool._blame_place("slot 0", ["a"], 0)
    assert pool.avoided == set()
    pool._blame_place("slot 0", ["b"], 0)
    assert pool.avoided == {"slot 0"}


def test_how_many_runs_share_a_gpu_is_measured_and_said_once(resolved, tmp_path, monkeypatch, machine_with):
    found = {"runs_per_worker": 4, "tokens_per_s": {"1": 1e5, "4": 3e5, "8": 3.1e5}, "eager": []}
    said = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(packing, "measured", lambda run: found)
    machine_with(2)

    def chosen(**launcher) -> int:
        on = replace(resolved, device="cuda", launcher=replace(resolved.launcher, name="local", **launcher))
        return resolve._runs_per_worker(on, Study(tmp_path), said.append)

    assert chosen(slots=2) == 4
    rates = "tokens/s of all together 100,000 with 1, 300,000 with 4, 310,000 with 8"
    assert said[-1] == f"4 run(s) share a GPU: {rates}; steps come from CUDA graphs"
    before = list(said)
    assert chosen(slots=4) == 2, "two workers on each GPU share what it can carry"
    assert said == before
    assert resolve._runs_per_worker(resolved, Study(tmp_path), said.append) == 1

    def fail(run, say):
        raise UserError("measuring the packing failed: no.")

    monkeypatch.setattr(resolve, "packing", fail)
    assert chosen(slots=2) == 1
    assert "one run at a time" in said[-1]


def test_on_slurm_it_is_measured_on_a_node_and_not_again(resolved, tmp_path, monkeypatch):
    asked, said = [], []
    found = {"runs_per_worker": 2, "tokens_per_s": {"1": 1e5, "2": 1.5e5}, "eager": []}
    monkeypatch.setattr(on_node, "_measured_on_node", lambda what, *_: (asked.append(what), found)[1])
    on = replace(resolved, device="cuda", launcher=replace(resolved.launcher, name="slurm", slots=4))
    assert [resolve._runs_per_worker(on, Study(tmp_path / "s"), said.append) for _ in range(2)] == [2, 2]
    assert asked == ["packing"]
    assert len(said) == 2


def test_the_number_is_no_part_of_what_a_study_is(finished):
    header = json.loads((finished[1].study.root / "study.json").read_text())
    assert header["config"]["launcher"]["runs_per_worker"] == 1
    assert "launcher" not in header["requested"]


def test_numbers_that_cannot_be_meant_are_refused():
    with pytest.raises(UserError, match=r"launcher\.runs_per_worker must be a whole number >= 0"):
        compose(["scale=smoke", "launcher.runs_per_worker=-1"])
    with pytest.raises(UserError, match="launcher=inline trains one at a time"):
        compose(["scale=smoke", "launcher=inline", "launcher.runs_per_worker=2"])
