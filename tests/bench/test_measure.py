import contextlib
import io
import json
import platform
import re
import sys
import time
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from support.runs import short_run
from support.working_clock import working_clock
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from ebc_lab.bench import compared, costs, measure, memory, pairs, plain_loop
from ebc_lab.bench.loops import Loop, interval, opened
from ebc_lab.bench.pairs import (
    MIN_ROUNDS,
    Effort,
    overhead_run,
    overheads,
    step_run,
    take_turns,
    throughput,
)
from ebc_lab.bench.shares import PARTS, Clock
from ebc_lab.bench.speeds import compile_cost, measured_rates
from ebc_lab.cli import bench_screen
from ebc_lab.cli.commands import app
from ebc_lab.components.stabilizers import STABILIZERS
from ebc_lab.config.choices import changed, optimizer_defaults
from ebc_lab.config.compose import compose
from ebc_lab.config.dicts import run_part
from ebc_lab.config.errors import UserError
from ebc_lab.ebc.options import BUDGETS
from ebc_lab.records.json_files import read_json
from ebc_lab.workloads import gpt
from ebc_lab.workloads.losses import token_losses

VARIANTS = {*(set(STABILIZERS) - {"ebc"}), *(f"ebc {b}" for b in BUDGETS)}


@pytest.fixture
def shape(tiny):
    return short_run(tiny, "steps=40", "optimizer.lr=4e-3")


@pytest.fixture(scope="module")
def settings(tiny):
    """The overrides of one run among those of a tiny study."""
    return [o for o in tiny if not o.startswith(("lr_s", "cal", "fin"))]


@pytest.fixture(scope="module")
def called(settings, tmp_path_factory):
    """`ebc-lab bench` on a tiny run. -> the JSON on its standard output, the lines on standard error"""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("folder"))
        patch.setenv("OMP_NUM_THREADS", "1")  # for the plain loop's process
        asked = ["bench", *settings, "audit_every=4", "--quick", "--json"]  # short blocks
        done = CliRunner().invoke(app, asked, catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout), done.stderr.splitlines()


@pytest.fixture
def found(called):
    return called[0]


# -- the command ---------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_every_section_is_there_and_progress_keeps_out_of_the_json(called, found):
    sections = "throughput overhead low_bit shares fixed compute memory beside_weights exact"
    assert list(found) == ["about", *sections.split()]
    assert {f"overhead of {name}" for name in VARIANTS} <= set(called[1])
    for side in ("lab", "plain", "plain_defaults"):
        assert found["throughput"][side]["tokens_per_s"]["median"] > 0
        assert found["throughput"][side]["threads"] >= 1
    assert found["throughput"]["lab_over_plain"]["median"] > 0
    for cost in (cost for cost in found["fixed"] if cost.endswith("_s")):
        low, high = found["fixed"][cost]["quartiles"]
        assert 0 < low <= found["fixed"][cost]["median"] <= high
    assert found["compute"]["achieved_flops_per_s"]["median"] > 0
    assert found["compute"]["peak_flops_per_s"] == max(found["compute"]["matmul_flops_per_s"].values())


@pytest.mark.thorough
def test_every_stabilizer_and_budget_is_compared_with_the_bare_step(found):
    for rows in (found["overhead"], found["memory"]["stabilizers"]):
        assert {row["stabilizer"] for row in rows} == VARIANTS
        assert all(row["refused"] is None for row in rows)
    for row in found["overhead"]:
        low, high = row["overhead_iqr_pct"]
        assert low <= row["overhead_pct"] <= high


@pytest.mark.thorough
def test_shares_add_up_and_every_part_was_on_the_clock(found):
    assert list(found["shares"]) == ["none", *(f"ebc {b}" for b in BUDGETS)]
    for name, s in found["shares"].items():
        assert list(s["share_pct"]) == list(PARTS)
        assert sum(s["share_pct"].values()) == pytest.approx(100)
        assert all(x >= 0 for x in s["share_pct"].values())
        entered = s["times_entered"]
        steps = s["steps"]
        assert entered["data"] == entered["base"] == entered["recording"] == steps
        assert entered["audit"] >= steps // 10
        if name != "none":
            assert entered["probe"] > 0
    assert found["shares"]["none"]["times_entered"]["probe"] == 0
    assert found["shares"]["ebc shadow"]["times_entered"]["probe"] >= found["shares"]["ebc shadow"]["steps"]


