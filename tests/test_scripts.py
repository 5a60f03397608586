import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import proof
import pytest
from support.drivers import shell, until_true

from ebc_lab.records.json_files import read_json

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture
def example(monkeypatch, capsys):
    """Run an example in this process, without any network. -> its lines"""

    def call(name: str, *options: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [name, *options])
        monkeypatch.setattr(socket, "getaddrinfo", None)
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return call


@pytest.mark.thorough
def test_the_example_loop_learns_and_holds_its_budget(example):
    lines = [re.findall(r"\d+\.\d+", line) for line in example("own_loop.py", "--steps", "101")]
    losses = [float(line[0]) for line in lines]
    assert losses[-1] < losses[0] - 1
    assert all(0.003 < float(line[2]) < 0.03 for line in lines)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "options",
    [
        ["--model=gpt2", "--budget=shadow"],
        pytest.param(["--model=llama", "--budget=fisher"], marks=pytest.mark.slow),
    ],
)
def test_a_transformers_model_is_held_to_its_budget_and_nothing_is_downloaded(example, options):
    *steps, median = example("transformers_loop.py", "--steps=41", *options)
    losses = [float(re.search(r"loss (\d+\.\d+)", line)[1]) for line in steps]
    assert losses[-1] < losses[0] - 1
    assert "over 3 audited, clipped steps" in median
    assert float(median.split()[-1]) == pytest.approx(1, abs=0.3)


@pytest.mark.slurm
@pytest.mark.slow
def test_a_driver_that_is_requeued_adopts_its_workers(tiny, tmp_path):
    log = tmp_path / "driver.log"
    script = EXAMPLES / "slurm_autopilot.sbatch"
    submit = ["sbatch", "--wait", "--parsable", "--mem=1G", f"--output={log}", script]
    study = [*tiny, "launcher.slots=1", "launcher.queue_every_s=1", "output_dir=out", "study.name=s"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path}
    job = subprocess.Popen([*submit, *study], cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True)
    number = job.stdout.readline().strip()
    until_true(lambda: log.exists() and "1 job(s) running" in log.read_text(), within_s=300)
    shell("scancel", "--batch", "--signal=USR1", number)  # what it is sent when its time is over
    until_true(lambda: "adopted" in log.read_text(), within_s=300)
    assert job.wait() == 0, log.read_text()
    assert read_json(tmp_path / "out/s/acceptance.json")


def test_what_proof_is_called_with_reaches_no_suite(tmp_path, monkeypatch):
    monkeypatch.setenv("ARGS", "1")
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone" / "Makefile").write_text("suite:\n\t@echo $(ARGS)7 passed in 1 s\n")
    assert proof.ran("suite", "make suite", tmp_path / "clone")["said"][-1] == "7 passed in 1 s"
