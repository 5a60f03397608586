import os
import re
import runpy
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

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


SLURM = str(ROOT / "scripts" / "test_slurm.sh")


def test_the_slurm_of_the_tests_says_how_it_is_called():
    done = subprocess.run([SLURM, "start"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "test_slurm.sh up" in done.stderr


@pytest.mark.slurm
def test_run_hands_on_the_exit_code_and_leaves_a_slurm_that_was_up():
    done = subprocess.run(
        [SLURM, "run", "bash", "-c", "squeue --noheader --partition=high && exit 7"], capture_output=True
    )
    assert done.returncode == 7
    subprocess.run(["squeue"], check=True, capture_output=True)


@pytest.mark.slurm
@pytest.mark.slow
def test_a_driver_that_is_requeued_adopts_its_workers(tiny, tmp_path):
    submit = [
        "sbatch",
        "--wait",
        "--parsable",
        "--mem=1G",
        "--output=driver.log",
        str(EXAMPLES / "slurm_autopilot.sbatch"),
    ]
    study = [*tiny, "launcher.slots=1", "launcher.queue_every_s=1", "output_dir=out", "study.name=s"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    job = subprocess.Popen(
        [*submit, *study], cwd=tmp_path, env={**os.environ, "PATH": path}, stdout=subprocess.PIPE, text=True
    )
    threading.Thread(
        target=job.wait, daemon=True
    ).start()  # to tail --pid an end that nobody has waited for is none
    number = job.stdout.readline().strip()
    follow = [
        "tail",
        "--lines=+1",
        "-F",
        "--sleep-interval=0.1",
        f"--pid={job.pid}",
        str(tmp_path / "driver.log"),
    ]
    with subprocess.Popen(follow, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as log:
        assert any("1 job(s) running" in line for line in log.stdout)
        subprocess.run(
            ["scancel", "--batch", "--signal=USR1", number], check=True
        )  # what it is sent when its time is over
        assert any("adopted" in line for line in log.stdout)
        log.terminate()
    assert job.wait() == 0, (tmp_path / "driver.log").read_text()
    assert read_json(tmp_path / "out/s/acceptance.json")