@pytest.mark.thorough
def test_ebc_holds_at_most_two_copies_of_the_parameters(found):
    held = found["memory"]["bare_bytes"]
    scalars = 4096  # bytes: controllers and the like
    assert held["gradients"] == held["parameters"]
    moments = 2 * held["parameters"]  # of Adam, which also counts its steps
    assert 0 <= held["optimizer_state"] - moments < scalars
    assert held["peak"] > held["gradients"]
    rows = {row["stabilizer"]: row for row in found["memory"]["stabilizers"]}
    for budget in BUDGETS:
        assert held["parameters"] <= rows[f"ebc {budget}"]["held_bytes"] <= 2 * held["parameters"] + scalars
    assert rows["ebc shadow"]["held_bytes"] > 1.9 * held["parameters"]


@pytest.mark.thorough
def test_the_record_describes_the_machine_but_names_no_host_and_no_file(found, text_file):
    about = found["about"]
    assert {"cpu", "cores", "gpus"} <= set(about["machine"])
    assert {"date", "torch", "python", "git", "run"} <= set(about)
    text = json.dumps(found)
    assert '"host"' not in text
    assert not re.search(rf"\b{re.escape(platform.node())}\b", text)
    assert str(text_file) not in text


@pytest.mark.thorough
def test_the_tables_show_what_was_measured(found, capsys):
    bench_screen.benchmark(Console(width=160), found)
    shown = capsys.readouterr().out
    measured = (*PARTS, *found["throughput"], *found["fixed"], *found["compute"])
    for words in (*VARIANTS, *measured, "extra_copies"):
        assert words in shown
    machine = {**found["about"]["machine"], "cores": 2, "load_before": [3.5, 0.0, 0.0]}
    bench_screen.benchmark(Console(width=160), {**found, "about": {**found["about"], "machine": machine}})
    assert "load average was 3.5 on 2 cores" in capsys.readouterr().out


