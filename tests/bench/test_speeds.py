"""The rules that choose precision, threads and compiling, on invented measurements; and a real one."""

import re
import shutil
from dataclasses import replace

import pytest
import torch
from support.working_clock import working_clock

from ebc_lab.bench import speeds, step_timer
from ebc_lab.bench.speeds import (
    NotMeasured,
    Work,
    cases_of,
    choose,
    choose_for_study,
    chosen_by_rule,
    compile_cost,
    compile_rule,
    fastest,
    is_open,
    measured_rates,
)
from ebc_lab.config import machine as machine_module
from ebc_lab.config.compose import compose
from ebc_lab.config.dicts import run_part
from ebc_lab.config.parts.data import DataConfig
from ebc_lab.config.schema import LauncherConfig, RunConfig
from ebc_lab.study.inspect.forecast import expected_work

OPEN = RunConfig(device="cpu")
COST = ("compile_s", "again_s", "eager_ms", "compiled_ms")
NAMED = DataConfig(sha256="0" * 64)
GIVEN = replace(OPEN, dtype="float32", threads_per_run=2, compile="off")


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """Four cores, a cache of its own, and nothing measured unless a test says what would be found."""

    def unexpected(*_, **__):
        raise AssertionError("this should not be measured")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine_module, "cores", lambda: 4)
    for name in ("measured_rates", "compile_cost"):
        monkeypatch.setattr(speeds, name, unexpected)
    return monkeypatch


def keep(run, rates):
    for case, cache in speeds.rate_caches(run, list(rates)).items():
        cache.write(rates[case])


def would_measure(machine, rates, compile_cost=None):
    """Have measurements find these figures. -> the cases that were asked for, call by call."""
    asked = []

    def measured(run, cases):
        asked.append(list(cases))
        found = {c: rates[c] for c in cases}
        keep(run, found)
        return found

    machine.setattr(speeds, "measured_rates", measured)
    if compile_cost:
        machine.setattr(speeds, "compile_cost", lambda run, **_: compile_cost)
    return asked


# -- the rules -----------------------------------------------------------------------------------------------


ONE_TYPE = replace(OPEN, dtype="float32")


@pytest.mark.parametrize(
    ("run", "cores", "limit", "cases"),
    [
        # powers of two up to the cores
        (ONE_TYPE, 3, 0, [(1, 3), (2, 1)]),
        (ONE_TYPE, 64, 0, [(1, 64), (2, 32), (4, 16), (8, 8)]),
        # runs fill the cores, unless fewer are allowed or one needs more
        (ONE_TYPE, 6, 0, [(1, 6), (2, 3), (4, 1)]),
        (ONE_TYPE, 6, 2, [(1, 2), (2, 2), (4, 1)]),
        (GIVEN, 1, 0, [(2, 1)]),
        # only what is open is tried
        (OPEN, 2, 0, [(1, 2), (2, 1)]),
        (replace(OPEN, dtype="bfloat16", threads_per_run=2), 8, 0, [(2, 4)]),
        (replace(OPEN, device="cuda", threads_per_run=1), 8, 0, [(1, 1)]),
    ],
)
def test_cases_are_the_threads_and_parallel_runs_that_fit_the_cores(run, cores, limit, cases):
    dtypes = ("float32", "bfloat16") if run.dtype == "auto" else (run.dtype,)
    assert cases_of(run, cores, limit) == [(t, n, d) for t, n in cases for d in dtypes]


