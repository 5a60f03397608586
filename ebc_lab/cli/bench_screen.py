"""What `ebc-lab bench` shows on the terminal: its figures by the keys of its JSON (docs/running.md)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from ebc_lab.bench.measure import SECTIONS
from ebc_lab.report.text.words import size

from .screen import plain_table


def benchmark(console: Console, figures: Mapping[str, Any]) -> None:
    """Print what was measured, section by section."""
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
        if name in figures:  # else it is of another workload, or not asked for
            console.print(Text(f"\n{name}: {section.about}", style="bold"))
            shown = _shares(figures[name]) if name == "shares" else figures[name]
            for what in _draw(shown):
                console.print(what)


def _shares(stabilizers: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each stabilizer: the parts' shares of a step in per cent, and its ms."""
    rows = []
    for name, found in stabilizers.items():
        shares = found.get("share_pct", {})
        rows.append({"% of a step": name, **shares, "step_ms": found.get("step_ms")})
        rows[-1]["refused"] = found["refused"]
    return rows


def _draw(figures: Any) -> Iterator[RenderableType]:
    """Draw a section: a list of rows as a table, every other figure as a line."""
    if isinstance(figures, list):
        yield _table(figures)
        return
    for key, value in figures.items():
        if isinstance(value, list):
            yield Text(key)
            yield _table(value)
        else:
            yield Text(f"{key}: {_written(key, value)}")


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Draw rows, without the columns in which none has a figure."""
    columns = [key for key in rows[0] if any(row.get(key) is not None for row in rows)]
    texts = {key for key in columns if any(isinstance(row.get(key), str) for row in rows)}
    table = plain_table(*(f"{'~' if key in texts else '>'}{key}" for key in columns))
    for row in rows:
        table.add_row(*(_written(key, row.get(key)) for key in columns))
    return table


def _written(key: str, value: Any) -> str:
    """Write a figure: with its quartiles where it has any, bytes in their unit, others by their keys."""
    if value is None:
        return ""
    if isinstance(value, Mapping) and "median" in value:
        low, high = (_written(key, end) for end in value["quartiles"])
        return f"{_written(key, value['median'])} ({low}–{high})"
    if isinstance(value, Mapping):
        unit = key if key.endswith("bytes") else ""
        return ", ".join(f"{name} {_written(unit, one)}" for name, one in value.items())
    if isinstance(value, list):
        return " to ".join(_written(key, end) for end in value)
    if isinstance(value, int | float) and key.endswith("bytes"):
        return size(value)
    if isinstance(value, str | int):
        return str(value)
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"
