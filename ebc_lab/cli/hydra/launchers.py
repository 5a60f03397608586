"""Hydra's submitit launchers under `ebc-lab train -m`: defaults for runs with checkpoints, and failures.

They are those of the plugin hydra-submitit-launcher, whose pickles lie in `.submitit` in the sweep folder.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, NoReturn

from ebc_lab.config.errors import UserError, nearest
from ebc_lab.study.inspect.reproduce import override_value
from ebc_lab.study.launch.local import SCRUBBED
from ebc_lab.study.launch.queue import NO_ANSWER, SQUEUE, parse_squeue, refuse_without_slurm
from ebc_lab.study.launch.submit import KEPT

PLUGIN = "hydra_plugins.hydra_submitit_launcher."
DEFAULTS = {  # where the plugin's own would end a run that could continue from its checkpoint
    "SlurmLauncher": {"max_num_timeout": 1000},
    "LocalLauncher": {"timeout_min": 60 * 24 * 365},
}


class JobFailed(Exception):
    """A run failed in a launcher's job: message and exit code, which submitit's pickle brings back."""

    def __init__(self, message: str, code: int):
        super().__init__(message, code)
        self.message, self.code = message, code


def is_submitit(launcher: Any) -> bool:
    """Whether a composed `hydra.launcher` is one of the plugin's."""
    return str(launcher.get("_target_")).startswith(PLUGIN)


def defaults(launcher: Any, overrides: Sequence[str]) -> list[str]:
    """Overrides that give a launcher of the plugin our defaults for what the user leaves open.

    Raises UserError.
    """
    from hydra_plugins.hydra_submitit_launcher.config import LocalQueueConf, SlurmQueueConf
    from submitit.slurm.slurm import SlurmExecutor

    kind = launcher._target_.rpartition(".")[2]
    schema = SlurmQueueConf if kind == "SlurmLauncher" else LocalQueueConf
    # what the plugin has no setting for can be added: +hydra.launcher.mail_user=me
    added = SlurmExecutor._valid_parameters() if schema is SlurmQueueConf else ()
    known = [*(f.name for f in fields(schema)), *added]
    for key in (k for k in launcher if k not in known):
        raise UserError(f"hydra.launcher.{key} is not a setting of {kind}{nearest(key, known)}.")
    if kind == "SlurmLauncher":
        if 60 * launcher.timeout_min <= launcher.signal_delay_s:
            warned = f"hydra.launcher.signal_delay_s={launcher.signal_delay_s} seconds before the end"
            raise UserError(
                f"hydra.launcher.timeout_min={launcher.timeout_min} leaves no time to train: jobs are warned "
                f"{warned}, to write their checkpoint."
            )
        refuse_without_slurm("hydra/launcher=submitit_local")
    keys = {o.lstrip("+").partition("=")[0] for o in overrides}
    ours = {f"hydra.launcher.{key}": value for key, value in DEFAULTS[kind].items()}
    return [f"{key}={value}" for key, value in ours.items() if key not in keys]


@contextmanager
def launching(launcher: Any, sweep_dir: str) -> Iterator[None]:
    """Around a sweep: a clean environment for its jobs; SystemExit with a sentence when one fails."""
    from submitit.core.utils import UncompletedJobError

    slurm = launcher._target_.endswith("SlurmLauncher")
    # variables of a job that this command itself runs in would clash with those of the jobs it submits
    variables = (*KEPT, "SUBMITIT_PREEMPT_SIGNAL")
    for name in [n for n in os.environ if n.startswith(SCRUBBED) and n not in variables]:
        del os.environ[name]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra would print a traceback and exit; the messages are ours
    if slurm:
        _watch_the_queue()
    again = f"the same command with {shlex.quote(f'hydra.sweep.dir={override_value(sweep_dir)}')}"
    try:
        yield
    except JobFailed as failed:
        _leave(f"{failed.message}\nthe sweep's other runs are in {sweep_dir}", failed.code)
    except UncompletedJobError as error:
        if "sbatch: error: " in str(error):
            why = str(error).strip().rpartition("sbatch: error: ")[2]
            _leave(f"error: sbatch refuses the jobs: {why}", 2)
        dead = re.match(r"Job (\S+) .*?\(state: (.*?)\)", str(error), re.DOTALL)
        what = f"job {dead[1]} ended without a result, {dead[2]}" if dead else str(error).splitlines()[0]
        logs = f"the logs are in {sweep_dir}/.submitit"
        _leave(f"{what}; {logs}, and {again} continues from the checkpoints", 4)
    except KeyboardInterrupt:
        if slurm:
            after = f"once they are over {again} finds their results"
            _leave(f"interrupted; the jobs continue without it, and {after}", 130)
        _leave(f"interrupted; {again} continues from the checkpoints", 130)


def _leave(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)


def _watch_the_queue() -> None:
    """Have submitit ask squeue for its jobs' states.

    By itself it asks sacct, and where there is no accounting it waits forever for a job that was cancelled or
    killed; a site's notice it takes for the names of its columns.
    """
    from submitit.slurm.slurm import SlurmInfoWatcher, SlurmJob

    class QueueWatcher(SlurmInfoWatcher):
        def _make_command(self) -> list[str]:
            return [*SQUEUE]

        def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
            text = string if isinstance(string, str) else string.decode(errors="replace")
            jobs = parse_squeue(text)
            if not jobs and NO_ANSWER in text:
                return {}
            # submitit takes an unknown state for an end
            states = {key: {"State": "RUNNING" if job.live else job.state} for key, job in jobs.items()}
            # the queue forgets a job some minutes after its end
            return {job: states.get(job, {"State": "ENDED"}) for job in self._registered}

    SlurmJob.watcher = QueueWatcher(delay_s=60)
