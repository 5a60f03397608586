"""Where runs are trained: the pool that `launcher` names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ebc_lab.config.checks import require_gpu
from ebc_lab.config.machine import visible_gpus
from ebc_lab.config.schema import Config

from ..store.study import Study
from .inline import InlinePool
from .pool import Say, WorkerPool, slots

Pool = InlinePool | WorkerPool


@contextmanager
def open_pool(config: Config, study: Study, say: Say = lambda text: None) -> Iterator[Pool]:
    """Open the pool that `config.launcher` names, and close it on exit, or leave it if the driver was
    interrupted. Raises UserError where this machine lacks the device."""
    pool: WorkerPool
    if config.device == "cuda" and config.launcher.name != "slurm":
        require_gpu()  # a study begun on one may be continued where there is none
    if config.launcher.name == "inline":
        yield InlinePool(config, study)
        return
    if config.launcher.name == "slurm":
        from .slurm import SlurmPool

        pool = SlurmPool(config, study, slots(config), say)
    else:
        from .local import LocalPool

        gpus = visible_gpus(config.launcher.processes_per_run) if config.device == "cuda" else []
        pool = LocalPool(config, study, gpus, slots(config), say)
    try:
        yield pool
    except KeyboardInterrupt:
        pool.leave()
        raise
    except BaseException:
        pool.close()
        raise
    pool.close()