@pytest.mark.parametrize(
    ("rates", "chosen"),
    [
        ({(1, 2, "float32"): 60, (2, 1, "float32"): 64}, (2, 1, "float32")),
        ({(1, 2, "float32"): 60, (2, 1, "float32"): 62}, (1, 2, "float32")),  # within 5%: fewer threads
        ({(1, 2, "float32"): 60, (1, 2, "bfloat16"): 62}, (1, 2, "float32")),  # within 5%: float32
        (
            {(1, 2, "float32"): 60, (1, 2, "bfloat16"): 50, (2, 1, "float32"): 40, (2, 1, "bfloat16"): 80},
            (2, 1, "bfloat16"),
        ),
        # one run at a time, whatever its threads
        ({(1, 1, "float32"): 100, (2, 1, "float32"): 90}, (1, 1, "float32")),
        ({(1, 1, "float32"): 100, (2, 1, "float32"): 90, (2, 1, "bfloat16"): 120}, (2, 1, "bfloat16")),
        # of the best, 5%
        ({(1, 4, "float32"): 100, (2, 2, "float32"): 104, (4, 1, "float32"): 108}, (2, 2, "float32")),
    ],
)
def test_the_fastest_wins_and_the_plainer_wins_ties(rates, chosen):
    assert fastest(rates) == chosen


@pytest.mark.parametrize(
    ("work", "figures", "chosen", "words"),
    [
        (Work(50, 11_990), None, "off", "all 50 runs together train for 1199 s, and below 1200 s"),
        (Work(1, 11_990), None, "off", "the run trains for 1199 s"),
        (
            Work(50, 20_000),
            (27, 3, 200, 188),
            "off",
            r"\+45 s",
        ),  # 240 s, and 3 s again in each, two at a time
        (Work(50, 20_000), (27, 3, 200, 186), "on", r"\+65 s saved in the 2000 s of 20000 steps"),
        (Work(500, 20_000), (27, 3, 200, 150), "off", "-250 s"),  # runs too short for their own start
        (Work(1, 20_000), (5, 1, 90, 95), "off", "-50 s"),
        (
            Work(50, 2_000_000),
            (27.4, 3.25, 200, 188),
            "on",
            r"^compiling takes 27 s, 3.2 s again in each run, and makes a step 188.0 ms instead of 200.0: "
            r"\+11919 s saved in the 200000 s of 2000000 steps$",
        ),
        (Work(1, 20_000), "torch.compile fails here (no g++)", "off", "no g"),
    ],
)
def test_compiling_must_pay_twice_over_and_is_not_measured_for_little_work(work, figures, chosen, words):
    def asked():
        assert figures is not None, "compiling was measured for nothing"
        return figures if isinstance(figures, str) else dict(zip(COST, figures, strict=True))

    found, why = compile_rule(work, 10.0, 2, asked)
    assert found == chosen
    assert re.search(words, why), why


def test_a_gpu_and_a_slurm_job_need_no_measurement_of_threads_or_compiling():
    for run, job_cores, threads in ((replace(OPEN, device="cuda"), None, 1), (OPEN, 3, 3), (OPEN, 1, 1)):
        fixed, why = chosen_by_rule(run, 8, job_cores)
        assert (fixed.threads_per_run, fixed.compile, fixed.dtype) == (threads, "off", "auto")
        assert "compile=on overrides this" in why["compile"]
    assert chosen_by_rule(OPEN, 1)[0].threads_per_run == 1  # one core
    assert chosen_by_rule(OPEN, 8) == (OPEN, {})
    asked = replace(OPEN, device="cuda", compile="on", threads_per_run=5)
    assert chosen_by_rule(asked, 8, 3)[0] == asked
    assert speeds.job_cores(LauncherConfig(name="slurm", slots=4)) == 1
    assert speeds.job_cores(LauncherConfig(name="slurm", slots=4, cpus_per_task=6)) == 6
    assert speeds.job_cores(LauncherConfig(name="local")) is None


# -- from measurements to a choice ---------------------------------------------------------------------------

RATES = {(1, 4, "float32"): 100.0, (2, 2, "float32"): 60.0, (4, 1, "float32"): 30.0}
RATES |= {(t, n, "bfloat16"): 1.2 * r for (t, n, _), r in RATES.items()}
RATES |= {(1, 1, "float32"): 26.0, (2, 1, "float32"): 29.0}
RATES |= {(1, 1, "bfloat16"): 20.0, (2, 1, "bfloat16"): 20.0}


