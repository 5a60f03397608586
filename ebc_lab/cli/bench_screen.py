"""What `ebc-lab bench` shows on the terminal: its figures, explained in docs/running.md, as tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ebc_lab.bench.shares import PARTS
from ebc_lab.report.text.words import size

from .screen import plain_table

SIDES = {
    "lab": "the lab's baseline, as a run takes its steps",
    "plain": "plain loop, the same threads",
    "plain_defaults": "plain loop, a process with torch's defaults",
}
COSTS = {
    "help_s": "`ebc-lab --help`",
    "worker_import_s": "worker start, torch imported",
    "build_s": "building a run",
    "evaluate_val_s": "final evaluation, val",
    "evaluate_test_s": "final evaluation, test",
    "checkpoint_s": "writing a checkpoint",
    "finish_s": "finishing, without evaluation",
}


def within(spread: Mapping[str, Any], form: str) -> str:
    """A median and its quartiles."""
    low, high = spread["quartiles"]
    return f"{spread['median']:{form}} ({low:{form}}–{high:{form}})"


def benchmark(console: Console, figures: Mapping[str, Any]) -> None:
    """Everything, section by section."""
    a = figures["about"]
    run = a["run"]
    machine = a["machine"]
    m = run["model"]
    cpu = f"{machine['cpu']}, {machine['cores']} cores"
    on = ", ".join(machine["gpus"]) if run["device"] == "cuda" else cpu
    model = f"{m['blocks']} blocks, d = {m['width']}"
    if run["workload"]["name"] == "ebm":
        model = f"ebm, n = {run['ebm']['n']}, {run['ebm']['splats']:,} splats"
    shape = f"{model}, {run['batch_size']}×{m['context']} tokens"
    about = f"on {on}: {shape}, {run['optimizer']['name']}"
    console.print(Text.assemble((f"{a['scale']} shape ", "bold"), about))
    how = f"{run['dtype']}, {run['threads_per_run']} thread(s), torch {a['torch']}, {a['took_s']:.0f} s"
    console.print(Text(how, style="dim"))
    if a["quick"]:
        console.print(Text("--quick: too few steps for reliable figures", style="yellow"))
    load = machine["load_before"]
    if load and load[0] > machine["cores"] / 2:
        busy = f"the load average was {load[0]:.1f} on {machine['cores']} cores at the start"
        console.print(Text(f"{busy}: expect wide quartiles", style="yellow"))
    for name, section in SECTIONS.items():
        if name not in figures:  # of another workload, or not asked for
            continue
        title, table = section(figures[name])
        console.print(Text(f"\n{title}", style="bold"))
        console.print(table)


def _throughput(t: Mapping[str, Any]) -> tuple[str, Table]:
    table = plain_table("~loop", "precision", ">threads", ">tokens/s", ">ms/step", ">the lab's speed over it")
    for side, label in SIDES.items():
        s = t[side]
        times = within(t[f"lab_over_{side}"], ".2f") + "×" if side != "lab" else ""
        rate = within(s["tokens_per_s"], ",.0f")
        ms = within(s["step_ms"], ".2f")
        table.add_row(label, s["dtype"], str(s["threads"]), rate, ms, times)
    return "Speed", table


def _overhead(rows: Sequence[Mapping[str, Any]]) -> tuple[str, Table]:
    title = "What each stabilizer adds to a step (checks and audits included), against the bare optimizer"
    table = plain_table("stabilizer", ">overhead", ">quartiles", ">pairs", "~")
    for row in rows:
        if row["refused"]:
            table.add_row(row["stabilizer"], "", "", "", Text(row["refused"], style="dim"))
            continue
        low, high = row["overhead_iqr_pct"]
        quartiles = f"{low:+z.1f} to {high:+z.1f}"
        table.add_row(row["stabilizer"], f"{row['overhead_pct']:+z.1f}%", quartiles, str(row["pairs"]))
    return title, table


def _compared(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = plain_table("~what", ">ms/step", ">times", "the step of")
    for row in rows:
        times = within(row["times"], ".3f") + "×"
        table.add_row(row["what"], within(row["step_ms"], ".2f"), times, row["against"])
    return table


def _ebm(figures: Mapping[str, Any]) -> tuple[str, Table]:
    share = within(figures["after_step_pct"], ".1f")
    title = f"The energy-based model's steps as a run takes them; statistics, revival and toppling: {share} %"
    return title, _compared(figures["compared"])


def _shares(stabilizers: Mapping[str, Any]) -> tuple[str, Table]:
    title = "Where a step's time goes, %"
    columns = {name: s for name, s in stabilizers.items() if not s["refused"]}
    table = plain_table("part of the step", *(f">{name}" for name in columns))
    for part, label in PARTS.items():
        table.add_row(label, *(f"{s['share_pct'][part]:.1f}" for s in columns.values()))
    table.add_row("ms/step", *(f"{s['step_ms']:.2f}" for s in columns.values()), style="dim")
    return title, table


def _fixed(f: Mapping[str, Any]) -> tuple[str, Table]:
    title = f"Once a command, once a run (of {f['steps']} steps; median of {f['repeats']})"
    table = plain_table("what", ">seconds")
    for key, label in COSTS.items():
        table.add_row(label, within(f[key], ".3f"))
    return title, table


def _compute(c: Mapping[str, Any]) -> tuple[str, Table]:
    title = f"Arithmetic of forward and backward in {c['dtype']}, {c['threads']} thread(s)"
    table = plain_table("what", ">figure")
    flops = c["flops_per_step"]
    n = max(c["matmul_flops_per_s"], key=lambda k: c["matmul_flops_per_s"][k])
    flops_per_s = c["achieved_flops_per_s"]
    low, high = flops_per_s["quartiles"]
    achieved = {"median": flops_per_s["median"] / 1e9, "quartiles": [low / 1e9, high / 1e9]}
    share = f"{flops['attention'] / flops['total']:.0%} of it attention"
    table.add_row("work per step", f"{flops['total'] / 1e9:.3g} GFLOP, {share}")
    table.add_row("achieved", f"{within(achieved, ',.3g')} GFLOP/s")
    table.add_row("best matrix product", f"{c['peak_flops_per_s'] / 1e9:,.3g} GFLOP/s, n = {n}")
    table.add_row("share of it", f"{c['share_of_peak_pct']:.0f}%")
    return title, table


def _memory(m: Mapping[str, Any]) -> tuple[str, Table]:
    b = m["bare_bytes"]
    weights = f"parameters {size(b['parameters'])}, gradients {size(b['gradients'])}"
    peak = f"a bare step adds {size(b['peak'])} at most"
    title = f"Memory: {weights}, optimizer {size(b['optimizer_state'])}; {peak}"
    copies = (">in copies of the parameters", ">at the peak of a step, copies more")
    table = plain_table("stabilizer", ">held", *copies, "~")
    for row in m["stabilizers"]:
        if row["refused"]:
            table.add_row(row["stabilizer"], "", "", "", Text(row["refused"], style="dim"))
            continue
        weights = size(row["held_bytes"])
        copies_more = f"{row['peak_extra_copies']:+z.2f}"
        table.add_row(row["stabilizer"], weights, f"{row['extra_copies']:.2f}", copies_more)
    return title, table


def _beside(figures: Mapping[str, Any]) -> tuple[str, Group]:
    table = plain_table(
        "~what", ">state", ">gradients", ">activations", ">peak of a step", ">less than Adam's"
    )
    for row in figures["bytes"]:
        sizes = [size(row[k]) for k in ("optimizer_state", "gradients", "activations", "peak")]
        ratios = f"state {row['state_ratio']:.1f}×, both {row['total_ratio']:.1f}×"
        table.add_row(row["what"], *sizes, f"{ratios}, peak {-row['peak_saved_pct']:+z.0f}%")
    return "Beside the weights", Group(table, Text(), _compared(figures["times"]))


def _exact(figures: Mapping[str, Any]) -> tuple[str, Table]:
    held = figures["bytes_per_weight"]
    memory = f"{held['sums']:.1f} B a weight for sums, {held['quantized']:.1f} B for quantized weights"
    title = f"Exact training (determinism=verity), beside plain: {memory}"
    return title, _compared(figures["compared"])


SECTIONS: dict[str, Callable[[Any], tuple[str, RenderableType]]] = {  # key of its figures -> how it is drawn
    "throughput": _throughput,
    "overhead": _overhead,
    "low_bit": lambda rows: ("Low-bit training, steps as a run takes them", _compared(rows)),
    "ebm": _ebm,
    "shares": _shares,
    "fixed": _fixed,
    "compute": _compute,
    "memory": _memory,
    "beside_weights": _beside,
    "exact": _exact,
}
