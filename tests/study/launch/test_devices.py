"""Several GPUs, of a fake nvidia-smi, with real worker processes: which has which, that none is given twice,
and what happens when one falls out, is full, or is held by somebody else.

The runs are `idle` ones, which see their GPU by its name alone and fail on it in torch's words.
"""

import collections
import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from support import idle
from support.drivers import started, until
from support.idle import Bench
from support.smi import BUSY, gpu_uuid, mig_uuid

from ebc_lab.study.launch import open_pool
from ebc_lab.study.launch.pool import Death, WorkersFailed

GPU = [gpu_uuid(number) for number in range(8)]
MIG = [mig_uuid(1, instance) for instance in range(2)]
FAILED = "CUDA error: unspecified launch failure"


class Gpus(Bench):
    """Runs in a study without a driver, for pools that are opened as a driver opens them, on its GPUs."""

    def __init__(self, out: Path):
        super().__init__(out)
        self.seen: list[list[str]] = []  # at each look, the GPUs of the workers that lived then

    def run(self, specs, check_in=lambda done, busy: None, **launcher) -> None:
        """Train them all, and keep what each living worker could see of GPUs."""

        def look(done, busy) -> None:
            self.seen.append(list(self.workers().values()))
            check_in(done, busy)

        settings = {"name": "local", "slots": 0, **launcher}
        config = replace(self.config, device="cuda", launcher=replace(self.config.launcher, **settings))
        with open_pool(config, self.study, self.said.append) as pool:
            pool.run(specs, [], look, canary=False)

    def workers(self) -> dict[str, str]:
        """Worker -> its CUDA_VISIBLE_DEVICES, from its process itself, of those that live."""
        return {
            name: gpus for name, note in self.notes().items() if (gpus := visible_to(note["pid"])) is not None
        }

    def trained_on(self, spec) -> list[str]:
        """The GPUs of each attempt at a run."""
        return [e["cuda_visible_devices"] for e in self.events(spec) if e["event"] == "begin"]

    def plan(self, *specs, **plan) -> None:
        for spec in specs:
            (self.study.run_dir(spec.run_id) / "idle.json").write_text(json.dumps(plan))

    def outcomes(self, specs) -> list[str]:
        return [self.study.result(spec.run_id)["outcome"] for spec in specs]


def visible_to(pid: int) -> str | None:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next(
        (v.partition(b"=")[2].decode() for v in variables if v.startswith(b"CUDA_VISIBLE_DEVICES=")), None
    )


@pytest.fixture
def bench(tmp_path):
    made = Gpus(tmp_path)
    yield made
    made.close()


def held_by_all(bench, workers: int, **launcher) -> list[str]:
    """The GPUs of so many workers while each holds a run."""
    specs = bench.idle(workers, at=1, do="hold")
    together: list[str] = []

    def release(done, busy) -> None:
        if not together and len(busy) == workers:
            together.extend(bench.workers().values())
            bench.release(*specs)

    bench.run(specs, release, **launcher)
    assert len(together) == workers
    assert bench.outcomes(specs) == ["completed"] * workers
    begun = {event["pid"]: event["cuda_visible_devices"] for s in specs for event in bench.events(s)[:1]}
    assert sorted(begun.values()) == sorted(together), "attempts.jsonl says what the workers saw"
    return together


# -- which worker has which GPU ------------------------------------------------------------------------------


DIVIDED = {1: ["3g.40gb", "1g.10gb"]}
NONE = {}
HELD = [  # tests/config/test_machine.py has the other ways to name GPUs, without workers
    pytest.param(8, NONE, f"{GPU[6]},{GPU[3][:9]},9", NONE, [GPU[6], GPU[3]], id="inherited"),
    pytest.param(3, DIVIDED, None, NONE, [GPU[0], *MIG, GPU[2]], id="divided"),
    pytest.param(2, NONE, None, {"workers_per_gpu": 2}, [*GPU[:2], *GPU[:2]], id="shared"),
    pytest.param(
        6, DIVIDED, None, {"processes_per_run": 2}, [f"{GPU[0]},{GPU[2]}", f"{GPU[3]},{GPU[4]}"], id="pairs"
    ),
    pytest.param(8, NONE, None, {"processes_per_run": 8}, [",".join(GPU)], id="eight"),
]