def test_a_study_takes_the_machines_throughput_and_a_single_run_its_own(machine):
    asked = would_measure(machine, RATES)
    study = choose(OPEN, work=lambda run: Work(1, 600))
    assert (study.dtype, study.threads_per_run, study.compile) == ("bfloat16", 1, "off")
    assert study.rate == (1, 4, "bfloat16", 120.0)
    rates = "120.0 with 4 runs of 1 thread in parallel, 72.0 with 2 runs of 2 threads in parallel"
    assert rates in study.why["threads_per_run"]
    assert "trains for 5 s" in study.why["compile"]  # 600 steps at 120 steps/s
    alone = choose(OPEN, work=lambda run: Work(1, 600), limit=1)
    assert (alone.dtype, alone.threads_per_run) == ("bfloat16", 4)
    assert len(asked) == 2
    assert choose(OPEN, work=lambda run: Work(1, 600)) == study  # from the cache
    assert choose(OPEN, work=lambda run: Work(1, 600), measure=False) == study
    assert len(asked) == 2
    said = study.reasons(replace(OPEN, dtype="float32"))  # only of what was left open
    assert [line.partition(":")[0] for line in said] == ["threads_per_run=1", "compile=off"]


def test_what_is_given_is_kept_and_costs_no_measurement():
    assert choose(GIVEN, work=lambda run: Work(1, 10**9)).why == dict.fromkeys(speeds.CHOSEN, "already set")
    with pytest.raises(NotMeasured):
        choose(OPEN, work=lambda run: Work(1, 600), measure=False)
    cuda = choose(replace(OPEN, device="cuda", dtype="float32"), work=lambda run: Work(1, 10**9))
    assert (cuda.threads_per_run, cuda.compile) == (1, "off")


def test_much_work_asks_what_compiling_costs_at_what_was_chosen(machine):
    would_measure(machine, RATES, dict(zip(COST, (20.0, 1.0, 33.0, 30.0), strict=True)))
    asked = []

    def work(steps):
        return lambda run: asked.append(run) or Work(1, steps)

    assert choose(OPEN, work=work(150_000)).compile == "on"  # 450 s saved, by four runs at a time
    assert choose(OPEN, work=work(50_000)).compile == "off"
    assert {(run.dtype, run.threads_per_run, run.compile) for run in asked} == {("bfloat16", 1, "off")}


@pytest.mark.thorough
def test_a_study_is_as_long_as_all_its_runs_and_as_wide_as_its_launcher(machine):
    asked = would_measure(machine, RATES, "not known")
    config = compose(["scale=laptop", "device=cpu"])
    work = expected_work(replace(config, dtype="float32", threads_per_run=1, compile="off", data=NAMED))
    assert work.runs > 40
    assert 20_000 < work.steps < 600 * work.runs  # the grid's runs are shorter
    why = choose_for_study(config, work=lambda run: work).why["compile"]
    assert f"all {work.runs} runs together train for {work.steps / 120:.0f} s" in why
    assert choose_for_study(config, work=lambda run: Work(60, 200_000)).why["compile"] == "not known"
    assert "all 4 runs together train for 17 s" in choose_for_study(config).why["compile"]
    inline = replace(config, launcher=replace(config.launcher, name="inline"))
    assert choose_for_study(inline).threads_per_run == 4
    assert {n for _, n, _ in asked[-1]} == {1}


# -- what a measuring process answers ------------------------------------------------------------------------


class Answering:
    """In the place of a process that measures: `answers` gives what it says to each request."""

    def __init__(self, module):
        assert module == "step_timer"
        self.asked = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def ask(self, request):
        self.asked.append(request)

    def answer(self, timeout_s=None):
        return type(self).answers(self.asked.pop()) if self.asked else None