@pytest.mark.thorough
def test_only_the_sections_that_are_asked_for_are_measured(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = ["bench", *settings, "--quick", "--only", "memory", "--only", "shares", "--json"]
    done = CliRunner().invoke(app, asked, catch_exceptions=False)
    assert list(json.loads(done.stdout)) == ["about", "shares", "memory"]  # in the bench's own order


def test_a_section_of_another_workload_is_refused_before_anything_is_measured(settings):
    said = []
    with pytest.raises(UserError, match=r"--only ebm.* choose among throughput, overhead, low_bit, shares"):
        measure.bench(settings, only=["shares", "ebm"], say=said.append)
    assert said == []


# -- pairs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stabilizer", ["none", "ebc"])
def test_a_step_is_measured_beside_adams_and_recorded(shape, tmp_path, monkeypatch, stabilizer):
    monkeypatch.setattr("ebc_lab.bench.pairs.STEP_LIMIT_S", 0.0)  # the fewest turns
    rates = {}
    taken = Loop.recorded_steps

    def steps(loop, count):
        rates[loop.run.optimizer.name] = loop.run.optimizer.lr
        return taken(loop, count)

    monkeypatch.setattr(Loop, "recorded_steps", steps)
    run = changed(shape, {"optimizer": {"name": "muon", "lr": 0.25}, "stabilizer": {"name": stabilizer}})
    step_run(run, tmp_path, "x")
    result = read_json(tmp_path / "result.json")
    low, high = result["step_ratio_iqr"]
    assert result["outcome"] == "completed"
    assert 0 < low <= result["step_ratio"] <= high
    assert rates == {"muon": 0.25, "adam": optimizer_defaults("adam").lr}  # at 0.25 Adam is slow for its size


@pytest.mark.thorough
@pytest.mark.parametrize("measurement", [overhead_run, step_run])
def test_a_measurement_shows_that_it_goes_on_after_every_block(shape, tmp_path, monkeypatch, measurement):
    """At 64 × 256 tokens the warm-up of a surrogate takes longer than a worker may be silent."""
    monkeypatch.setattr("ebc_lab.bench.pairs.STEP_LIMIT_S", 0.0)
    run = changed(shape, {"stabilizer": {"name": "ebc"}, "budget": {"name": "surrogate"}})
    seen = []
    measurement(run, tmp_path, "x", on_progress=seen.append)
    assert seen == sorted(seen)
    assert seen[:2] == [0, 0]  # the warm-up too
    assert max(b - a for a, b in pairwise(seen)) <= interval(run)


def test_a_failed_measurement_is_recorded_as_failed(shape, tmp_path):
    unknown = replace(shape, optimizer=replace(shape.optimizer, name="nothing"))
    overhead_run(unknown, tmp_path, "x")
    assert read_json(tmp_path / "result.json")["outcome"] == "failed"
    assert "KeyError" in (tmp_path / "log.txt").read_text()


def test_sides_take_turns_in_a_rotating_order():
    calls = []
    sides = {name: lambda n, name=name: calls.append((name, n)) or float(len(calls)) for name in "abc"}
    turns = take_turns(sides, 5, 3, warm=0)
    assert "".join(name for name, _ in calls) == "abcbcacab"
    assert {n for _, n in calls} == {5}
    assert turns.seconds == {"a": [1.0, 6.0, 8.0], "b": [2.0, 4.0, 9.0], "c": [3.0, 5.0, 7.0]}
    assert turns.ratios("b", "a") == [2.0, 4.0 / 6.0, 9.0 / 8.0]


@pytest.fixture
def opened_loops(shape, monkeypatch):
    """Loops without a model: a step of `ebc` takes 3 s, any other 2 s. -> (run, bare, steps taken) of each"""
    found = []

    @contextlib.contextmanager
    def loop(run, *, bare=False):
        taken = []
        found.append((run, bare, taken))

        def steps(count):
            taken.append(count)
            return count * (3.0 if run.stabilizer.name == "ebc" else 2.0)

        yield SimpleNamespace(recorded_steps=steps, steps=steps if run.device == "cpu" else None)

    monkeypatch.setattr(pairs, "opened", loop)
    return found


ON = {
    "none": {"stabilizer": {"name": "none"}},
    "ebc": {"stabilizer": {"name": "ebc"}, "budget": {"name": "surrogate"}},
}


@pytest.mark.parametrize(
    ("device", "arm", "audits", "block", "warm"),
    [
        ("cpu", "none", 8, 8, [20]),
        ("cpu", "ebc", 8, 40, [20, 20, 20, 20, 20, 1]),
        ("cuda", "none", 8, 48, [20]),  # as many whole intervals as 50 steps hold
        ("cuda", "ebc", 8, 40, [20, 20, 20, 20, 20, 1]),
        ("cuda", "none", 64, 64, [20]),
    ],
)
def test_an_overhead_is_taken_over_whole_intervals_and_on_a_gpu_over_long_blocks(
    shape, opened_loops, device, arm, audits, block, warm
):
    run = replace(changed(shape, ON[arm]), device=device, audit_every=audits, steps=20 + 5 * block)
    found = pairs.paired_overhead(run)
    rounds = (run.steps - 20) // interval(run)
    plain, other = (taken for _, _, taken in opened_loops)
    assert plain == other == warm + [block] * rounds
    percent = 50.0 if arm == "ebc" else 0.0
    assert found == {
        "overhead_pct": percent,
        "overhead_iqr_pct": [percent, percent],
        "pairs": rounds,
        "plain_steps_per_s": 0.5,
    }
    (bare, is_bare, _), (stabilized, is_other, _) = opened_loops
    assert (is_bare, is_other) == (True, False)
    assert bare.audit_every == (0 if device == "cuda" else audits)
    assert stabilized.audit_every == audits
    assert device == "cpu" or stabilized.steps >= sum(plain)  # where they are taken as a run takes them


@pytest.mark.parametrize(
    ("device", "arm", "audits", "block"),
    [("cpu", "none", 0, 4), ("cpu", "ebc", 8, 40), ("cuda", "none", 0, 52), ("cuda", "ebc", 8, 80)],
)
def test_a_step_is_compared_with_adams_without_the_audits_that_it_does_not_need(
    shape, opened_loops, device, arm, audits, block
):
    run = replace(changed(shape, ON[arm]), device=device, audit_every=8)
    found = pairs.step_ratio(run)
    ratio = 1.5 if arm == "ebc" else 1.0
    assert found == {"step_ratio": ratio, "step_ratio_iqr": [ratio, ratio]}
    for opened_run, _, taken in opened_loops:
        assert opened_run.audit_every == audits
        assert taken == [20] + [block] * 40
        assert opened_run.steps >= sum(taken)


def test_turns_end_at_the_time_limit_but_not_before_a_minimum():
    turns = take_turns({"a": lambda n: 1.0}, 1, 99, limit_s=0.0)
    assert len(turns.seconds["a"]) == MIN_ROUNDS


@pytest.mark.thorough
def test_a_budget_that_the_settings_rule_out_says_why(shape, monkeypatch):
    monkeypatch.setattr("ebc_lab.bench.pairs.STABILIZERS", {"ebc": STABILIZERS["ebc"]})
    rows = overheads(replace(shape, budget=replace(shape.budget, target_kl=1e-8)), Effort(2, limit_s=1.0))
    refused = {row["stabilizer"]: row["refused"] for row in rows}
    assert "the smallest KL" in refused.pop("ebc shadow")
    assert "the smallest KL" in refused.pop("ebc tracked")
    assert refused == {"ebc surrogate": None, "ebc fisher": None, "ebc calibrated": None}


def test_the_bare_loop_makes_the_lab_s_own_steps(shape):
    """Without EBC the wrapper is the plain optimizer, bit for bit: so must the loop without it be."""
    plain = changed(shape, {"stabilizer": {"name": "none"}})
    with opened(plain, bare=True) as bare, opened(plain) as loop, opened(plain) as recorded:
        bare.steps(3)
        loop.steps(3)
        recorded.recorded_steps(3)
        weights = [list(one.training.model.parameters()) for one in (bare, loop, recorded)]
        for other in weights[1:]:
            assert all(map(torch.equal, weights[0], other))


def test_a_run_that_diverges_is_no_measurement(shape):
    wild = changed(shape, {"optimizer": {"lr": 1e30}, "stabilizer": {"name": "none"}})
    with opened(wild) as loop, pytest.raises(UserError, match="diverged"):
        loop.recorded_steps(20)


# -- the plain loop ------------------------------------------------------------------------------------------


def test_the_plain_loop_learns():
    shape = {"blocks": 1, "width": 16, "heads": 2, "context": 8}
    loop = plain_loop.PlainLoop([0, 1, 2] * 20, 3, batch=8, lr=4e-3, seed=0, device="cpu", **shape)
    first = loop.step()
    loop.steps(40)
    assert loop.step() < first - 0.3


def test_the_process_of_the_plain_loop_tells_its_threads_and_then_the_seconds_of_its_steps(
    monkeypatch, capsys
):
    shape = {"data": [0, 1, 2] * 20, "vocabulary": 3, "batch": 8, "lr": 4e-3, "seed": 0, "device": "cpu"}
    shape |= {"blocks": 1, "width": 16, "heads": 2, "context": 8}
    with working_clock():
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"{json.dumps(shape)}\n2\n4\n"))
        plain_loop.main()
    threads, two, four = map(float, capsys.readouterr().out.split())
    assert threads == torch.get_num_threads()
    assert four == pytest.approx(2 * two, rel=0.01)


