"""Runs that train on a worker: the same bytes as by themselves, whatever happens to the worker."""

import os
import signal
from pathlib import Path

import pytest
from support.called import refused
from support.drivers import held_at_first
from support.idle import Bench

from ebc_lab.config.dicts import to_dict
from ebc_lab.config.schema import LauncherConfig
from ebc_lab.study.launch.pool import Death
from ebc_lab.study.store.study import recorded_config
from ebc_lab.training.outcome import run_and_record


class Seen(Exception):
    """What a test was waiting for has happened."""


@pytest.fixture
def bench(tiny, tmp_path):
    """Runs of a tiny study without a driver."""
    made = Bench(tmp_path, *tiny, "dtype=float32", "threads_per_run=1", "compile=off")
    yield made
    made.close()


def same_as_alone(bench: Bench, spec, out: Path) -> None:
    """A run's steps and figures, against the same run by itself in this process."""
    alone = run_and_record(spec.run, out / "alone", spec.run_id)
    found = bench.study.result(spec.run_id)
    for key in ("outcome", "steps", "val_loss", "val_se", "c_mean"):
        assert found[key] == alone[key], key
    steps = bench.study.run_dir(spec.run_id) / "steps.csv"
    assert steps.read_bytes() == (out / "alone" / "steps.csv").read_bytes()


@pytest.mark.parametrize(
    ("sent", "events"),
    [
        (signal.SIGKILL, ["begin", "lost", "begin", "end"]),
        pytest.param(signal.SIGINT, ["begin", "stopped"], marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_to_the_same_bits_from_the_checkpoint_of_a_worker_that_was_ended(
    bench, tmp_path, monkeypatch, sent, events
):
    monkeypatch.setenv("PYTHONPATH", held_at_first(tmp_path))
    spec = bench.spec("train", steps=100)
    ended = []

    def end(done, busy):
        if not ended and busy and bench.all_in([spec], "checkpoint.pt"):
            ended.append(bench.worker())
            os.kill(ended[0], sent)
            bench.release(spec)
            if sent == signal.SIGINT:
                raise Seen

    pool = bench.pool(checkpoint_every_s=0)
    if sent == signal.SIGINT:
        with pytest.raises(Seen):
            pool.run([spec], [], end, canary=False)
        assert bench.kinds(spec) == events
        assert bench.all_in([spec], "checkpoint.pt")
        bench.run([spec])
    else:
        pool.run([spec], [], end, canary=False)
        assert bench.kinds(spec) == events
    assert ended
    same_as_alone(bench, spec, tmp_path)


def test_a_run_that_broke_the_device_itself_is_not_lost(bench):
    spec = bench.spec()
    (bench.study.run_dir(spec.run_id) / "result.json").write_text("{}")
    pool = bench.pool(max_lost=0)
    note = {"run_id": spec.run_id, "ran": 1, "cause": "device-side assert", "device_failed": True}
    pool.specs = {spec.run_id: spec}
    pool._record_death(Death("0", "exit code 75", Path("log")), note)
    assert pool.lost == {}
    assert bench.events(spec) == []


def test_how_many_runs_shared_a_worker_is_no_setting_any_more(bench, finished, tmp_path):
    """Studies that earlier versions recorded have it, and are read and continued without it."""
    said = refused("plan", "scale=smoke", "launcher.runs_per_worker=2", cwd=tmp_path)
    assert "launcher.runs_per_worker is no setting any more: a worker trains one run at a time" in said
    assert "launcher.workers_per_gpu=2" in said
    header = dict(finished[1].study.header())
    header["config"] = {**header["config"], "launcher": to_dict(LauncherConfig()) | {"runs_per_worker": 4}}
    assert recorded_config(header).launcher == LauncherConfig()