def test_rates_are_of_all_processes_together_and_the_median_of_the_rounds(monkeypatch):
    blocks, ready = iter([0.5, 0.25, 0.1, 0.5, 0.5, 0.2, 0.125, 0.125, 1.0]), []

    def answers(request):
        if request["what"] == "step":
            ready.append((request["run"]["threads_per_run"], request["run"]["dtype"]))
            return 0.0
        return next(blocks)

    monkeypatch.setattr(Answering, "answers", staticmethod(answers), raising=False)
    monkeypatch.setattr(speeds, "Child", Answering)
    cases = [(1, 2, "float32"), (3, 1, "bfloat16")]
    # 2 + 4, 2 + 2, 8 + 8 of two processes; 10, 5, 1 of one
    assert measured_rates(OPEN, cases) == {cases[0]: 6.0, cases[1]: 5.0}
    assert ready == [(1, "float32"), (1, "float32"), (3, "bfloat16")] * 3
    assert speeds.known_rates(OPEN, cases) == {cases[0]: 6.0, cases[1]: 5.0}
    assert speeds.known_rates(OPEN, [*cases, (9, 1, "float32")]) == {}


def test_what_compiling_costs_is_asked_once_and_one_that_takes_too_long_is_no_figure(monkeypatch):
    cost, said = dict(zip(COST, (27.0, 3.0, 200.0, 188.0), strict=True)), []
    assert compile_cost(GIVEN, measure=False) == "what compiling costs is not known yet"

    def too_long(request):
        raise TimeoutError

    monkeypatch.setattr(speeds, "Child", Answering)
    monkeypatch.setattr(Answering, "answers", staticmethod(too_long), raising=False)
    assert compile_cost(GIVEN, say=said.append) == "compiling takes more than 900 s here"
    assert said == ["measuring what torch.compile costs and gains at this shape: a minute or so …"]
    monkeypatch.setattr(Answering, "answers", staticmethod(lambda request: cost))
    assert compile_cost(GIVEN) == cost
    monkeypatch.setattr(Answering, "answers", staticmethod(too_long))
    assert compile_cost(GIVEN) == compile_cost(GIVEN, measure=False) == cost


class Compiled(torch.nn.Module):
    """A model whose first call takes so many seconds, and each a millisecond more than the model's own."""

    def __init__(self, model, clock, seconds):
        super().__init__()
        self.model, self.clock, self.seconds = model, clock, seconds

    def forward(self, *given):
        self.clock.now += self.seconds + 1e-3
        self.seconds = 0.0
        return self.model(*given)


def test_a_step_and_what_compiling_it_costs_are_timed_in_one_process(tiny, monkeypatch):
    run = replace(run_part(compose([*tiny, "model.width=8"])), compile="off", threads_per_run=1)
    firsts = iter([20.0, 3.0])
    with working_clock() as clock:

        def forward_of(model, asked):
            assert asked.compile == "on"
            return Compiled(model, clock, next(firsts))

        monkeypatch.setattr(step_timer, "forward_of", forward_of)
        timer = step_timer.StepTimer(run)
        first, median = timer.step(), timer.block()
        steps = timer.loop.step_index - 1
        assert steps * median == pytest.approx(step_timer.BLOCK_S, abs=2 * median)
        assert first < median < 1.05 * first  # of a machine that slows down
        found = step_timer.compiling(run)
    assert found["compile_s"] == pytest.approx(20.0, abs=0.1)
    assert found["again_s"] == pytest.approx(3.0, abs=0.1)
    assert found["compiled_ms"] - found["eager_ms"] == pytest.approx(1.0, rel=0.1)
    assert found["eager_ms"] > 1e3 * first


# -- real measurements ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_what_compiling_costs_is_measured_cold_and_kept(tiny, machine, tmp_path):
    machine.undo()
    machine.setenv("XDG_CACHE_HOME", str(tmp_path))
    run = run_part(compose(tiny))
    found = speeds.compile_cost(run)
    assert not isinstance(found, str), found
    assert found["compile_s"] > found["again_s"] > 0
    assert found["eager_ms"] > 0 < found["compiled_ms"]
    assert speeds.compile_cost(run, measure=False) == found
    assert isinstance(speeds.compile_cost(replace(run, batch_size=9), measure=False), str)


@pytest.mark.thorough
def test_smoke_scale_leaves_nothing_open(tiny):
    assert not any(is_open(compose(o), k) for o in (tiny, ["scale=smoke"]) for k in speeds.CHOSEN)
