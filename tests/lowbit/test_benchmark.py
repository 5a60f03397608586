"""The benchmark at tiny sizes: who takes part, that they do the same work, the report; never how fast."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ebc_lab.lowbit import PerformanceBenchmark, available_backends
from ebc_lab.lowbit.__main__ import main
from ebc_lab.lowbit.benchmark import load

Report, Row = load().Report, load().Row
cases, with_speedups = load().cases, load().report.with_speedups

TINY = {"sizes": [1500], "iterations": 2, "kmeans": [[60, 5, 3]], "torch_compile": False}


@pytest.fixture(scope="module")
def report() -> Report:
    """Of the familiar snippet, with sizes of its `config` made tiny."""
    benchmark = PerformanceBenchmark()
    benchmark.config.update(TINY)
    return benchmark.run_all_benchmarks()


def rows_of(report: Report, operation: str, levels: str | None) -> dict[str, Row]:
    return {row.candidate: row for row in report.rows if (row.operation, row.levels) == (operation, levels)}


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"size": [10]}, TypeError, "no setting 'size' .did you mean 'sizes'"),
        ({"iterations": 0}, ValueError, "iterations is 0"),
        ({"sizes": [1000.0]}, ValueError, "sizes is"),
        ({"sizes": 1000}, ValueError, "sizes is 1000"),
        ({"kmeans": [[5, 2, 6]]}, ValueError, "no more clusters than points"),
    ],
)
def test_wrong_settings_are_refused(config: dict[str, object], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        PerformanceBenchmark(config)
    changed = PerformanceBenchmark()
    changed.config.update(config)
    with pytest.raises(error, match=message):
        changed.run_all_benchmarks()


@pytest.mark.thorough
def test_every_operation_has_every_backend_and_its_anchors(report: Report):
    operations = ("codes, step given,", "codes", "values", "stochastic", "pack", "unpack", "packed to values")
    reasons = available_backends()
    for operation in operations:
        for levels in ("ternary", "five"):
            rows = rows_of(report, operation, levels)
            assert sum(row.kind == "anchor" for row in rows.values()) >= 2  # by numpy and by torch
            for name, reason in reasons.items():
                row = rows[name]
                assert row.kind == "backend"
                if reason is None:
                    assert row.median_ms >= row.minimum_ms > 0
                else:
                    assert row.minimum_ms is row.peak_mb is row.speedup is None
                    assert row.note
    rows = rows_of(report, "k-means d=5 k=3", None)
    assert {"scikit-learn float64", "scikit-learn float32"} <= set(rows)
    assert rows["scikit-learn float64"].note.endswith("% of labels the same")
    assert rows["BLAS X @ C.T float32"].kind == "context"


def row(name: str, kind: str, least: float | None, operation: str = "codes", threads: int = 1) -> Row:
    return Row(operation, "five", 100, name, kind, threads, least, least)


def test_speed_up_is_the_best_anchors_minimum_over_the_own_one():
    rows = [row("c", "backend", 2.0), row("cuda", "backend", None), row("old", "anchor", 8.0)]
    rows += [row("new", "anchor", 3.0), row("other work", "context", 1.0)]
    assert [r.speedup for r in with_speedups(rows)] == [1.5, None, 3 / 8, 1.0, None]
    assert Report(rows, [], {}, {}).ratios == ["codes five, 100: c over new: 1.50 (target 1.5)"]


def test_threads_do_not_count_as_one_thread_nor_as_others():
    times = (("c", 1, 4.0), ("cpp", 1, 5.0), ("cpp, 2 threads", 2, 1.0), ("numpy", 1, 6.0))
    rows = [row(name, "backend", least, "values", threads) for name, threads, least in times]
    assert Report(rows, [], {}, {}).ratios == ["values five, 100: c over numpy: 1.50 (target 1.3)"]


def test_the_command_prints_the_report_and_writes_it(report: Report, monkeypatch, capsys, tmp_path: Path):
    monkeypatch.setattr(load().PerformanceBenchmark, "run_all_benchmarks", lambda self: report)
    assert main(["bench", "--json", str(tmp_path / "report.json")]) == 0
    text = capsys.readouterr().out
    for part in ("codes ternary, 1,500", "numpy vectorised", "speed-up", "peak MB", "Ratios of minima:"):
        assert part in text
    assert not [line for line in text.splitlines() if line != line.rstrip()]
    kept = json.loads((tmp_path / "report.json").read_text())
    assert len(kept["rows"]) == len(report.rows)
    assert kept["ratios"] == report.ratios
    assert kept["config"]["sizes"] == [1500]
    assert any(line.startswith("dispatcher, 1000 values:") for line in report.ratios)
    assert any(line.startswith("dispatcher, values five, 1,500: chose") for line in report.ratios)


def test_a_measuring_process_that_dies_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capfd):
    monkeypatch.setattr("sys.executable", "/bin/false" if os.path.exists("/bin/false") else "/usr/bin/false")
    with pytest.raises(ChildProcessError, match="the measuring process ended with code 1"):
        PerformanceBenchmark(TINY).run_all_benchmarks()
