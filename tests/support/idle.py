"""Runs of kind `idle`, which train nothing, in a study without a driver; or, run as a program, with one."""

import json
import sys
from dataclasses import replace
from pathlib import Path

from support import idle_run
from support.drivers import sessions

from ebc_lab.config.compose import compose
from ebc_lab.records.spec import RunSpec
from ebc_lab.study.launch import local, open_pool
from ebc_lab.study.resolve import resolve_study
from ebc_lab.study.stages.stage import stage_of
from ebc_lab.study.store import attempts
from ebc_lab.study.store.study import Study

TESTS = Path(idle_run.__file__).parents[1]
# workers that know the kind `idle`, wherever they are started from this process
local.WORKER = (
    "-c",
    f"import sys; sys.path.insert(0, {str(TESTS)!r}); import support.idle_run; "
    "from ebc_lab.study.launch.worker import main; main()",
)
# nothing is left to be measured, so nothing of this imports torch
RESOLVED = ["scale=smoke", "data=pydoc", "device=cpu", "dtype=float32", "threads_per_run=1", "compile=off"]


class Bench:
    """A study with planned runs, and pools that work on them."""

    def __init__(self, out: Path, *overrides: str):
        self.study = Study(out / "s")
        self.study.prepare()
        composed = compose([*(overrides or RESOLVED), f"output_dir={out}", "study.name=s"])
        self.config, _ = resolve_study(composed, self.study, print, force=False)
        self.first = stage_of("lr_sweep").runs(self.config, {}, {})[0]
        self.pools: list[local.LocalPool] = []
        self.said: list[str] = []

    def spec(self, kind: str = "idle", **changed) -> RunSpec:
        spec = replace(self.first, kind=kind, run=replace(self.first.run, **changed))
        self.study.write_spec(spec)
        return spec

    def idle(self, count: int, steps: int = 5, **plan) -> list[RunSpec]:
        """`count` idle runs; with `at=` and `do=` each misbehaves so (see idle_run.py)."""
        specs = [self.spec(steps=steps, seed=seed) for seed in range(5, 5 + count)]
        for spec in specs if plan else []:
            (self.study.run_dir(spec.run_id) / "idle.json").write_text(json.dumps(plan))
        return specs

    def release(self, *specs: RunSpec) -> None:
        """Let held runs continue."""
        for spec in specs:
            (self.study.run_dir(spec.run_id) / "go").touch()

    def pool(self, slots: int = 1, gpus: tuple[str, ...] = (), **launcher) -> local.LocalPool:
        changed = replace(self.config.launcher, name="local", slots=slots, **launcher)
        config = replace(self.config, launcher=changed)
        self.pools.append(local.LocalPool(config, self.study, list(gpus), slots, self.said.append))
        return self.pools[-1]

    def run(self, specs, slots: int = 1, **launcher) -> None:
        self.pool(slots, **launcher).run(specs, [], lambda done, busy: None, canary=False)

    def events(self, spec: RunSpec) -> list[dict]:
        """What is logged of a run once all workers are gone: one may note an end after its driver saw it."""
        Bench.close(self)
        return attempts.log(self.study.run_dir(spec.run_id))

    def kinds(self, spec: RunSpec) -> list[str]:
        return [event["event"] for event in self.events(spec)]

    def notes(self) -> dict[str, dict]:
        [session] = sessions(self.study, "local")
        return session.notes()

    def worker(self) -> int:
        """The process id of the worker of the first slot."""
        return self.notes()["0"]["pid"]

    def close(self) -> None:
        while self.pools:
            self.pools.pop().close()


def drive(out: Path, *, device: str = "cpu", hold: bool = True, **launcher) -> None:
    """Drive two idle runs; with `hold` their workers keep them for as long as nobody ends this process."""
    bench = Bench(out)
    specs = bench.idle(2, **({"at": 1, "do": "hold"} if hold else {}))
    settings = replace(bench.config.launcher, **{"name": "local", "slots": 2, **launcher})
    config = replace(bench.config, device=device, launcher=settings)

    def check_in(done, busy) -> None:
        if len(busy) == 2:
            print("both are held", flush=True)

    with bench.study.held(), open_pool(config, bench.study, print) as pool:
        pool.run(specs, [], check_in, canary=False)


def driver(out: Path, **settings) -> list[str]:
    """The command of a process that does `drive`."""
    code = f"import runpy, sys; sys.path.insert(0, {str(TESTS)!r}); "
    code += "runpy.run_module('support.idle', run_name='__main__')"
    return [sys.executable, "-c", code, str(out), json.dumps(settings)]


if __name__ == "__main__":
    try:
        drive(Path(sys.argv[1]), **json.loads(sys.argv[2]))
    except KeyboardInterrupt:
        sys.exit(130)
