"""What only a GPU can show, `make test-cuda`: no synchronisation, and graphs that change nothing."""

import pytest
import torch
from support.runs import resolved

from ebc_lab.config.choices import changed
from ebc_lab.config.compose import compose
from ebc_lab.config.dicts import run_part
from ebc_lab.records.streams import read_columns
from ebc_lab.training.graphs import StepGraphs
from ebc_lab.training.run import Training

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

ARMS = {
    "plain": {"stabilizer": {"name": "none"}},
    "shadow": {"stabilizer": {"name": "ebc"}, "budget": {"target_kl": 0.01, "schedule": "linear"}},
    "tracked": {"stabilizer": {"name": "ebc"}, "budget": {"name": "tracked", "target_kl": 0.01}},
    "shadow under muon": {"stabilizer": {"name": "ebc"}, "optimizer": {"name": "muon", "momentum": 0.9}},
    "surrogate": {"stabilizer": {"name": "ebc"}, "budget": {"name": "surrogate", "target_kl": 0.01}},
}


@pytest.fixture
def run(text_file):
    shape = ["scale=paper", "device=cuda", "dtype=bfloat16", "threads_per_run=1", "compile=off"]
    shape += ["batch_size=16", "model.context=64", "steps=90", "eval_every=30"]
    return resolved(run_part(compose([*shape, "data=path", f"data.file={text_file}"], study=False)))


def made(run, directory, graphs=None):
    directory.mkdir()
    training = Training(run, directory)
    training.graphs = graphs or training.graphs
    return training


@pytest.mark.parametrize("settings", ARMS.values(), ids=ARMS)
def test_a_graphed_run_has_the_eager_losses(run, tmp_path, settings):
    run = changed(run, settings)
    for name, graphs in (("graphed", None), ("eager", StepGraphs(None))):
        made(run, tmp_path / name, graphs).run()
    graphed, eager = (read_columns(tmp_path / k / "steps.csv")["loss"] for k in ("graphed", "eager"))
    assert graphed == pytest.approx(eager, rel=1e-3)


@pytest.mark.parametrize("settings", ARMS.values(), ids=ARMS)
def test_the_hot_path_never_waits_for_the_device(run, tmp_path, settings):
    run = changed(run, {**settings, "steps": 400})
    training = made(run, tmp_path / "run")
    training.advance(230)  # past warm-up, captures and the sweeps of all groups
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        training.take_steps(9)  # 230 to 238: no groups are due
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert training.record_steps() is None
