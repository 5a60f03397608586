"""`ebc-lab train -m hydra/launcher=submitit_…` as a user types it; Slurm is a real one (make test-slurm)."""

import os
import subprocess
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from submitit.core.utils import UncompletedJobError
from submitit.slurm.slurm import SlurmJob
from support.called import CLI, SMALL_RUN, called, refused
from support.drivers import shell, started, until_true

from ebc_lab.cli.hydra.launchers import JobFailed, launching
from ebc_lab.records.json_files import read_json
from ebc_lab.records.streams import read_columns

LOCAL = ["hydra/launcher=submitit_local"]
SLURM = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=main", "hydra.launcher.timeout_min=15"]
OTHERS = {  # what a job that this one runs in would have left; srun refuses two of them together
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "7",
    "SLURM_MEM_PER_CPU": "1",
    "SLURM_MEM_PER_NODE": "99",
    "SUBMITIT_EXECUTOR": "local",
}


@pytest.fixture(scope="module")
def run(text_file):
    """Overrides of a run that takes a second."""
    return [*SMALL_RUN, "data=path", f"data.file={text_file}", "eval_every=1000", "steps=200"]


def train(*words: str, cwd: Path, **env: str) -> tuple[int, str]:
    """-> exit code, and what was said on stderr."""
    command = [*CLI, "train", "-m", *words]
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)
    return done.returncode, done.stderr


def losses(directory: Path) -> list[float]:
    return list(read_columns(directory / "steps.csv")["loss"])


@pytest.fixture(scope="module")
def swept(run, tmp_path_factory):
    """A sweep over two seeds through submitit_local: (folder, exit code, what was said)."""
    cwd = tmp_path_factory.mktemp("local")
    return cwd / "sweep", *train(*run, "seed=0,1", *LOCAL, "hydra.sweep.dir=sweep", cwd=cwd, **OTHERS)


@pytest.mark.thorough
def test_local_jobs_train_the_runs_of_a_sweep(swept):
    folder, code, said = swept
    assert code == 0, said
    assert {read_json(folder / f"{i}/result.json")["outcome"] for i in range(2)} == {"completed"}
    assert losses(folder / "0") != losses(folder / "1")
    pickles = sorted(folder.rglob("*.pkl"))
    assert pickles
    assert all(p.is_relative_to(folder / ".submitit") for p in pickles)