def test_the_plain_model_takes_the_lab_s_weights_and_gives_the_same_losses(shape):
    m = shape.model
    lab = gpt.build(m, 20, 0)
    plain = plain_loop.GPT(20, blocks=m.blocks, width=m.width, heads=m.heads, context=m.context)
    plain.load_state_dict(lab.state_dict())
    rows = torch.randint(20, (3, m.context + 1))
    inputs, targets = rows[:, :-1], rows[:, 1:]
    losses = token_losses(lab(inputs), targets)
    plain_losses = cross_entropy(plain(inputs).flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(plain_losses, losses.flatten())


def test_a_measuring_process_that_ends_early_says_why(shape, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho there is no torch >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(UserError, match="plain_loop ended: there is no torch"):
        throughput(shape, Effort(rounds=1))
    with pytest.raises(
        UserError, match=r"measuring the speed failed \(step_timer ended: there is no torch\): give dtype="
    ):
        measured_rates(shape, [(1, 1, "float32")])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compile_cost(shape) == "torch.compile fails here (step_timer ended: there is no torch)"


# -- shares, arithmetic, memory ------------------------------------------------------------------------------


def test_a_part_inside_another_counts_for_itself_alone(shape, monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    clock = Clock(shape)
    with clock.on("other"):
        with clock.on("base"):
            pass
        clock.around("audit", lambda: None)()
    assert {k: v for k, v in clock.seconds.items() if v} == {"other": 3.0, "base": 1.0, "audit": 1.0}


def test_matrix_operations_are_those_that_torch_counts(shape):
    m = gpt.build(shape.model, 20, 0)
    tokens = torch.randint(20, (shape.batch_size, shape.model.context))
    with FlopCounterMode(display=False) as counter:
        m(tokens).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if str(op).startswith("aten.mm"))
    assert costs.step_flops(m, shape)["matrices"] == products
    squares = shape.batch_size * shape.model.context**2 * shape.model.width * shape.model.blocks
    assert costs.step_flops(m, shape)["attention"] == 12 * squares


@pytest.mark.thorough
def test_low_bit_and_exact_steps_are_compared_with_the_plain_one_and_memory_is_counted(found):
    assert [row["what"] for row in found["low_bit"]] == list(compared.LOW_BIT)
    for row in found["low_bit"]:
        low, high = row["times"]["quartiles"]
        assert 0 < low <= row["times"]["median"] <= high
    told = {row["what"]: row["times"]["median"] for row in found["exact"]["compared"]}
    assert "verity, eager" in told
    assert all(times > 0 for times in told.values())
    held = found["exact"]["bytes_per_weight"]
    assert held["sums"] == 8  # of every weight
    assert 6 < held["quantized"] < 8  # of all matrices but the embeddings


@pytest.mark.thorough
def test_an_energy_based_step_is_compared_with_a_gpts_and_with_itself_without_its_parts(tiny):
    small = ["workload=ebm", "ebm.revive_every=2", "ebm.soc_every=2", "ebm.splats=8"]
    usual = [o for o in tiny if not o.startswith("budget")]
    run = short_run(usual, *small)
    found = compared.energy_steps(run, Effort(rounds=1, limit_s=0.0))
    assert [(c["what"], c["against"]) for c in found["compared"]] == [
        (name, against) for name, (_, against) in compared.EBM.items()
    ]
    assert all(c["times"]["median"] > 0 for c in found["compared"])
    assert 0 < found["after_step_pct"]["median"] < 100


@pytest.mark.parametrize(
    ("setting", "leave"),
    [("quantizer=ternary", "quantizer and policy"), ("determinism=torch", "determinism")],
)
def test_a_run_of_a_section_of_its_own_is_refused_with_that(setting, leave):
    with pytest.raises(UserError, match=f"in a section of its own: leave {leave} out"):
        measure.resolve(compose(["scale=smoke", "data=pydoc", setting], study=False))


def test_the_peak_on_a_cpu_is_of_what_is_held_together():
    def step():
        first = torch.ones(250_000)
        first = first + 1
        return torch.ones(250_000).sum() + first.sum()

    assert 2_000_000 <= memory.peak_on_cpu(step) < 2_100_000


def test_the_peak_is_of_the_quickest_product(monkeypatch):
    taken = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(costs, "seconds_of", lambda run, call, *arguments: next(taken))
    assert costs.matmul_peak(run_part(compose(["device=cpu", "dtype=float32"], study=False)), [8], 3) == {
        "8": 2 * 8**3
    }
