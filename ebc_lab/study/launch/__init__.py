"""The pools that train a study's runs, chosen by the setting `launcher`."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ebc_lab.config.checks import require_gpu
from ebc_lab.config.machine import visible_gpus
from ebc_lab.config.schema import Config
from ebc_lab.records.spec import RunSpec
from ebc_lab.training.ends import DeviceFailed, Interrupted

from ..store.study import Study
from .pool import CheckIn, Say, Signs, WorkerPool, WorkersFailed, release_if_silent, slots


class InlinePool:
    """A pool that trains one run after another in the calling process, for debuggers (launcher=inline)."""

    def __init__(self, config: Config, study: Study):
        self.config = config
        self.study = study

    def run(
        self, specs: Sequence[RunSpec], spare: Sequence[RunSpec], check_in: CheckIn, *, canary: bool
    ) -> None:
        """Train `specs` as `WorkerPool.run` does. `spare` is ignored, since no worker is ever idle."""
        from .worker import POLL_S, train_claimed

        asked: list[int] = []
        signs = Signs()
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        previous = {s: signal.signal(s, lambda number, _: asked.append(number)) for s in signals}
        try:
            for spec in sorted(specs, key=lambda s: -s.cost):
                files = self.study.run_files(spec.run_id)
                check_in([], [])
                try:
                    while not files.result.exists():
                        trained = train_claimed(
                            self.study,
                            spec.run_id,
                            processes=self.config.launcher.processes_per_run,
                            checkpoint_every_s=self.config.launcher.checkpoint_every_s,
                            should_stop=lambda: bool(asked),
                        )
                        if not trained:  # a worker of a dead driver still holds the run
                            if asked:
                                raise KeyboardInterrupt
                            release_if_silent(self.study, spec.run_id, self.config.launcher, signs)
                            check_in([], [])
                            time.sleep(POLL_S)
                except Interrupted:
                    raise KeyboardInterrupt from None
                except DeviceFailed as error:
                    remedy = "the same command continues from here"
                    raise WorkersFailed(f"what it trained on is gone ({error}); {remedy}.") from None
                check_in([spec.run_id], [])
        finally:
            for sig, handler in previous.items():
                signal.signal(sig, handler)


Pool = InlinePool | WorkerPool


@contextmanager
def open_pool(config: Config, study: Study, say: Say = lambda text: None) -> Iterator[Pool]:
    """Yield the pool that `config.launcher` names. KeyboardInterrupt leaves the pool (`WorkerPool.leave`);
    every other exit closes it. Raises UserError if a GPU is needed on this machine and there is none."""
    pool: WorkerPool
    if config.device == "cuda" and config.launcher.name != "slurm":
        require_gpu()  # a study begun on a GPU may be continued on a machine without one
    if config.launcher.name == "inline":
        yield InlinePool(config, study)
        return
    if config.launcher.name == "slurm":
        from .slurm import SlurmPool

        pool = SlurmPool(config, study, slots(config), say)
    else:  # local
        from .local import LocalPool

        gpus = visible_gpus(config.launcher.processes_per_run) if config.device == "cuda" else []
        pool = LocalPool(config, study, gpus, slots(config), say)
    try:
        yield pool
    except KeyboardInterrupt:
        say("stopping …")  # workers may take some seconds to write their checkpoints
        pool.leave()
        raise
    except BaseException:
        pool.close()
        raise
    pool.close()