@pytest.mark.slow
def test_a_run_that_fails_in_its_job_is_a_sentence_and_the_others_are_done(run, tmp_path):
    words = [*run, "steps=20", "controller=energy,log_pi", *LOCAL, "hydra.sweep.dir=sweep"]
    code, said = train(*words, cwd=tmp_path)
    assert code == 2
    assert "sweep/0: error: controller=energy needs controller.a" in said
    assert "Traceback" not in said
    assert read_json(tmp_path / "sweep/1/result.json")["outcome"] == "completed"


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["hydra/launcher=submitit_slrum"], "Could not find 'hydra/launcher/submitit_slrum'"),
        ([*SLURM, "hydra.launcher.partitoin=main"], "Could not override 'hydra.launcher.partitoin'"),
        ([*LOCAL, "+hydra.launcher.partition=main"], "is not a setting of LocalLauncher"),
        ([*SLURM, "+hydra.launcher.partitoin=main"], "(did you mean partition?)"),
        ([*SLURM, "hydra.launcher.timeout_min=long"], "could not be converted to Integer"),
        ([*SLURM, "hydra.launcher.timeout_min=2"], "leaves no time to train"),
        ([*SLURM, "stesp=3"], "did you mean steps"),
        (SLURM, "`srun` not found; use hydra/launcher=submitit_local, or run this on a login node"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(run, tmp_path, words, answer):
    assert answer in refused("train", "-m", *run, "stabilizer=ebc", *words, cwd=tmp_path, PATH="")


@pytest.mark.thorough
def test_a_launcher_without_m_is_refused(run, tmp_path):
    assert "it needs -m" in refused("train", *run, *LOCAL, cwd=tmp_path)


def test_two_processes_do_not_train_in_one_folder(run, tmp_path):
    from ebc_lab.records.locks import run_lock

    (tmp_path / "sweep/0").mkdir(parents=True)
    with run_lock(tmp_path / "sweep/0") as mine:
        assert mine
        done = called("train", "-m", *run, "hydra.sweep.dir=sweep", cwd=tmp_path)
    assert done.returncode == 2
    assert "another process is training in" in done.stderr


@pytest.mark.slurm
def test_slurm_jobs_train_the_same_runs(run, swept, tmp_path):
    code, said = train(*run, "seed=0,1", *SLURM, "hydra.sweep.dir=sweep", cwd=tmp_path, **OTHERS)
    assert code == 0, said
    for i in ("0", "1"):
        assert losses(tmp_path / "sweep" / i) == losses(swept[0] / i)


@pytest.mark.slurm
def test_a_job_that_slurm_warns_writes_its_checkpoint_and_goes_on_from_it_when_requeued(run, tmp_path):
    long = [*run, "steps=3000", "launcher.checkpoint_every_s=1e6"]
    name = f"warned-{os.getpid()}"
    asked = [*long, *SLURM, "hydra.sweep.dir=sweep", f"hydra.launcher.name={name}"]
    directory = tmp_path / "sweep/0"
    steps, checkpoint = directory / "steps.csv", directory / "checkpoint.pt"
    with started([*CLI, "train", "-m", *asked], cwd=tmp_path) as driver:
        until_true(lambda: steps.exists() and len(steps.read_text().splitlines()) > 30)
        shell("scancel", "--signal=USR2", f"--name={name}")  # what pre-emption and a time-out send
        until_true(checkpoint.exists)  # the only one: none is due before
        said = driver.stdout.read()
    assert driver.returncode == 0, said
    assert read_json(directory / "result.json")["outcome"] == "completed"
    assert (directory / "log.txt").read_text().count("begins or resumes") == 2
    assert len(losses(directory)) == 3000
    assert train(*long, "hydra.sweep.dir=at_once", cwd=tmp_path)[0] == 0
    assert losses(directory) == losses(tmp_path / "at_once/0")


@pytest.mark.slurm
def test_a_partition_that_does_not_exist_is_a_sentence(run, tmp_path):
    code, said = train(*run, *SLURM, "hydra.launcher.partition=nowhere", cwd=tmp_path)
    assert code == 2
    assert "sbatch refuses the jobs" in said
    assert "Traceback" not in said


@pytest.mark.slurm
@pytest.mark.slow
def test_a_job_that_dies_is_noticed(run, tmp_path):
    """Also without accounting, where submitit by itself would wait forever."""
    code, said = train(
        *run, *SLURM, "hydra.launcher.setup=['kill -9 $$']", "hydra.sweep.dir=sweep", cwd=tmp_path
    )
    assert code == 4
    assert "ended without a result" in said
    assert "the same command with hydra.sweep.dir=sweep continues" in said
    assert "Traceback" not in said


AGAIN = """the same command with 'hydra.sweep.dir="a b"'"""


@pytest.mark.parametrize(
    ("kind", "error", "code", "said"),
    [
        (
            "Slurm",
            KeyboardInterrupt(),
            130,
            f"interrupted; the jobs continue without it, and once they are over {AGAIN} finds their results",
        ),
        ("Local", KeyboardInterrupt(), 130, f"interrupted; {AGAIN} continues from the checkpoints"),
        ("Slurm", JobFailed("a b/0: it failed", 4), 4, "a b/0: it failed\nthe sweep's other runs are in a b"),
        (
            "Slurm",
            UncompletedJobError("sbatch: warning: x\nsbatch: error: no such partition\n"),
            2,
            "error: sbatch refuses the jobs: no such partition",
        ),
        (
            "Slurm",
            UncompletedJobError(
                "Job 7_1 (task: 0) with path x\nhas not produced any output (state: TIMEOUT)\nx"
            ),
            4,
            "job 7_1 ended without a result, TIMEOUT; the logs are in a b/.submitit, "
            f"and {AGAIN} continues from the checkpoints",
        ),
        (
            "Local",
            UncompletedJobError("it is gone\nand more"),
            4,
            f"it is gone; the logs are in a b/.submitit, and {AGAIN} continues from the checkpoints",
        ),
    ],
)
def test_what_ends_a_sweep_of_jobs_is_a_sentence_with_what_goes_on(
    kind, error, code, said, monkeypatch, capsys
):
    monkeypatch.setattr(os, "environ", {**os.environ, **OTHERS, "SLURM_CONF": "here"})
    monkeypatch.setattr(SlurmJob, "watcher", SlurmJob.watcher)
    launcher = OmegaConf.create({"_target_": f"plugin.{kind}Launcher"})
    environment = []

    def sweep():
        with launching(launcher, "a b"):
            environment.extend(os.environ)
            raise error

    with pytest.raises(SystemExit) as ended:
        sweep()
    assert not OTHERS.keys() & {*environment}
    assert "SLURM_CONF" in environment
    assert ended.value.code == code
    assert capsys.readouterr().err == f"{said}\n"


def test_a_job_that_the_queue_forgot_has_ended_and_a_queue_that_does_not_answer_says_nothing(monkeypatch):
    monkeypatch.setattr(SlurmJob, "watcher", SlurmJob.watcher)
    with launching(OmegaConf.create({"_target_": "plugin.SlurmLauncher"}), "x"):
        watcher = SlurmJob.watcher
    watcher._registered = {"7_0", "7_1", "7_2", "8"}
    listed = "Welcome\n7|0|COMPLETING|None\n7|1|TIMEOUT|x\n8|N/A|PENDING|Priority\n"
    states = {key: found["State"] for key, found in watcher.read_info(listed.encode()).items()}
    assert states == {"7_0": "RUNNING", "7_1": "TIMEOUT", "7_2": "ENDED", "8": "RUNNING"}
    assert watcher.read_info("slurm_load_jobs error: no answer\n") == {}
    assert watcher._make_command()[0] == "squeue"
