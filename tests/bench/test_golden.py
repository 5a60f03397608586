"""From seconds to printed figures: the tables of `ebc-lab bench` where every machine takes as long."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.golden import assert_golden
from support.working_clock import working_clock

from ebc_lab.bench import compared, costs, measure, memory, pairs, plain_loop
from ebc_lab.cli import bench_screen, options
from ebc_lab.components.stabilizers import STABILIZERS

GOLDEN = Path(__file__).with_name("golden")
SMALL = ["model.width=8", "model.heads=2", "model.context=8", "batch_size=4", "audit_every=4", "steps=8"]
SMALL += ["budget.probe_sequences=1", "eval_windows=2", "dtype=float32", "threads_per_run=1", "compile=off"]
EBM = ["workload=ebm", "ebm.splats=8", "ebm.n=16", "ebm.hidden=16", "ebm.revive_every=2", "ebm.soc_every=2"]
SECONDS = {"help_s": 0.25, "worker_import_s": 2.5}  # of processes of their own
MACHINE = {"cpu": "a CPU", "cores": 2, "gpus": [], "load_before": [1.25, 0.0, 0.0]}
SECTIONS = ["throughput", "overhead", "shares", "fixed", "compute", "memory", "beside_weights", "exact"]
LONG = ["low_bit", "ebm"]


class PlainChild:
    """The plain loop, in this process."""

    def __init__(self, module):
        assert module == "plain_loop"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def ask(self, request):
        self.asked = request

    def answer(self):
        if isinstance(self.asked, int):
            return self.loop.steps(self.asked)
        self.loop = plain_loop.PlainLoop(**self.asked)
        return 7  # threads


@pytest.fixture
def clock(monkeypatch):
    """A clock that only work moves; fewer stabilizers, and no process beside this one."""
    monkeypatch.setenv("COLUMNS", "100")
    with working_clock() as clock:

        def run(command, **_):
            [name] = (name for name, (code, *_) in costs.COMMANDS.items() if code in command)
            clock.now += SECONDS[name]
            return SimpleNamespace(returncode=0)

        def peak(step):
            begun = clock.now
            step()
            return round(1e7 * (clock.now - begun))

        monkeypatch.setattr(costs, "subprocess", SimpleNamespace(run=run))
        monkeypatch.setattr(memory, "peak_on_cpu", peak)
        monkeypatch.setattr(pairs, "Child", PlainChild)
        monkeypatch.setattr(pairs, "STABILIZERS", {n: STABILIZERS[n] for n in ("none", "ebc", "norm_clip")})
        monkeypatch.setattr(pairs, "BUDGETS", ("shadow", "surrogate"))
        monkeypatch.setattr(compared, "engine_name", lambda device: "eager")
        for name in ("LOW_BIT", "BESIDE_WEIGHTS"):
            monkeypatch.setattr(compared, name, dict(islice(getattr(compared, name).items(), 3)))
        for name, section in measure.SECTIONS.items():
            few = replace(section.effort, quick_rounds=min(section.effort.quick_rounds, 3))
            monkeypatch.setitem(measure.SECTIONS, name, section._replace(effort=few))
        yield clock


@pytest.mark.usefixtures("clock")
@pytest.mark.filterwarnings("ignore:c is chosen by")
@pytest.mark.parametrize("section", [*SECTIONS, *(pytest.param(s, marks=pytest.mark.thorough) for s in LONG)])
def test_a_section_prints_what_it_printed(section, tiny, capsys):
    others = ("lr_s", "cal", "fin", *(o.partition("=")[0] for o in SMALL))
    asked = [*(o for o in tiny if not o.startswith(others)), *SMALL, *EBM * (section == "ebm")]
    figures = measure.bench(asked, only=[section], quick=True)
    figures["about"] |= {"machine": MACHINE, "torch": "2.13"}
    bench_screen.benchmark(options.console(), figures)
    assert_golden(GOLDEN / f"{section}.txt", capsys.readouterr().out)