@pytest.mark.thorough
@pytest.mark.parametrize(("count", "mig", "inherited", "launcher", "held"), HELD)
def test_each_worker_has_the_gpus_of_a_run_and_no_other_has_them(
    count, mig, inherited, launcher, held, bench, machine_with, monkeypatch
):
    machine_with(count, mig)
    if inherited is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", inherited)
    assert sorted(held_by_all(bench, len(held), **launcher)) == sorted(held)


# -- none is given twice -------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_a_worker_that_dies_is_logged_with_its_signal_and_replaced_on_its_own_gpu(bench, machine_with):
    machine_with(2)
    specs = bench.idle(2, at=1, do="hold")
    killed: list[int] = []

    def kill(done, busy) -> None:
        if len(busy) < 2:
            return
        pids = {visible_to(note["pid"]): note["pid"] for note in bench.notes().values()}
        if not killed:
            killed.append(pids[GPU[1]])
            os.kill(killed[0], signal.SIGKILL)
        elif pids.get(GPU[1]) not in (None, killed[0]):
            bench.release(*specs)

    bench.run(specs, kill, max_lost=1)
    assert bench.outcomes(specs) == ["completed"] * 2
    assert sorted((bench.trained_on(spec) for spec in specs), key=len) == [[GPU[0]], [GPU[1], GPU[1]]]
    [lost] = [event for spec in specs for event in bench.events(spec) if event["event"] == "lost"]
    assert "SIGKILL" in lost["cause"]
    assert "memory" in lost["cause"]
    for living in bench.seen:
        assert len(set(living)) == len(living), "two workers had one GPU"


@pytest.mark.thorough
@pytest.mark.parametrize(("together", "workers"), [(1, 2), (2, 1)])
def test_the_next_call_waits_for_the_gpus_that_workers_of_a_killed_driver_still_hold(
    together, workers, bench, machine_with, tmp_path
):
    """Also where it groups them otherwise."""
    machine_with(2)
    driver = started(idle.driver(tmp_path, device="cuda", slots=0))
    until(driver, "both are held")
    old = [note["pid"] for note in bench.notes().values()]
    for pid in old:
        os.kill(pid, signal.SIGSTOP)  # as one that hangs in a driver call, or writes for long
    driver.kill()
    driver.wait()  # its workers keep its output open
    first = [*bench.idle(2), bench.spec(seed=9)]
    bench.release(*first)
    waited: collections.Counter = collections.Counter()
    beats: dict[str, float] = {}

    def look(done, busy) -> None:
        for name, note in bench.notes().items():
            if note.get("beat") not in (None, beats.get(name)):
                beats[name] = note["beat"]
                waited[name] += 1
        if old and len(waited) == workers and min(waited.values()) >= 2:
            assert not done
            assert not busy
            while old:
                os.kill(old.pop(), signal.SIGKILL)

    try:
        bench.run(first, look, processes_per_run=together)
    finally:
        for pid in old:
            os.kill(pid, signal.SIGKILL)
    assert not old, "the new workers did not wait"
    assert bench.outcomes(first) == ["completed"] * 3


# -- a GPU that cannot be used -------------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize("ending", ["an error", signal.SIGKILL, signal.SIGSTOP])
def test_a_gpu_that_falls_out_is_not_used_again_and_its_run_is_not_charged(ending, bench, machine_with):
    """Whether its worker says so, or dies or hangs without a word."""
    fake = machine_with(2)
    specs = bench.idle(4, at=1, do="hold")
    lost: list[str] = []
    told = f"{GPU[1]} is not listed by nvidia-smi any more: no more workers are started there"

    def fall(done, busy) -> None:
        stepped = all((bench.study.progress(spec.run_id) or {}).get("step") for spec in specs[:2])
        if len(busy) == 2 and not lost and stepped:
            [note] = (note for note in bench.notes().values() if visible_to(note["pid"]) == GPU[1])
            lost.append(note["run_id"])
            fake.lose(1)
            if ending == "an error":
                bench.plan(*specs, at=2, do="device", on=[GPU[1]], says=FAILED)
                bench.release(*(spec for spec in specs if spec.run_id in lost))
            else:
                os.kill(note["pid"], ending)
        if any(line.startswith(told) for line in bench.said):
            bench.release(*specs)

    bench.run(specs, fall, max_lost=0, heartbeat_s=5)
    assert bench.outcomes(specs) == ["completed"] * 4
    tried = {spec.run_id: bench.trained_on(spec) for spec in specs}
    assert tried == {run_id: [GPU[1], GPU[0]] if run_id in lost else [GPU[0]] for run_id in tried}
    assert len([line for line in bench.said if line.startswith(told)]) == 1


def test_what_a_worker_said_of_its_gpu_counts_although_it_then_hung(bench, machine_with):
    machine_with(2)
    pool, [spec] = bench.pool(2, tuple(GPU[:2]), max_lost=0), bench.idle(1)

    pool.killed["1"] = "no sign of life for 60 s"
    note = {"run_id": spec.run_id, "ran": 1, "device_failed": True, "cause": BUSY}
    pool.specs = {spec.run_id: spec}
    pool._record_death(Death("1", "killed by SIGKILL", Path("log")), note)
    assert bench.study.result(spec.run_id) is None
    assert pool.avoided == {"slot 1": f"{GPU[1]} cannot be used ({BUSY})"}


NUMBERED = f"MIG-{GPU[1]}/2/0"  # as Slurm names an instance


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "mig", "where"),
    [
        (GPU[1], {}, "it"),
        ("1", {}, "nvidia-smi's GPU 1"),
        (NUMBERED, DIVIDED, "its GPU, all instances together,"),
    ],
)
def test_where_no_gpu_is_left_the_study_stops_and_no_run_is_lost(
    name, mig, where, bench, machine_with, monkeypatch
):
    fake = machine_with(2, mig)
    fake.hold(1, 4242, 8142)
    fake.rename(0, "NVIDIA H100 80GB HBM3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", name)
    specs = bench.idle(2, at=0, do="device", on=[name], says=BUSY)
    told = f"no GPU is left to train on: {name} cannot be used ({BUSY}; on {where} is process 4242 (python, "
    with pytest.raises(WorkersFailed, match=f"^{re.escape(told)}.* continues"):
        bench.run(specs, max_lost=0)
    assert [bench.study.result(spec.run_id) for spec in specs] == [None, None]
    bench.plan(*specs, at=99)
    bench.run(specs)
    assert bench.outcomes(specs) == ["completed"] * 2


@pytest.mark.parametrize(
    ("what", "where", "outcome"),
    [  # what happens to a run on which GPUs, and what comes of it; nvidia-smi still lists them
        ({"do": "device", "says": FAILED}, GPU[:1], "completed"),
        ({"do": "oom"}, GPU[:1], "completed"),
        ({"do": "oom"}, GPU[:2], "oom"),
    ],
)
def test_the_last_run_leaves_a_gpu_that_fails_or_is_full_for_another(
    what, where, outcome, bench, machine_with
):
    machine_with(2)
    [spec] = bench.idle(1, at=1, on=where, **what)
    bench.run([spec], max_lost=0 if what["do"] == "oom" else 1)
    assert bench.trained_on(spec) == GPU[:2]
    assert bench.outcomes([spec]) == [outcome]
    full = f"{spec.run_id} ran out of memory on {GPU[0]}: it is tried again on another GPU"
    assert (full in bench.said) == (what["do"] == "oom")


@pytest.mark.thorough
def test_a_run_that_breaks_every_gpu_is_given_up_and_the_gpus_are_not(bench, machine_with):
    machine_with(2)
    [bad, *good] = bench.idle(3)
    bench.plan(bad, at=1, do="device", on=GPU[:2], says=FAILED)
    bench.run([bad, *good], max_lost=1)
    assert bench.outcomes([bad, *good]) == ["lost", *["completed"] * 2]
    assert set(bench.trained_on(bad)) == set(GPU[:2])
    assert not any("no more workers" in line for line in bench.said)
